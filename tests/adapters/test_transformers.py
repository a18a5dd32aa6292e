"""What add_lam promises of Hugging Face models: the same outputs at first, then masked attention, padded and cached."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="the extra transformers")

from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402
from transformers.masking_utils import eager_mask  # noqa: E402

import lamzoo  # noqa: E402
from lamzoo.adapters import add_lam, capture_masks, lam_state_dict, load_lam_state_dict, remove_lam  # noqa: E402
from lamzoo.errors import ConfigError, UnsupportedHostError  # noqa: E402
from lamzoo.lam import LamConfig  # noqa: E402
from lamzoo.lam.fused import pinned_form  # noqa: E402
from lamzoo.lam.masks import PositionTable  # noqa: E402
from tests.adapters.transformers_hosts import (  # noqa: E402
    DETR,
    HOSTS,
    LLAMA,
    SMALL,
    TEXT,
    Host,
    Inputs,
    both,
    clips,
    inputs_of,
    masks,
    run,
    words,
)

RANDOM = LamConfig(init="paper", rank=3)
CONFIGS = {
    "add": RANDOM,
    "mul-shared": LamConfig(init="paper", rank=2, op="mul", heads="shared", sign="positive"),
    "single": LamConfig(init="paper", rank=3, layers="single"),
}
GENERATORS = [name for name, host in HOSTS.items() if host.generates]
FEW = ["bert", "siglip", "llama"]
# The rest of these take only time.
SOME = [
    name if name in ("llama", "t5", "mllama", "moonshine") else pytest.param(name, marks=pytest.mark.slow)
    for name in GENERATORS
]


@pytest.fixture(params=HOSTS)
def host(request: pytest.FixtureRequest) -> Host:
    return HOSTS[request.param]


@pytest.mark.parametrize("implementation", [None, pytest.param("eager", marks=pytest.mark.slow)])
def test_fresh_masks_keep_the_outputs_and_every_attention_layer_has_one(host: Host, implementation: str | None) -> None:
    model, inputs = host.create(implementation), inputs_of(host)
    with torch.no_grad():
        expected = run(model, inputs)
        assert add_lam(model) is model
        torch.testing.assert_close(run(model, inputs), expected, atol=2e-6, rtol=2e-6)
    assert len(masks(model)) == host.layers


def test_masks_have_the_heads_of_their_layer() -> None:
    model, inputs = DETR.create(), DETR.inputs()
    with torch.no_grad():
        expected = run(model, inputs)
        torch.testing.assert_close(run(add_lam(model), inputs), expected, atol=2e-6, rtol=2e-6)
    assert [lam.network.heads for lam in masks(model).values()] == [2, 4, 4]


def sharing(model: nn.Module) -> list[tuple[int, dict[str, Any]]]:
    """Returns for each module with a configuration the number of the first that has the same one, and its fields."""
    configs: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    identities = [id(config) for config in configs]
    return [(identities.index(id(config)), config.to_dict()) for config in configs]


def test_removing_masks_restores_the_host(host: Host) -> None:
    model, inputs = host.create(), inputs_of(host)
    configs = sharing(model)
    keys, hooks = list(model.state_dict()), [len(module._forward_pre_hooks) for module in model.modules()]
    with torch.no_grad():
        expected = run(model, inputs)
        add_lam(model, RANDOM)
        assert [key for key in model.state_dict() if ".lam." not in key] == keys
        assert not torch.allclose(run(model, inputs), expected, atol=1e-3)
        remove_lam(model)
        assert torch.equal(run(model, inputs), expected)
    assert sharing(model) == configs
    assert list(model.state_dict()) == keys
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


def reference_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    position_bias: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention under the dense mask of the tokens that :func:`referring` noted, written out."""
    left, right = (factor.expand(-1, query.shape[1], -1, -1) for factor in module.noted)
    if left.shape[2] != query.shape[2]:  # a part of the tokens at a time
        part = slice(module.used, module.used + query.shape[2])
        left, right, module.used = left[:, :, part], right[:, :, part], part.stop
    key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores * (left @ right.mT) if module.op == "mul" else scores + left @ right.mT
    for bias in (position_bias, attention_mask):
        scores = scores if bias is None else scores + bias[..., : key.shape[2]]
    weights = scores.softmax(dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("reference", reference_attention)
AttentionMaskInterface.register("reference", eager_mask)


def referring(model: Any, masked: nn.Module) -> nn.Module:
    """Makes a plain model compute the attention of a masked one by :func:`reference_attention`."""
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel):
            module.config._attn_implementation_internal = "reference"

    def note(module: Any, args: Any, kwargs: Any) -> None:
        def of(name: str) -> Any:
            return kwargs.get(name)

        tokens = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        names = ("key_value_states", "encoder_hidden_states", "cross_attention_states")
        others = [of(each) for each in names if of(each) is not None]
        others += [each for each in args[1:2] if isinstance(each, Tensor) and each.ndim == 3 and module.crosses]
        tokens = tokens.reshape(-1, *tokens.shape[-2:])
        keys = others[0].reshape(len(tokens), -1, others[0].shape[-1]) if others else tokens
        module.noted, module.used = module.network(tokens, keys), 0

    for path, lam in masks(masked).items():
        layer: Any = model.get_submodule(path.removesuffix(".lam"))
        layer.network, layer.op, layer.crosses = lam.network, lam.config.op, "Cross" in type(layer).__name__
        layer.register_forward_pre_hook(note, with_kwargs=True)
    return model


@pytest.mark.parametrize("config", ["add", pytest.param("mul-shared", marks=pytest.mark.slow)])
def test_random_masks_equal_an_eager_reference(host: Host, config: str) -> None:
    masked, inputs = add_lam(host.create(), CONFIGS[config]), inputs_of(host)
    with torch.no_grad():
        expected = run(referring(host.create(), masked), inputs)
        torch.testing.assert_close(run(masked, inputs), expected, atol=1e-5, rtol=1e-5)


# Names of the rate, or of the layer, by which an attention layer drops weights.
_DROPOUTS = ("attention_dropout", "dropout", "dropout_prob", "attn_dropout")


@pytest.mark.parametrize(
    "name",
    [name if name in ("bert", "vit", "siglip") else pytest.param(name, marks=pytest.mark.slow) for name in HOSTS],
)
def test_the_same_attention_weights_drop_as_in_the_host(name: str) -> None:
    def dropping(model: nn.Module, rate: float) -> nn.Module:
        for module in model.modules():
            if isinstance(module, nn.Dropout) or hasattr(module, "drop_prob"):
                setattr(module, "p" if isinstance(module, nn.Dropout) else "drop_prob", 0.0)
            if hasattr(getattr(module, "config", None), "pos_embed_rescale"):  # DINOv3's augmentation
                module.config.pos_embed_rescale = None
        for path in layers:
            layer = model.get_submodule(path)
            at = next((each for each in _DROPOUTS if hasattr(layer, each)), None)
            if at is None:  # Mllama's vision tower
                continue
            if isinstance(getattr(layer, at), nn.Dropout):
                getattr(layer, at).p = rate
            else:
                setattr(layer, at, rate)
        return model.train()

    host = HOSTS[name]
    plain, inputs = host.create(), inputs_of(host)
    masked = add_lam(copy.deepcopy(plain), LamConfig(rank=2))
    layers = [path.removesuffix(".lam") for path in masks(masked)]
    outputs = []
    for model, rate in ((plain, 0.3), (masked, 0.3), (copy.deepcopy(masked), 0.0)):
        dropping(model, rate)
        torch.manual_seed(0)
        with torch.no_grad():
            outputs.append(run(model, inputs))
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-4)
    assert (outputs[2] - outputs[0]).abs().max() > 1e-2


def test_every_mask_gets_gradients(host: Host) -> None:
    model = add_lam(host.create(), RANDOM).requires_grad_(False)
    for lam in masks(model).values():
        lam.requires_grad_(True)
    run(model, inputs_of(host)).square().sum().backward()
    for lam in masks(model).values():
        assert all(each.grad is not None and each.grad.abs().max() > 0 for each in lam.parameters())


def generate(model: Any, host: Host, **kwargs: Any) -> Any:
    """Generates text behind words that are padded on the left."""
    torch.manual_seed(1)
    inputs = host.inputs()
    inputs.pop("decoder_input_ids", None)
    if host.pads:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][0, :2] = 0
    return model.generate(
        **inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, suppress_tokens=[35, 36, 37, 38],
        output_logits=True, return_dict_in_generate=True, disable_compile=True, **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", SOME)
def test_a_cache_changes_no_logits(name: str, config: str) -> None:
    host = HOSTS[name]
    model = add_lam(host.create(), CONFIGS[config])
    expected = torch.stack(generate(model, host, use_cache=False).logits)
    for cache in ("dynamic", "static"):
        found = torch.stack(generate(model, host, cache_implementation=cache).logits)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATORS)
def test_beams_find_the_same_words_with_a_cache(name: str) -> None:
    host = HOSTS[name]
    model = add_lam(host.create(), RANDOM)
    expected = generate(model, host, num_beams=3, use_cache=False).sequences
    assert torch.equal(generate(model, host, num_beams=3).sequences, expected)


@pytest.mark.parametrize("name", FEW)
def test_copies_pickles_and_threads_compute_the_same(name: str) -> None:
    host = HOSTS[name]
    model = add_lam(host.create(), RANDOM)
    batches = [inputs_of(host) for _ in range(4)]
    for number, batch in enumerate(batches):
        batch["input_ids"] = batch["input_ids"] + number
    with torch.no_grad():
        expected = [run(model, batch) for batch in batches]
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(run(other, batches[0]), expected[0])
    copied = copy.deepcopy(model)
    remove_lam(copied)
    assert len(masks(model)) == host.layers

    def infer(number: int) -> Tensor:
        with torch.no_grad():
            return run(model, batches[number])

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(infer, [0, 1, 2, 3] * 8))
    assert all(torch.equal(each, expected[number % 4]) for number, each in enumerate(found))


@pytest.mark.parametrize("layers", ["multi", "single"])
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradient_checkpointing_changes_no_gradient(name: str, layers: Any, device: str) -> None:
    host = HOSTS[name]
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs_of(host).items()}
    gradients = []
    for checkpoints in (False, True):
        model: Any = host.create()
        add_lam(model, LamConfig(init="paper", rank=3, layers=layers)).train().to(device)
        if checkpoints:
            model.activation_checkpointing_enable()
        torch.manual_seed(2)
        loss = run(model, inputs, **({"use_cache": False} if host.generates else {})).square().sum()
        with ThreadPoolExecutor(1) as pool:  # of CPU tensors too, the rerun is not in the thread of the forward pass
            pool.submit(loss.backward).result()
        gradients.append([each.grad for lam in masks(model).values() for each in lam.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, **({} if device == "cpu" else {"rtol": 1e-3, "atol": 1e-3}))


def test_mask_state_dicts_carry_the_masks_to_another_model() -> None:
    host = HOSTS["bert"]
    model, inputs = add_lam(host.create(), RANDOM), inputs_of(host)
    other = add_lam(host.create(), RANDOM)
    for lam in masks(other).values():
        lam.network.reset_parameters()
    assert not torch.allclose(run(model, inputs), run(other, inputs))
    load_lam_state_dict(other, lam_state_dict(model))
    assert torch.equal(run(model, inputs), run(other, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["multi", "single"])
@pytest.mark.parametrize("name", [*FEW, "vit", "t5"])
def test_compiled_and_exported_models_compute_the_same(name: str, layers: Any) -> None:
    host = HOSTS[name]
    model, inputs = add_lam(host.create(), LamConfig(init="paper", rank=3, layers=layers)), inputs_of(host)
    expected = run(model, inputs, **({"use_cache": False} if host.generates else {}))
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)  # with a cache in decoders
    torch.testing.assert_close(run(compiled, inputs), expected, atol=1e-5, rtol=1e-5)
    arguments = inputs | ({"use_cache": False} if host.generates else {})
    exported = torch.export.export(model, (), arguments).module()
    torch.testing.assert_close(run(exported, arguments), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_compiled_decoding_with_a_static_cache_computes_the_same(name: str) -> None:
    model: Any = add_lam(HOSTS[name].create(), RANDOM)
    ids = words()["input_ids"]
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        model(ids[:, :4], past_key_values=cache)
        found = torch.cat([compiled(ids[:, at : at + 1], past_key_values=cache).logits for at in (4, 5)], dim=1)
        torch.testing.assert_close(found, model(ids, use_cache=False).logits[:, 4:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_another_implementation_of_the_model_keeps_the_masks(implementation: str) -> None:
    host = HOSTS["llama"]
    model: Any = host.create()
    inputs = inputs_of(host)
    expected = run(add_lam(model, RANDOM), inputs)
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=1e-5)


def test_a_mask_of_another_implementation_is_refused() -> None:
    host = HOSTS["bert"]
    model: Any = add_lam(host.create(), RANDOM)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UnsupportedHostError, match=r"BertSelfAttention was given .*set_attn_implementation\('sdpa'\)"):
        run(model, inputs_of(host))


def test_masks_of_a_part_leave_the_layers_that_share_its_configuration() -> None:
    host = HOSTS["bart"]
    model: Any = host.create()
    inputs = inputs_of(host)
    plain = run(model, inputs)
    add_lam(model.model.encoder, RANDOM)
    assert not torch.allclose(run(model, inputs), plain)
    add_lam(model.model.decoder, RANDOM)
    remove_lam(model.model.encoder)
    assert len(masks(model)) == 4
    assert not torch.allclose(run(model, inputs), plain)
    remove_lam(model.model.decoder)
    assert torch.equal(run(model, inputs), plain)


@pytest.mark.parametrize("name", [*FEW, "vit", "clip", "t5"])
def test_the_attention_implementation_is_set_in_all_parts_of_a_masked_model(name: str) -> None:
    host = HOSTS[name]
    plain: Any = host.create()
    model: Any = add_lam(copy.deepcopy(plain), RANDOM)
    inputs = inputs_of(host)
    expected = run(model, inputs)
    for each in (plain, model):
        each.set_attn_implementation("eager")
    parts = zip(plain.modules(), remove_lam(copy.deepcopy(model)).modules(), strict=True)
    for theirs, ours in parts:
        if hasattr(theirs, "config"):
            assert ours.config._attn_implementation == theirs.config._attn_implementation == "eager"
    torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=1e-5)


def test_captured_records_have_masks_and_attention_of_every_layer() -> None:
    host = HOSTS["llama"]
    model, inputs = add_lam(host.create(), RANDOM), inputs_of(host)
    expected = run(model, inputs)
    with capture_masks(model) as records:
        torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=1e-5)
    assert list(records) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    for record in records.values():
        assert record.mask.dense().shape == record.attention.shape == (2, 4, 6, 6)
        assert not record.attention.triu(1).any()


def test_records_of_windows_have_the_attention_of_all_tokens() -> None:
    host = HOSTS["qwen2_5_vl"]
    model, inputs = add_lam(host.create(), RANDOM), inputs_of(host)
    with capture_masks(model) as records:
        run(model, inputs)
    record = records["model.visual.blocks.0.attn"]
    assert record.mask.dense().shape == record.attention.shape == (1, 2, 16, 16)
    torch.testing.assert_close(record.attention.sum(-1), torch.ones(1, 2, 16))
    assert not record.attention[0, 0, 0, 4:].any()


def test_continuous_batching_is_refused() -> None:
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    model: Any = add_lam(HOSTS["llama"].create())
    cache = PagedAttentionCache.__new__(PagedAttentionCache)  # its constructor needs a GPU
    with pytest.raises(UnsupportedHostError, match=r"continuous batching; call model\.generate"):
        model.model.layers[0].self_attn(torch.randn(1, 2, 16), cache=cache)


def test_eager_models_return_their_attention_weights() -> None:
    host = HOSTS["bert"]
    outputs = add_lam(host.create("eager"), RANDOM)(**inputs_of(host), output_attentions=True)
    assert [each.shape for each in outputs.attentions] == [(2, 2, 6, 6)] * 2
    assert not outputs.attentions[0][0, :, :, 4:].any()


@pytest.mark.parametrize("hidden", [None, -1e4, -1e9, torch.finfo(torch.float32).min])
def test_position_keys_skip_padding(hidden: float | None) -> None:
    model = add_lam(HOSTS["bert"].create(), LamConfig(keys="position", max_length=4, init="paper"))
    ids, padding = words()["input_ids"][:1], torch.tensor([[1, 1, 1, 1, 0, 0]])
    if hidden is not None:  # a mask of one's own, in place of the one that the model makes
        padding = torch.zeros(1, 1, 6, 6).masked_fill(padding == 0, hidden)
    found = run(model, {"input_ids": ids, "attention_mask": padding})[:, :4]
    torch.testing.assert_close(found, run(model, {"input_ids": ids[:, :4]}), atol=1e-5, rtol=1e-5)


def test_position_keys_of_cross_attention_skip_the_padding_of_the_encoder() -> None:
    torch.manual_seed(0)
    settings = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "add_cross_attention": True}
    model = transformers.GPT2Model(transformers.GPT2Config(**settings)).eval()
    add_lam(model, LamConfig(keys="position", max_length=6, init="paper"))
    ids, states = words()["input_ids"], torch.randn(2, 5, 16)
    seen = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    padded = run(
        model,
        {"input_ids": ids, "attention_mask": torch.ones(2, 6)},
        encoder_hidden_states=states,
        encoder_attention_mask=seen,
        use_cache=False,
    )
    for row in range(2):
        trimmed = states[row : row + 1, seen[row] == 1]
        alone = run(model, {"input_ids": ids[row : row + 1]}, encoder_hidden_states=trimmed, use_cache=False)
        torch.testing.assert_close(padded[row], alone[0], atol=1e-5, rtol=1e-5)


def test_position_keys_and_a_cache_are_refused_together() -> None:
    host = HOSTS["llama"]
    model = add_lam(host.create(), LamConfig(keys="position", max_length=6, init="paper"))
    assert run(model, inputs_of(host), use_cache=False).isfinite().all()
    with pytest.raises(ConfigError, match=r"use_cache=False, or use keys='content'"):
        run(model, inputs_of(host))


def test_shifted_windows_share_no_mask() -> None:
    with pytest.raises(ConfigError, match=r"layers.0.blocks.0.attention can't share a mask.*use layers='multi'"):
        add_lam(HOSTS["swin"].create(), LamConfig(layers="single"))


@pytest.mark.parametrize(
    ("name", "merged", "fused"),
    [
        ("beit", r"in layers: .*BeitModel adds a bias for each pair of positions", "a bias for each pair of positions"),
        ("bert", r"such blocks are in no part of transformers\.", "the host computes queries, keys and values, and"),
    ],
)
def test_tokens_of_other_models_are_not_merged_and_have_no_fused_form(name: str, merged: str, fused: str) -> None:
    model = add_lam(HOSTS[name].create(), LamConfig(op="add"))
    with pytest.raises(UnsupportedHostError, match=merged):
        lamzoo.merge_tokens(model, keep=0.5)
    with pytest.raises(UnsupportedHostError, match=fused):
        lamzoo.fuse(model)


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "dinov3", "clip", "siglip", "siglip2", "videomae", "vivit"])
def test_fused_models_compute_the_same(name: str) -> None:
    host = HOSTS[name]
    model, inputs = add_lam(host.create(), LamConfig(op="add", rank=3, init="paper")), inputs_of(host)
    inputs.pop("attention_mask", None)  # with which layers don't take the fused form
    with torch.no_grad():
        expected = run(model, inputs)
        lamzoo.fuse(model)
        layers: list[Any] = [module for module in model.modules() if getattr(module, "is_fused", False)]
        assert len(layers) == host.layers
        calls: list[int] = []
        for layer in layers:
            layer.fused.register_forward_hook(lambda *_: calls.append(1))
        with pinned_form(True):
            torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=1e-5)
    # The text tower of CLIP is causal, and the images of SigLIP 2 are padded.
    assert len(calls) == host.layers // (2 if name in ("clip", "siglip2") else 1)


@pytest.mark.parametrize("name", ["vit", "clip", "dinov3"])
def test_position_keys_know_the_patch_grid(name: str) -> None:
    model: Any = HOSTS[name].create()
    tower = model.vision_model if name == "clip" else model
    add_lam(tower, LamConfig(keys="position", init="paper"))
    tables = [module for module in tower.modules() if isinstance(module, PositionTable)]
    prefix = 3 if name == "dinov3" else 1
    assert [(table.weight.shape[1], table.grid) for table in tables] == [(prefix + 4, (2, 2))] * 2
    seen: list[Any] = []
    for table in tables:
        table.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    tower(torch.randn(1, 3, 16, 32), **({} if name == "dinov3" else {"interpolate_pos_encoding": True}))
    assert seen == [(prefix + 8, (2, 4))] * 2


@pytest.mark.parametrize("name", ["Dinov2", "Dinov2WithRegisters", "DINOv3ViT"])
def test_backbones_have_the_position_tables_of_their_models(name: str) -> None:
    config = getattr(transformers, f"{name}Config")(**SMALL, image_size=16, patch_size=8)
    backbone, model = (
        add_lam(getattr(transformers, name + kind)(config).eval(), LamConfig(keys="position", init="paper"))
        for kind in ("Backbone", "Model")
    )
    backbone.load_state_dict(model.state_dict())
    for images in (torch.randn(1, 3, 16, 16), torch.randn(1, 3, 16, 32)):
        (maps,) = backbone(images).feature_maps
        tokens = model(images).last_hidden_state[:, -maps[0, 0].numel() :]
        torch.testing.assert_close(maps.flatten(2).mT, tokens)
    for reduce in (lamzoo.merge_tokens, lamzoo.prune_tokens):
        with pytest.raises(UnsupportedHostError, match="Backbone returns feature maps, in which every token"):
            reduce(backbone, keep=0.5)


_MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
_REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Gemma2Model": ("Gemma2Config", LLAMA, r"layers.0.self_attn \(.*\) can't .*caps its scores \(softcap\)"),
    "Gemma3nTextModel": (
        "Gemma3nTextConfig",
        LLAMA
        | {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "laurel_rank": 4, "hidden_size_per_layer_input": 4}
        | {"vocab_size_per_layer_input": 40, "intermediate_size": [24] * 4, "activation_sparsity_pattern": [0.0] * 4}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2},
        r"layers.2.self_attn \(.*Gemma3nTextAttention\) can't .*takes the keys of an earlier layer",
    ),
    "GptOssModel": ("GptOssConfig", LLAMA | {"num_local_experts": 2}, "has attention sinks"),
    "DeepseekV3Model": ("DeepseekV3Config", TEXT | _MLA | {"n_routed_experts": 8}, "caches compressed keys"),
    "DeepseekV32Model": ("DeepseekV32Config", TEXT | _MLA | {"n_routed_experts": 8}, "a sparse selection of keys"),
    "DebertaV2Model": ("DebertaV2Config", TEXT, r"DisentangledSelfAttention\) computes its attention itself"),
    "BertModel": (
        "BertConfig",
        TEXT | {"attn_implementation": "flex_attention"},
        r"uses the attention implementation 'flex_attention'.*call set_attn_implementation\('sdpa'\)",
    ),
}


@pytest.mark.parametrize("name", _REFUSED)
def test_models_with_other_attention_are_refused_by_name(name: str) -> None:
    config, settings, message = _REFUSED[name]
    model = getattr(transformers, name)(getattr(transformers, config)(**settings))
    before = list(model.state_dict())
    with pytest.raises(UnsupportedHostError, match=message):
        add_lam(model)
    assert list(model.state_dict()) == before


def test_masks_are_captured_while_a_cache_is_read() -> None:
    model = add_lam(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)), LamConfig(init="paper")).eval()
    tokens = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad(), capture_masks(model) as masks:
        cache = model(tokens[:, :3], use_cache=True).past_key_values
        model(tokens[:, 3:], past_key_values=cache)
        cached = [record.importance for record in masks.values()]
        model(tokens)
    for step, record in zip(cached, masks.values(), strict=True):
        torch.testing.assert_close(step, record.mask.dense()[:, :, -1])  # of the last query


def test_a_quantised_layer_is_refused_by_name() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    for projection in model.model.layers[1].self_attn.children():
        if isinstance(projection, nn.Linear):  # as in 8 bits
            projection.weight = nn.Parameter(projection.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(UnsupportedHostError, match=r"layers.1.self_attn .*because it is quantised"):
        add_lam(model)


# Models that compute their attention themselves, with inputs and the number of attention layers.
_OWN: dict[str, tuple[Callable[[], Any], Callable[[], Inputs], int]] = {
    "ViltModel": (lambda: transformers.ViltConfig(**TEXT, image_size=16, patch_size=8), both, 2),
    "FlavaTextModel": (lambda: transformers.FlavaTextConfig(**TEXT), words, 2),
    "TimesformerModel": (
        lambda: transformers.TimesformerConfig(**SMALL, image_size=16, patch_size=8, num_frames=4),
        clips,
        4,
    ),
}


@pytest.mark.parametrize("name", _OWN)
def test_layers_with_attention_of_their_own_are_taken_over(name: str) -> None:
    config, make, layers = _OWN[name]
    torch.manual_seed(0)
    model: Any = getattr(transformers, name)(config()).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    inputs, keys, classes = make(), list(model.state_dict()), [type(module) for module in model.modules()]
    if "input_ids" in inputs:
        inputs["attention_mask"] = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])

    def seeded() -> Tensor:
        torch.manual_seed(2)  # ViLT draws the order of its patches
        return run(model, inputs)

    before = seeded()
    add_lam(model)
    torch.testing.assert_close(seeded(), before, atol=1e-5, rtol=1e-5)
    add_lam(remove_lam(model), RANDOM)
    assert len(masks(model)) == layers
    seen: list[tuple[Any, Tensor, Tensor]] = []
    for path in masks(model):
        model.get_submodule(path.removesuffix(".lam")).register_forward_hook(
            lambda module, args, output: seen.append((module, args[0], output[0]))
        )
    with capture_masks(model) as records:
        after = seeded()
    assert not torch.allclose(after, before, atol=1e-3)
    for (module, tokens, out), record in zip(seen, records.values(), strict=True):
        mask = module.lam.network(tokens, tokens)
        torch.testing.assert_close(mask.dense(), record.mask.dense())
        projected = module.qkv(tokens).chunk(3, -1) if hasattr(module, "qkv") else None
        query, key, value = projected or (module.query(tokens), module.key(tokens), module.value(tokens))
        query, key, value = (each.unflatten(-1, (2, 8)).transpose(1, 2) for each in (query, key, value))
        scores = query @ key.mT / 8**0.5 + mask.dense()
        if "attention_mask" in inputs:
            scores = scores.masked_fill(record.attention == 0, -torch.inf)
            hidden = (record.attention == 0)[0, 0, 0]
            assert hidden[4:6].all() and not hidden[:4].any()
        expected = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    after.square().sum().backward()
    assert all(each.grad is not None for lam in masks(model).values() for each in lam.parameters())
    for path in masks(model):
        model.get_submodule(path.removesuffix(".lam"))._forward_hooks.clear()
    remove_lam(model)
    assert torch.equal(seeded(), before)
    assert (list(model.state_dict()), [type(module) for module in model.modules()]) == (keys, classes)


def test_without_a_cap_of_its_scores_gemma_is_served() -> None:
    config = transformers.Gemma2Config(**LLAMA, attn_logit_softcapping=None)
    assert len(masks(add_lam(transformers.Gemma2Model(config)))) == 2


def test_a_pooling_head_has_no_mask() -> None:
    model: Any = HOSTS["siglip"].create()
    add_lam(model)
    assert type(model.vision_model.head.attention) is nn.MultiheadAttention
    with pytest.raises(UnsupportedHostError, match="no attention layer that can carry a mask"):
        add_lam(remove_lam(model).vision_model.head)


def test_layers_of_torch_in_a_model_of_transformers_are_left_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    add_lam(HOSTS["bridgetower"].create())
    (record,) = caplog.records
    assert record.getMessage().startswith("vision_model.visual.transformer.resblocks.0.attn keeps")


def test_towers_of_two_libraries_are_masked_together() -> None:
    tower = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=2)
    model = nn.ModuleDict({"visual": tower, "text": HOSTS["bert"].create()})
    assert list(masks(add_lam(model))) == [
        "visual.blocks.0.attn.lam",
        "text.encoder.layer.0.attention.self.lam",
        "text.encoder.layer.1.attention.self.lam",
    ]


def test_a_timm_model_in_the_wrapper_of_transformers_is_served() -> None:
    settings = {"img_size": 32, "depth": 1}
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=settings)
    model = transformers.TimmWrapperModel(config).eval()
    x = torch.randn(1, 3, 32, 32)
    expected = model(x).last_hidden_state
    torch.testing.assert_close(add_lam(model)(x).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    assert list(masks(model)) == ["timm_model.blocks.0.attn.lam"]


@pytest.mark.slow
def test_a_frozen_classifier_learns_through_its_masks() -> None:
    """The label is whether a sequence contains a certain word; all but the masks and the head is frozen."""

    def batch() -> tuple[Tensor, Tensor]:
        ids, labels = torch.randint(4, 39, (64, 12)), torch.rand(64) < 0.5
        ids[labels, torch.randint(1, 12, (int(labels.sum()),))] = 39
        return ids, labels.long()

    def accuracy(build: Callable[[nn.Module], nn.Module]) -> float:
        model = build(HOSTS["bert"].create())
        head = nn.Linear(16, 2)
        trained = [*head.parameters(), *(each for lam in masks(model).values() for each in lam.parameters())]
        optimizer = torch.optim.AdamW(trained, lr=0.02)
        for _ in range(300):
            ids, labels = batch()
            loss = nn.functional.cross_entropy(head(model(ids).last_hidden_state[:, 0]), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            hits = [
                head(model(ids).last_hidden_state[:, 0]).argmax(-1) == labels
                for ids, labels in (batch() for _ in range(8))
            ]
        return torch.cat(hits).float().mean().item()

    assert accuracy(add_lam) > 0.9 > accuracy(lambda model: model) + 0.2
