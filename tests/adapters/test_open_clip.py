"""Promises of learnable masks in open_clip's towers; real model names, made small."""

import copy
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

open_clip = pytest.importorskip("open_clip")

from open_clip.coca_model import CoCa  # noqa: E402
from open_clip.hf_model import HFTextEncoder  # noqa: E402
from open_clip.model import CLIP, CustomTextCLIP, convert_weights_to_lp  # noqa: E402
from open_clip.transformer import (  # noqa: E402
    Attention,
    CustomResidualAttentionBlock,
    MultimodalTransformer,
    ResidualAttentionBlock,
    TextTransformer,
    Transformer,
    VisionTransformer,
)

from lamzoo import adapters  # noqa: E402
from lamzoo.adapters import add_lam, capture_masks, lam_state_dict, load_lam_state_dict, remove_lam  # noqa: E402
from lamzoo.adapters.hosts import token_layout  # noqa: E402
from lamzoo.adapters.mha import LamMultiheadAttention  # noqa: E402
from lamzoo.errors import ConfigError, UnsupportedHostError  # noqa: E402
from lamzoo.lam import Lam, LamConfig  # noqa: E402

PAPER = LamConfig(init="paper", rank=4)
VOCABULARY = 50
CUSTOM = {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True}


def _clip(name: str, trunk: str | None = None, blocks: dict[str, Any] | None = None, **kwargs: Any) -> nn.Module:
    """A model of open_clip's own configuration, with two layers of width 16 and a few words."""
    config = open_clip.get_model_config(name)
    config["embed_dim"] = 16
    small = {"width": 16, "layers": 2, **(blocks or {})}
    if trunk is not None:
        config["vision_cfg"]["timm_model_name"] = trunk
        config["embed_dim"] = 64  # a trunk that projects nothing has its own width
    else:
        config["vision_cfg"] |= {**small, "head_width": 4, "image_size": 32, "patch_size": 8, "attn_pooler_queries": 5}
    if config["vision_cfg"].get("attentional_pool"):
        config["vision_cfg"]["attn_pooler_heads"] = 4
    config["vision_cfg"] |= kwargs.pop("vision", {})
    config["text_cfg"] |= {**small, "heads": 4, "vocab_size": VOCABULARY, "context_length": 9, **kwargs.pop("text", {})}
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= {"width": 16, "layers": 2, "heads": 4, "vocab_size": VOCABULARY}
        config["multimodal_cfg"]["context_length"] = 9
    custom_text = config.pop("custom_text", False)
    kind = CoCa if "multimodal_cfg" in config else CustomTextCLIP if custom_text else CLIP
    model = kind(**config, **kwargs)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name == "text_decoder.text_projection":  # which open_clip leaves uninitialised
            nn.init.normal_(parameter, std=0.2)
        elif parameter_name.endswith("gamma"):  # LayerScale, so small that a mistake would not show
            nn.init.ones_(parameter)
        elif not parameter.any():
            nn.init.normal_(parameter, std=0.1)
        elif parameter_name.startswith("visual.trunk.blocks") and ".attn." in parameter_name and parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2)  # or attention is next to uniform, whatever the mask
    if trunk is not None:
        model.visual.trunk.blocks = model.visual.trunk.blocks[:2]
    return model.eval()


HOSTS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ViT-B-32": (lambda: _clip("ViT-B-32"), 4),
    "ViT-B-32-quickgelu, custom blocks": (lambda: _clip("ViT-B-32-quickgelu", blocks=CUSTOM), 4),
    "ViT-H-14-CLIPA": (lambda: _clip("ViT-H-14-CLIPA"), 4),
    "coca_ViT-B-32": (lambda: _clip("coca_ViT-B-32"), 6),
    "ViT-B-16-SigLIP": (lambda: _clip("ViT-B-16-SigLIP", trunk="test_vit2"), 4),
    "EVA02-B-16": (lambda: _clip("EVA02-B-16", trunk="eva02_tiny_patch14_224"), 4),
    "RN50": (lambda: _clip("RN50", vision={"layers": [1, 1, 1, 1], "patch_size": None}), 2),
}


@pytest.fixture(params=HOSTS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return HOSTS[request.param][0]()


def _inputs(model: nn.Module) -> tuple[Tensor, Tensor]:
    size = getattr(model.visual, "image_size", 32)
    size = size if isinstance(size, int) else size[0]
    if hasattr(model.visual, "trunk"):
        size = model.visual.trunk.patch_embed.img_size[0]
    text = torch.randint(1, VOCABULARY - 1, (2, 9))
    text[0, 4], text[0, 5:], text[1, 8] = VOCABULARY - 1, 0, VOCABULARY - 1  # end of text, then padding
    return torch.randn(2, 3, size, size), text


def _tensors(output: Any) -> list[Tensor]:
    values = output.values() if isinstance(output, dict) else output
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def _close(got: Any, expected: Any, atol: float = 1e-5) -> None:
    for a, b in zip(_tensors(got), _tensors(expected), strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=atol, rtol=max(atol, 1e-5))


@pytest.mark.parametrize("name", HOSTS)
def test_identity_lam_keeps_outputs(name: str) -> None:
    model = HOSTS[name][0]()
    inputs = _inputs(model)
    expected = model(*inputs)
    add_lam(model)
    _close(model(*inputs), expected)
    assert sum(isinstance(module, Lam) for module in model.modules()) == HOSTS[name][1]


def test_host_state_dict_keys_stay(model: nn.Module) -> None:
    before = list(model.state_dict())
    add_lam(model)
    assert [key for key in model.state_dict() if ".lam." not in key] == before


def test_paper_lam_changes_both_towers(model: nn.Module) -> None:
    inputs = _inputs(model)
    served = add_lam(copy.deepcopy(model), PAPER)
    with torch.no_grad():
        plain, masked = model(*inputs), served(*inputs)
    if not isinstance(plain, dict):
        plain, masked = ({"image_features": x[0], "text_features": x[1]} for x in (plain, masked))
    towers = ["text_features"]
    if any(path.startswith("visual.") for path, module in served.named_modules() if isinstance(module, Lam)):
        towers.append("image_features")
    for tower in towers:
        assert (plain[tower] - masked[tower]).abs().max() > 1e-4


def test_every_parameter_gets_a_gradient(model: nn.Module) -> None:
    untouched = _without_gradient(model)  # heads that this call of the host doesn't use
    assert _without_gradient(add_lam(model, PAPER)) == untouched


def _without_gradient(model: nn.Module) -> list[str]:
    model.zero_grad()
    image, text = _inputs(model)
    sum((x * torch.randn_like(x)).sum() for x in _tensors(model(image, text))).backward()
    return [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_copies_and_pickles_compute_the_same(model: nn.Module) -> None:
    add_lam(model, PAPER)
    inputs = _inputs(model)
    expected = model(*inputs)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), nn.DataParallel(model)):
        _close(copied(*inputs), expected, atol=0.0)


def test_lam_state_dict_round_trip_and_removal(model: nn.Module) -> None:
    inputs = _inputs(model)
    plain = model(*inputs)
    kinds = [type(module) for module in model.modules()]
    other = add_lam(copy.deepcopy(model), PAPER)
    masked = add_lam(model, PAPER)(*inputs)
    load_lam_state_dict(other, lam_state_dict(model))
    _close(other(*inputs), masked, atol=0.0)
    remove_lam(model)
    assert [type(module) for module in model.modules()] == kinds
    _close(model(*inputs), plain, atol=0.0)


def test_captured_masks_cover_every_layer(model: nn.Module) -> None:
    add_lam(model, PAPER)
    inputs = _inputs(model)
    expected = model(*inputs)
    with capture_masks(model) as masks:
        _close(model(*inputs), expected)
    assert len(masks) == sum(isinstance(module, Lam) for module in model.modules())


@pytest.mark.parametrize("keys", ["content", "position"])
def test_single_layer_lam_has_one_network_a_tower(model: nn.Module, keys: Any) -> None:
    inputs = _inputs(model)
    expected = model(*inputs)
    add_lam(model, LamConfig(layers="single", keys=keys))
    _close(model(*inputs), expected)
    owners = [path for path, module in model.named_modules() if isinstance(module, Lam) and module.network is not None]
    assert all(".0.attn" in path for path in owners)


def test_autocast(model: nn.Module) -> None:
    add_lam(model, PAPER)
    inputs = _inputs(model)
    expected = model(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        _close(model(*inputs), expected, atol=0.15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first", ["convert", "add"])
def test_precision_conversion_reaches_the_masks(first: str, dtype: torch.dtype) -> None:
    model = _clip("ViT-B-32", blocks={"block_type": "custom"}, cast_dtype=dtype)
    inputs = _inputs(model)
    add_lam(model, PAPER)
    expected = model(*inputs)
    if first == "convert":
        state = lam_state_dict(model)
        convert_weights_to_lp(remove_lam(model), dtype)
        load_lam_state_dict(add_lam(model, PAPER), state)
    else:
        convert_weights_to_lp(model, dtype)
    linear = model.visual.transformer.resblocks[0].attn.lam.network.query[0]
    assert model.visual.transformer.resblocks[0].attn.in_proj_weight.dtype == linear.weight.dtype == dtype
    _close(model(inputs[0].to(dtype), inputs[1]), expected, atol=0.1)


@pytest.mark.parametrize("layers", ["multi", "single"])
@pytest.mark.parametrize("name", ["ViT-B-32", "coca_ViT-B-32", "EVA02-B-16"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, layers: Any) -> None:
    model = add_lam(HOSTS[name][0](), LamConfig(layers=layers, init="paper"))
    pairs = _inputs(model), _inputs(model)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        outputs = [x for pair in pairs for x in _tensors(model(*pair))]  # two passes before one backward
        sum(x.square().sum() for x in outputs).backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.set_grad_checkpointing(True)
    model.train()
    again = gradients()
    assert plain.keys() == again.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(again[key], gradient, msg=lambda text, key=key: f"{key}: {text}")


def test_custom_block_can_be_checkpointed() -> None:
    """open_clip 3.3's own switch hands its custom blocks too many arguments; torch's checkpoint works on them."""
    tower = add_lam(Transformer(16, 2, 4, qk_norm=True), PAPER)
    x = torch.randn(2, 5, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(tower(x).square().sum(), x)
    y = x
    for block in tower.resblocks:
        y = checkpoint(block, y, None, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], expected)


@pytest.mark.parametrize("kwargs", [{}, CUSTOM], ids=["default", "custom"])
def test_later_text_tokens_do_not_reach_earlier_ones(kwargs: dict[str, Any]) -> None:
    text = add_lam(TextTransformer(9, VOCABULARY, 16, 4, 2, output_tokens=True, **kwargs), PAPER).eval()
    tokens = torch.randint(1, VOCABULARY, (2, 9))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % VOCABULARY
    before, after = text(tokens)[1], text(changed)[1]
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("kwargs", [{}, CUSTOM], ids=["default", "custom"])
def test_padded_text_tokens_are_not_attended_to(kwargs: dict[str, Any]) -> None:
    text = TextTransformer(
        9, VOCABULARY, 16, 4, 2, use_pad_mask=True, no_causal_mask=True, pool_type="first", output_dim=8, **kwargs
    ).eval()
    tokens = torch.randint(1, VOCABULARY, (2, 9))
    tokens[:, 6:] = 0
    expected = text(tokens)
    served = add_lam(copy.deepcopy(text))
    torch.testing.assert_close(served(tokens), expected, atol=1e-5, rtol=1e-5)
    paper = add_lam(text, PAPER)
    before = paper(tokens)
    with torch.no_grad():
        paper.token_embedding.weight[0] += 1.0
    torch.testing.assert_close(paper(tokens), before)


@pytest.mark.parametrize("kind", ["bool", "float", "per_head", "four_dims"])
def test_custom_attention_reads_masks_as_open_clip_does(kind: str) -> None:
    host = nn.ModuleDict({"block": CustomResidualAttentionBlock(16, 4, qk_norm=True)})
    served = add_lam(copy.deepcopy(host))
    mask = torch.rand(2 * 4, 5, 5) < 0.4
    mask[..., 0] = False
    masks = {
        "bool": mask[0],
        "float": torch.randn(5, 5),
        "per_head": mask,
        "four_dims": torch.randn(2, 4, 5, 5),
    }
    x = torch.randn(2, 5, 16)
    expected = host["block"](x, attn_mask=masks[kind])
    torch.testing.assert_close(served["block"](x, attn_mask=masks[kind]), expected, atol=1e-5, rtol=1e-5)


def test_scaled_cosine_attention_equals_the_hosts_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    block = CustomResidualAttentionBlock(16, 4, scale_cosine_attn=True, scale_heads=True)
    x = torch.randn(2, 5, 16)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "bmm", torch.matmul)  # open_clip 3.3 calls bmm on four dims, which fails
        expected = block(x)
    torch.testing.assert_close(add_lam(nn.Sequential(block))(x), expected, atol=1e-5, rtol=1e-5)


def test_scaled_cosine_attention_under_autocast_serves_long_inputs() -> None:
    model = nn.Sequential(CustomResidualAttentionBlock(16, 4, scale_cosine_attn=True))
    model = add_lam(model, LamConfig(op="mul", init="paper"))  # from 768 tokens on in blocks of queries
    x = torch.randn(1, 1000, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)  # the temperature makes the query float32, beside a key and value in bfloat16
    assert (out.float() - model(x)).abs().mean() < 0.05


def test_position_keys_know_grid_class_token_and_text_length() -> None:
    model = add_lam(_clip("coca_ViT-B-32", vision={"image_size": (32, 48)}), LamConfig(keys="position"))
    tables = {
        path.partition(".resblocks.0")[0]: module
        for path, module in model.named_modules()
        if path.endswith("0.attn.lam.network.table")
    }
    assert {path: (table.weight.shape[1], table.num_prefix_tokens, table.grid) for path, table in tables.items()} == {
        "visual.transformer": (1 + 4 * 6, 1, (4, 6)),
        "text.transformer": (9 + 1, 0, None),  # CoCa's class token stands at the end
        "text_decoder": (9, 0, None),
    }


def test_patch_dropout_works_with_content_keys_and_refuses_position_keys() -> None:
    model = _clip("ViT-B-32", vision={"patch_dropout": 0.5}).train()
    with pytest.raises(ConfigError, match="patch_dropout"):
        add_lam(model, LamConfig(keys="position"))
    assert not any(isinstance(module, Lam) for module in model.modules())
    add_lam(model, LamConfig(layers="single", init="paper"))
    assert model.encode_image(_inputs(model)[0]).isfinite().all()


def test_pooling_heads_and_cross_attention_stay_unmasked() -> None:
    model = add_lam(_clip("coca_ViT-B-32"))
    assert type(model.visual.attn_pool.attn) is nn.MultiheadAttention
    assert all(type(block.attn) is nn.MultiheadAttention for block in model.text_decoder.cross_attn)
    assert all(isinstance(block.attn, LamMultiheadAttention) for block in model.text_decoder.resblocks)


def test_intermediates_and_normalised_features() -> None:
    model = _clip("ViT-B-32")
    inputs = _inputs(model)
    expected = model.forward_intermediates(*inputs)
    add_lam(model)
    got = model.forward_intermediates(*inputs)
    for key in ("image_intermediates", "text_intermediates"):
        _close(got[key], expected[key])
    _close([model.encode_image(inputs[0], normalize=True)], [expected["image_features"]])


@pytest.mark.parametrize("tower", ["visual", "text", "transformer"])
def test_one_tower_or_transformer_alone_can_be_served(tower: str) -> None:
    model = _clip("coca_ViT-B-32")
    part = {"visual": model.visual, "text": model.text, "transformer": model.text.transformer}[tower]
    add_lam(part, PAPER)
    served = {path.partition(".")[0] for path, module in model.named_modules() if isinstance(module, Lam)}
    assert served == {"visual" if tower == "visual" else "text"}
    assert all(x.isfinite().all() for x in _tensors(model(*_inputs(model))))


def test_old_sequence_first_blocks_are_served() -> None:
    tower = Transformer(16, 2, 4, batch_first=False)
    x = torch.randn(2, 5, 16)
    expected = tower(x)
    torch.testing.assert_close(add_lam(tower)(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tower", [pytest.param("visual", marks=pytest.mark.slow), "text"])
def test_towers_export(tower: str) -> None:
    model = add_lam(_clip("coca_ViT-B-32"), PAPER)
    image, text = _inputs(model)
    host, x = (model.visual, image) if tower == "visual" else (model.text, text)
    _close(torch.export.export(host, (x,)).module()(x), host(x))


@pytest.mark.parametrize("kwargs", [pytest.param({}, marks=pytest.mark.slow), CUSTOM], ids=["default", "custom"])
def test_compiled_tower_computes_the_same(kwargs: dict[str, Any]) -> None:
    tower = VisionTransformer(16, 8, 16, 1, 4, 2.0, output_dim=8, **kwargs).eval()
    add_lam(tower, PAPER).requires_grad_(False)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(torch.compile(tower, backend="aot_eager", fullgraph=True)(x), tower(x))


class Swapped(Attention):
    """An attention of another kind, as a later open_clip might have."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return x


def _with_block(block: nn.Module) -> nn.Module:
    tower = Transformer(16, 1, 4)
    tower.resblocks.append(block)
    return nn.ModuleDict({"tower": tower})


def _with_attention(attn: nn.Module) -> nn.Module:
    block = ResidualAttentionBlock(16, 4)
    block.attn = attn
    return _with_block(block)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: _with_block(nn.TransformerEncoderLayer(16, 4)),
            r"tower.resblocks.1 \([a-z_.]+.TransformerEncoderLayer\)",
        ),
        (lambda: _with_attention(Swapped(16, 4)), r"tower.resblocks.1.attn \([a-z_.]+.Swapped\)"),
    ],
)
def test_unknown_blocks_are_refused_by_name(build: Callable[[], nn.Module], message: str) -> None:
    model = build()
    with pytest.raises(UnsupportedHostError, match=message):
        add_lam(model)
    assert not any(isinstance(module, Lam) for module in model.modules())


def test_a_text_tower_of_transformers_gets_masks() -> None:
    transformers = pytest.importorskip("transformers", reason="the extra transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(**sizes, vocab_size=40, pad_token_id=0)
    text = HFTextEncoder("", 8, config=config, proj_type="linear").eval()
    model = nn.ModuleDict({"visual": VisionTransformer(16, 8, 16, 1, 4, 2.0), "text": text})
    ids = torch.tensor([[5, 6, 7, 0, 0]])
    expected = text(ids)
    add_lam(model)
    assert [path for path, module in model.named_modules() if isinstance(module, Lam)] == [
        "visual.transformer.resblocks.0.attn.lam",
        "text.transformer.encoder.layer.0.attention.self.lam",
    ]
    torch.testing.assert_close(text(ids), expected, atol=2e-6, rtol=2e-6)


def test_attention_with_further_arguments_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attention, "forward", Swapped.forward)
    with pytest.raises(UnsupportedHostError, match=r"Attention of open_clip 3\.3"):
        add_lam(Transformer(16, 1, 4, qk_norm=True))


def test_block_derived_from_open_clips_is_served_once() -> None:
    class Mine(ResidualAttentionBlock):
        pass

    block = Mine(16, 4)
    x = torch.randn(2, 5, 16)
    expected = block(x)
    model = add_lam(nn.Sequential(block))
    assert [path for path, module in model.named_modules() if isinstance(module, Lam)] == ["0.attn.lam"]
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_open_clip_is_needed_for_its_models_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(adapters, "open_clip", raising=False)
    for name in ("open_clip", "lamzoo.adapters.open_clip"):
        monkeypatch.setitem(sys.modules, name, None)  # makes an import fail
    add_lam(nn.TransformerEncoderLayer(8, 2))
    with pytest.raises(ImportError):
        add_lam(Transformer(16, 1, 4))


def test_mask_multiplies_the_scores() -> None:
    """Against the formula written out on open_clip's own weights."""
    block = add_lam(ResidualAttentionBlock(16, 4), LamConfig(op="mul", init="paper", rank=4))
    attn, x = block.attn, torch.randn(2, 5, 16)
    q, k, v = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT / 2 * attn.lam(x, x).dense()
    expected = attn.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(block.attention(x), expected)


def test_token_layouts_are_those_of_the_towers() -> None:
    model = add_lam(_clip("ViT-B-32"))
    image = token_layout(model, "visual.transformer.resblocks.1.attn")
    assert (image.length, image.num_prefix_tokens, image.grid) == (17, 1, (4, 4))
    assert image.pooling is not None
    assert (image.pooling.blocks, image.pooling.kind) == ("visual.transformer.resblocks", "token")
    text = token_layout(model, "transformer.resblocks.0.attn")
    assert (text.length, text.grid, text.pooling) == (9, None, None)


def test_multimodal_decoder_alone_is_served() -> None:
    decoder = MultimodalTransformer(16, 2, 4, context_length=9, output_dim=8)
    nn.init.normal_(decoder.text_projection)
    image, text = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    expected = decoder(image, text)
    torch.testing.assert_close(
        add_lam(decoder, LamConfig(keys="position"))(image, text), expected, atol=1e-5, rtol=1e-5
    )
