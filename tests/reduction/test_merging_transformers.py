"""What merge_tokens promises of the vision transformers of Hugging Face transformers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn import functional as F
from torch.testing import assert_close

transformers = pytest.importorskip("transformers", reason="the extra transformers")

import lamzoo  # noqa: E402
from lamzoo import LamConfig, add_lam, merge_tokens, remove_reduction  # noqa: E402
from lamzoo.errors import UnsupportedHostError  # noqa: E402
from lamzoo.lam.fused import pinned_form  # noqa: E402
from lamzoo.reduction.stacks import find_stack  # noqa: E402

_SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
_IMAGE = _SMALL | {"image_size": 32, "patch_size": 8}
_CLIP = {"text_config": _SMALL | {"vocab_size": 40}, "vision_config": _IMAGE, "projection_dim": 8}

# Model class to its configuration, on 4 x 4 patches or, of clips, on 4 x 2 x 2.
MODELS: dict[str, Callable[[], Any]] = {
    "ViTModel": lambda: transformers.ViTConfig(**_IMAGE),
    "ViTForImageClassification": lambda: transformers.ViTConfig(**_IMAGE, num_labels=5),
    "DeiTForImageClassification": lambda: transformers.DeiTConfig(**_IMAGE, num_labels=5),
    "ViTMSNModel": lambda: transformers.ViTMSNConfig(**_IMAGE),
    "IJepaModel": lambda: transformers.IJepaConfig(**_IMAGE),
    "Dinov2Model": lambda: transformers.Dinov2Config(**_IMAGE),
    "Dinov2ForImageClassification": lambda: transformers.Dinov2Config(**_IMAGE, num_labels=5),
    "Dinov2WithRegistersModel": lambda: transformers.Dinov2WithRegistersConfig(**_IMAGE, num_register_tokens=2),
    "CLIPVisionModel": lambda: transformers.CLIPVisionConfig(**_IMAGE),
    "CLIPForImageClassification": lambda: transformers.CLIPConfig(**_CLIP, num_labels=5),
    "SiglipVisionModel": lambda: transformers.SiglipVisionConfig(**_IMAGE),
    "VideoMAEForVideoClassification": lambda: transformers.VideoMAEConfig(
        **_SMALL, image_size=16, patch_size=8, num_frames=8, tubelet_size=2, num_labels=5
    ),
    "VivitForVideoClassification": lambda: transformers.VivitConfig(
        **_SMALL, image_size=16, num_frames=8, tubelet_size=[2, 8, 8], num_labels=5
    ),
    "DINOv3ViTModel": lambda: transformers.DINOv3ViTConfig(
        **_IMAGE, num_register_tokens=2, query_bias=False, value_bias=False, pos_embed_rescale=None
    ),
    "BeitForImageClassification": lambda: transformers.BeitConfig(
        **_IMAGE, num_labels=5, use_absolute_position_embeddings=True, drop_path_rate=0.0
    ),
}
CONFIGS = [
    LamConfig(rank=3, init="paper"),
    LamConfig(rank=3, init="paper", keys="position", layers="single"),
    LamConfig(rank=3, init="paper", op="mul", layers="single"),
    LamConfig(rank=3, init="paper", keys="position"),
]
# Equal patches have other keys where positions rotate them.
each_unrotated_model = pytest.mark.parametrize("name", [name for name in MODELS if name != "DINOv3ViTModel"])
each_model_once = pytest.mark.parametrize(
    ("name", "masked"), [(name, index % 3 < 2) for index, name in enumerate(MODELS)]
)


def create(name: str, masked: bool = False) -> Any:
    model = copy.deepcopy(_built(name))
    return add_lam(model, CONFIGS[list(MODELS).index(name) % 4]) if masked else model


@cache
def _built(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, name)(MODELS[name]()).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
            elif "lambda" in key:
                parameter.fill_(0.5)
    return model


def inputs(name: str) -> Tensor:
    shape = (2, 8, 3, 16, 16) if "Video" in name else (2, 3, 32, 32)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def run(model: Any, x: Tensor, **kwargs: Any) -> Tensor:
    outputs = model(pixel_values=x, **kwargs)
    found: Tensor = outputs["logits" if "logits" in outputs else "last_hidden_state"]
    return found


def stack_of(model: nn.Module) -> Any:
    return find_stack(model, masked=False, verb="merged")


@each_unrotated_model
def test_equal_patches_merge_without_loss(name: str) -> None:
    """Patches that are equal in pairs: half of them are gone after the first layer."""
    model, x = create(name), inputs(name)
    if list(MODELS).index(name) % 2:
        add_lam(model, LamConfig(rank=3, init="paper"))
    prefix = stack_of(model).layout.num_prefix_tokens

    def pair(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens = args[0]
        pairs = tokens[:, prefix::2].repeat_interleave(2, dim=1)
        return (torch.cat([tokens[:, :prefix], pairs], dim=1), *args[1:])

    next(iter(stack_of(model).blocks.values())).register_forward_pre_hook(pair)
    before = run(model, x)
    merge_tokens(model, keep=0.5, at=(0,))
    assert_close(run(model, x), before, atol=1e-5, rtol=1e-5)


@each_model_once
def test_merging_changes_the_output_keeping_all_does_not_and_removing_restores_the_model(
    name: str, masked: bool
) -> None:
    model, x = create(name, masked), inputs(name)
    before, keys, classes = run(model, x), list(model.state_dict()), [type(module) for module in model.modules()]
    assert_close(run(merge_tokens(model, keep=1), x), before, atol=1e-5, rtol=1e-5)
    merge_tokens(model, keep=0.4)
    after = run(model, x)
    assert after.shape == before.shape
    assert not torch.allclose(after, before, atol=1e-4)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(other, x), after)
    assert list(model.state_dict()) == keys
    remove_reduction(model)
    assert torch.equal(run(model, x), before)
    assert [type(module) for module in model.modules()] == classes


@each_model_once
@pytest.mark.parametrize("whole_blocks", [False, True])
def test_gradient_checkpointing_changes_no_gradient(name: str, masked: bool, whole_blocks: bool) -> None:
    model, x = merge_tokens(create(name, masked), keep=0.4).train(), inputs(name)
    gradients = []
    for checkpoints in (False, True):
        if checkpoints and whole_blocks:  # as FSDP's users do
            blocks = find_stack(model, masked=masked, verb="merged").blocks.values()
            apply_activation_checkpointing(model, check_fn=set(blocks).__contains__)
        elif checkpoints:  # of the parts of blocks
            model.activation_checkpointing_enable()
        model.zero_grad()
        run(model, x).square().sum().backward()
        gradients.append([each.grad for each in model.parameters() if each.grad is not None])
    assert_close(*gradients)


# Parts of names in transformers to those in timm.
_NAMES = {
    "embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj", "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding.weight": "pos_embed", "embeddings.patch_embedding.": "patch_embed.proj.",
    "pre_layrnorm": "norm_pre", "post_layernorm": "norm", "encoder.layers": "blocks", "encoder.layer": "blocks",
    "layers": "blocks", "layernorm_before": "norm1", "layernorm_after": "norm2", "layer_norm1": "norm1",
    "layer_norm2": "norm2", "layernorm": "norm", "self_attn": "attn", "attention": "attn", "o_proj": "proj",
    "out_proj": "proj", "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma", "vit.": "",
    "classifier": "head",
}  # fmt: skip


_EVAS_NAMES = {
    "embeddings.cls_token": "cls_token", "embeddings.register_tokens": "reg_token",
    "embeddings.patch_embeddings": "patch_embed.proj", "model.layer": "blocks", "attention": "attn", "o_proj": "proj",
    "layer_scale1.lambda1": "gamma_1", "layer_scale2.lambda1": "gamma_2", "up_proj": "fc1", "down_proj": "fc2",
}  # fmt: skip


def timms(model: Any) -> nn.Module:
    """Returns timm's model with the weights of one of transformers."""
    if type(model).__name__ == "DINOv3ViTModel":
        twin = timm.create_model(
            "vit_small_patch16_dinov3", img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2, mlp_ratio=1.5,
            num_reg_tokens=2, num_classes=0, global_pool="", init_values=0.5,
        ).eval()  # fmt: skip
    else:
        twin = _plain_vit(model)
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        state[_timms_key(key, model)] = value
    for key in [key for key in state if ".q_proj." in key]:
        parts = [state.pop(key.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        state[key.replace("q_proj", "qkv")] = torch.cat(parts)
    own = twin.state_dict()
    twin.load_state_dict({key: state[key].reshape(value.shape) for key, value in own.items()})
    return twin


def _plain_vit(model: Any) -> nn.Module:
    config = model.config
    kinds = [name for name in ("CLIP", "Dino", "Siglip", "For") if name in type(model).__name__]
    acts = {"quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}
    twin: nn.Module = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2, mlp_ratio=4 if "Dino" in kinds else 1.5,
        norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps), act_layer=acts.get(config.hidden_act, "gelu"),
        pre_norm="CLIP" in kinds, class_token="Siglip" not in kinds, init_values=0.5 if "Dino" in kinds else None,
        num_classes=5 if "For" in kinds else 0, global_pool="token" if "For" in kinds else "",
    ).eval()  # fmt: skip
    return twin


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize(
    "name",
    ["ViTModel", "ViTForImageClassification", "Dinov2Model", "CLIPVisionModel", "SiglipVisionModel", "DINOv3ViTModel"],
)
def test_the_same_tokens_merge_as_in_timms_model_of_the_same_weights(name: str, masked: bool) -> None:
    ours = create(name)
    theirs = timms(ours)
    if masked:
        for model in (ours, theirs):
            add_lam(model, CONFIGS[1])
        state = {_timms_key(key, ours): value for key, value in lamzoo.lam_state_dict(ours).items()}
        lamzoo.load_lam_state_dict(theirs, state, config=CONFIGS[1])
    x = inputs(name)
    for keep in (1.0, 0.4):
        for model in (ours, theirs):
            merge_tokens(model, keep=keep)
        found = run(ours, x)
        if name == "CLIPVisionModel":  # whose output has no norm
            found = ours.post_layernorm(found)
        assert_close(found, theirs(x), atol=1e-5, rtol=1e-5)


def _timms_key(key: str, model: nn.Module) -> str:
    names = _EVAS_NAMES if type(model).__name__ == "DINOv3ViTModel" else _NAMES
    for old, new in names.items():
        key = key.replace(old, new)
    return key


def test_every_hidden_state_has_the_tokens_of_the_host() -> None:
    model, x = create("ViTForImageClassification"), inputs("ViTForImageClassification")
    model(x, output_hidden_states=True)  # registers the hooks by which transformers records them
    merge_tokens(model, keep=0.4)
    outputs = model(x, output_hidden_states=[1, 3])
    assert [None if each is None else each.shape for each in outputs.hidden_states] == [
        None, (2, 17, 16), None, (2, 17, 16),
    ]  # fmt: skip
    assert_close(outputs.logits, model(x).logits)
    normed = model.vit.layernorm(outputs.hidden_states[3])
    assert_close(model.classifier(normed[:, 0]), outputs.logits)
    for wanted in (True, [-4], -4):
        with pytest.raises(UnsupportedHostError, match=r"input of the first block.*output_hidden_states=\[2, 3\]"):
            model(x, output_hidden_states=wanted)


def test_a_model_masked_in_part_computes_and_is_not_merged() -> None:
    model, x = create("ViTModel"), inputs("ViTModel")
    before = run(model, x)
    add_lam(model.layers[1], CONFIGS[0])
    assert not torch.allclose(run(model, x), before, atol=1e-4)
    with pytest.raises(UnsupportedHostError, match=r"in layers: masks were added to some of its blocks.*on the whole"):
        merge_tokens(model, keep=0.5)
    assert torch.equal(run(lamzoo.remove_lam(model), x), before)


def test_an_attention_mask_of_all_tokens_is_refused() -> None:
    model, x = merge_tokens(create("ViTModel"), keep=0.5), inputs("ViTModel")
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[0, 3] = 0
    with pytest.raises(UnsupportedHostError, match="ViTLayer while it is called with argument 2"):
        model(x, attention_mask=mask)


def test_the_image_tower_of_a_clip_model_is_merged_and_its_text_tower_is_not() -> None:
    torch.manual_seed(0)
    model: Any = transformers.CLIPModel(transformers.CLIPConfig(**_CLIP)).eval()
    x, text = inputs("CLIPVisionModel"), {"input_ids": torch.randint(3, 39, (2, 6))}
    add_lam(model, CONFIGS[0])
    with torch.no_grad():
        image, words = model.get_image_features(x).pooler_output, model.get_text_features(**text).pooler_output
        merge_tokens(model, keep=0.4)
        assert not torch.allclose(model.get_image_features(x).pooler_output, image, atol=1e-5)
        assert torch.equal(model.get_text_features(**text).pooler_output, words)


@pytest.mark.parametrize("name", ["Dinov2WithRegistersModel", "DINOv3ViTModel"])
def test_weights_of_merged_tokens_are_recorded(name: str) -> None:
    model, x = create(name, True), inputs("ViTModel")
    model.set_attn_implementation("eager")
    merge_tokens(model, keep=0.5)
    weights = model(x, output_attentions=True).attentions
    with lamzoo.capture_masks(model) as records:
        model(x)
    for found, record in zip(weights, records.values(), strict=True):
        assert_close(found, record.attention)
        assert_close(found.sum(-1), torch.ones(found.shape[:-1]))
    assert weights[0].shape == (2, 2, 17, 19)  # of 16 patches and three prefix tokens


@pytest.mark.parametrize("name", ["DINOv3ViTModel", "Dinov2Model"])
def test_a_saved_model_merges_as_before(name: str, tmp_path: Path) -> None:
    model, x = create(name, True), inputs(name)
    model.save_pretrained(tmp_path)
    expected = run(merge_tokens(model, keep=0.4), x)
    assert torch.equal(run(merge_tokens(lamzoo.from_pretrained(tmp_path), keep=0.4), x), expected)


@pytest.mark.parametrize("name", ["DINOv3ViTModel", "ViTForImageClassification"])
def test_a_fused_model_merges_the_same_tokens(name: str) -> None:
    model, x = merge_tokens(add_lam(create(name), CONFIGS[0]), keep=0.4), inputs(name)
    with torch.no_grad():
        expected = run(model, x)
        lamzoo.fuse(model)
        with pinned_form(True):
            assert_close(run(model, x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("name", ["ViTForImageClassification", "CLIPVisionModel", "DINOv3ViTModel"])
def test_a_merged_model_compiles_as_one_graph(name: str, masked: bool) -> None:
    model, x = merge_tokens(create(name, masked), keep=0.4), inputs(name)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert_close(run(compiled, x), run(model, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", ["use_relative_position_bias", "use_shared_relative_position_bias"])
@pytest.mark.parametrize("reduce", [partial(merge_tokens, keep=0.5), partial(lamzoo.prune_tokens, keep=0.5)])
def test_a_bias_for_pairs_of_positions_is_refused(bias: str, reduce: Any) -> None:
    model = transformers.BeitModel(transformers.BeitConfig(**_IMAGE, **{bias: True}))
    with pytest.raises(UnsupportedHostError, match=r"BeitModel adds a bias for each pair of positions.*use a model"):
        reduce(add_lam(model))


@pytest.mark.parametrize("name", ["ViTForImageClassification", "CLIPVisionModel", "DINOv3ViTModel"])
def test_pruning_names_merging_as_the_way_out(name: str) -> None:
    with pytest.raises(UnsupportedHostError, match=r"returns every token; merge them with lamzoo.merge_tokens"):
        lamzoo.prune_tokens(create(name, True), keep=0.5)
    with pytest.raises(UnsupportedHostError, match=r"merge its tokens with lamzoo.merge_tokens"):
        lamzoo.prune_tokens(create(name), keep=0.5)


# SigLIP 2, whose images have grids of their own and are padded.
GRIDS = [(3, 5), (2, 3), (1, 1), (4, 4), (3, 7)]
each_siglip2 = pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])


def siglip2(masked: bool) -> Any:
    torch.manual_seed(0)
    vision = _SMALL | {"patch_size": 4, "num_patches": 16}
    config = transformers.Siglip2Config(vision_config=vision, text_config=_SMALL | {"vocab_size": 40}, num_labels=5)
    model: Any = transformers.Siglip2ForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    return add_lam(model, CONFIGS[0]) if masked else model


def padded(grids: list[tuple[int, int]]) -> dict[str, Tensor]:
    """A batch as its image processor makes it; a grid's patches are always the same."""
    longest = max(rows * columns for rows, columns in grids)
    patches = [torch.randn(r * c, 48, generator=torch.Generator().manual_seed(r * c)) for r, c in grids]
    return {
        "pixel_values": torch.stack([F.pad(each, (0, 0, 0, longest - len(each))) for each in patches]),
        "pixel_attention_mask": torch.stack([(torch.arange(longest) < len(each)).long() for each in patches]),
        "spatial_shapes": torch.tensor(grids),
    }


@each_siglip2
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_padded_image_is_merged_as_if_it_were_alone(masked: bool, implementation: str) -> None:
    model, batch = siglip2(masked), padded(GRIDS)
    model.set_attn_implementation(implementation)
    before = model(**batch)
    assert_close(merge_tokens(model, keep=1)(**batch).logits, before.logits, atol=1e-5, rtol=1e-5)
    merge_tokens(model, keep=0.5)
    together = model(**batch).logits
    assert not torch.allclose(together, before.logits, atol=1e-3)
    assert_close(torch.cat([model(**padded([grid])).logits for grid in GRIDS]), together, atol=1e-5, rtol=1e-4)
    features = model.vision_model(**batch)
    assert features.last_hidden_state.shape == (5, 21, 16)
    assert_close(remove_reduction(model)(**batch).logits, before.logits)


def test_padded_images_get_shorter_and_padding_has_no_gradient() -> None:
    model, batch, lengths = merge_tokens(siglip2(True), keep=0.3).train(), padded(GRIDS), list[int]()
    for block in model.vision_model.encoder.layers:
        block.layer_norm2.register_forward_hook(lambda _, args, out: lengths.append(out.shape[1]))
    gradients = []
    for checkpoints in (False, True):
        if checkpoints:
            model.activation_checkpointing_enable()
        patches = batch["pixel_values"].clone().requires_grad_()
        model(**{**batch, "pixel_values": patches}).logits.square().sum().backward()
        assert patches.grad is not None
        gradients.append(patches.grad)
    assert lengths[:3] == [15, 10, 7]
    assert_close(*gradients)
    assert (gradients[0].abs().sum(dim=-1) > 0).eq(batch["pixel_attention_mask"].bool()).all()
