"""What add_lam promises of timm's models with stages, pooled keys or convolutions."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.testing import assert_close

from lamzoo.adapters import add_lam, capture_masks, remove_lam
from lamzoo.errors import ConfigError, UnsupportedHostError
from lamzoo.lam import Lam, LamConfig
from tests.adapters.staged_hosts import STAGED, StagedHost


def params(**flags: bool) -> list[Any]:
    chosen = [host for host in STAGED.values() if all(getattr(host, name) is value for name, value in flags.items())]
    return [pytest.param(host, id=host.name, marks=() if host.quick else pytest.mark.slow) for host in chosen]


hosts = pytest.mark.parametrize("host", params())


def configs_for(host: StagedHost) -> list[LamConfig]:
    return [
        LamConfig(layers=layers, keys=keys, op=op, heads=heads, sign=sign, rank=3)
        for layers, keys, (op, heads, sign) in itertools.product(
            ("multi", "single") if host.sharing else ("multi",),
            ("content", "position") if host.positions else ("content",),
            (("add", "per-head", "free"), ("mul", "shared", "free"), ("mul", "per-head", "positive")),
        )
    ]


def masks_of(model: nn.Module) -> dict[str, Lam]:
    return {path: module for path, module in model.named_modules() if isinstance(module, Lam)}


@hosts
def test_a_fresh_mask_changes_nothing_and_every_layer_learns(host: StagedHost) -> None:
    plain, x = host.create().eval(), host.images()
    masked = add_lam(copy.deepcopy(plain), LamConfig(keys="position" if host.positions else "content"))
    out = masked(x)
    with torch.no_grad():
        assert_close(out, plain(x), rtol=1e-5, atol=1e-5)
    assert [key for key in masked.state_dict() if ".lam." not in key] == list(plain.state_dict())
    out.square().sum().backward()
    for path, lam in masks_of(masked).items():
        last = lam.network.table if host.positions else lam.network.key[-1]
        assert last.weight.grad.any(), path
    assert [type(module) for module in remove_lam(masked).modules()] == [type(module) for module in plain.modules()]


@pytest.mark.slow
@hosts
def test_identity_lam_keeps_outputs_in_every_configuration(host: StagedHost) -> None:
    plain, x = host.create().eval(), host.images()
    for config in configs_for(host):
        masked = add_lam(copy.deepcopy(plain), config)
        with torch.no_grad():
            assert_close(masked(x), plain(x), rtol=1e-5, atol=1e-5, msg=str(config))
            with capture_masks(masked) as masks:
                assert_close(masked(x), plain(x), rtol=1e-5, atol=1e-5, msg=str(config))
        assert sorted(masks) == sorted(path.removesuffix(".lam") for path in masks_of(masked))


@pytest.mark.slow
@hosts
def test_every_mask_changes_the_outputs_and_all_its_parameters_get_gradients(host: StagedHost) -> None:
    plain, x = host.create().eval(), host.images()
    for config in (config for config in configs_for(host) if config.sign == "free"):
        masked = add_lam(copy.deepcopy(plain), dataclasses.replace(config, init="paper", rank=8))
        out = masked(x)
        with torch.no_grad():
            assert (out - plain(x)).abs().max() > 1e-6, config
        out.square().sum().backward()
        for name, parameter in masked.named_parameters():
            if ".lam." in name:
                assert parameter.grad is not None and parameter.grad.isfinite().all(), name
                assert parameter.grad.any() or "bias" in name, (name, config)


@pytest.mark.slow
@hosts
def test_identity_lam_lets_the_host_train_as_before(host: StagedHost) -> None:
    # NesT has its heads in another order, and TNT of timm itself can't train so: its dropout works in place.
    plain = dropping(host.create(), 0.0 if host.name in ("nest_tiny", "tnt_s_patch16_224") else 0.3).train()
    masked, x = add_lam(copy.deepcopy(plain)), host.images(4)
    grads = []
    for model in (plain, masked):
        with torch.random.fork_rng(devices=[]):  # the same dropout
            model(x).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if ".lam." not in name})
    # Relative to the largest one: batch normalisation makes the gradients of some biases before it zero.
    largest = max(grad.abs().max().item() for grad in grads[0].values() if grad is not None)
    for name, grad in grads[0].items():
        assert (grad is None) == (grads[1][name] is None), name
        if grad is not None:
            assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-5 * largest, msg=name)


def dropping(model: nn.Module, rate: float) -> nn.Module:
    """Sets the dropout of attention weights in a timm model."""
    for path, module in model.named_modules():
        if path.endswith("attn_drop") and isinstance(module, nn.Dropout):
            module.p = rate
    return model


# Each attention class with dropout of its weights; NesT has its heads in another order.
_DROPPING = [
    "cait_xxs24_224", "pvt_v2_b0", "convit_tiny", "mobilenetv4_hybrid_medium", "crossvit_9_240", "fastvit_sa12",
    "iformer_t", "twins_svt_small", "gcvit_xxtiny", "caformer_s18", "gemma4_vit_167m", "tnt_s_patch16_224",
    "visformer_tiny", "nextvit_small",
]  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=pytest.mark.slow if index > 3 else ()) for index, each in enumerate(_DROPPING)]
)
def test_the_same_attention_weights_drop_as_in_the_host(name: str) -> None:
    plain, x = dropping(STAGED[name].create(), 0.3).train(), STAGED[name].images()
    outputs = []
    for model in (plain, add_lam(copy.deepcopy(plain)), dropping(add_lam(copy.deepcopy(plain)), 0.0)):
        torch.manual_seed(0)
        with torch.no_grad():
            outputs.append(model(x))
    assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    assert (outputs[2] - outputs[0]).abs().max() > 1e-3


def test_where_heads_have_another_order_as_many_weights_drop_as_in_the_host() -> None:
    torch.manual_seed(0)
    plain = dropping(STAGED["nest_tiny"].create(), 0.3).train()
    masked: Any = add_lam(copy.deepcopy(plain))
    x = torch.randn(1, 1, 5, 16).expand(4000, -1, -1, -1).contiguous()
    with torch.no_grad():
        theirs, ours = (model.get_submodule("levels.1.transformer_encoder.0.attn")(x) for model in (plain, masked))
    deviations = (theirs.var(0) + ours.var(0)).sqrt() / len(x) ** 0.5
    assert ((theirs.mean(0) - ours.mean(0)).abs() < 5 * deviations).all()
    assert_close(ours.std(0).mean(), theirs.std(0).mean(), rtol=0.03, atol=0)
    assert ours.std(0).min() > 0


@pytest.mark.slow
@pytest.mark.parametrize("host", params(checkpoints=True))
def test_gradient_checkpointing_keeps_the_gradients_of_masks(host: StagedHost) -> None:
    layers = "single" if host.sharing else "multi"
    model, x = add_lam(host.create(), LamConfig(layers=layers, init="paper")).eval(), host.images()
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if ".lam." in n), strict=True)
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    model.set_grad_checkpointing(True)
    found = torch.autograd.grad(model(x).square().sum(), parameters)
    for name, ours, theirs in zip(names, found, expected, strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("host", params(other_sizes=True))
def test_other_image_sizes_keep_outputs(host: StagedHost) -> None:
    plain = host.create().eval()
    x = torch.randn(1, 3, host.size * 3 // 2, host.size)
    for keys in ("content", "position") if host.positions else ("content",):
        with torch.no_grad():
            assert_close(add_lam(copy.deepcopy(plain), LamConfig(keys=keys))(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@hosts
def test_features_and_intermediates_stay_the_same(host: StagedHost) -> None:
    plain, x = host.create().eval(), host.images()
    masked = add_lam(copy.deepcopy(plain))
    with torch.no_grad():
        assert_close(masked.forward_features(x), plain.forward_features(x), rtol=1e-5, atol=1e-5)
        ours, theirs = masked.forward_intermediates(x, indices=1), plain.forward_intermediates(x, indices=1)
        assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@hosts
def test_masked_models_compile_in_one_graph_and_export(host: StagedHost) -> None:
    model, x = add_lam(host.create().eval(), LamConfig(init="paper", op="mul")), host.images()
    with torch.no_grad():
        expected = model(x)
        torch._dynamo.reset()
        assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected, rtol=1e-4, atol=1e-5)
        exported = torch.export.export(model, (x,), strict=False)
        assert_close(exported.module()(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "path", "queries", "keys"),
    [
        ("pvt_v2_b0", "stages.0.blocks.0.attn", 64, 16),
        ("twins_svt_small", "blocks.0.1.attn", 64, 16),
        ("mvitv2_tiny", "stages.0.blocks.0.attn", 64, 4),
        ("hiera_tiny_224", "blocks.1.attn", 16, 64),
        ("mobilenetv4_hybrid_medium", "blocks.1.0.attn", 64, 16),
        ("cait_xxs24_224", "blocks_token_only.0.attn", 1, 17),
        ("halonet26t", "stages.1.1.self_attn", 16, 36),
    ],
)
def test_factors_are_of_the_tokens_that_queries_and_keys_are_made_of(
    name: str, path: str, queries: int, keys: int
) -> None:
    model = add_lam(STAGED[name].create().eval(), LamConfig(init="paper"))
    with torch.no_grad(), capture_masks(model) as masks:
        model(STAGED[name].images(1))
    record = masks[path]
    assert (record.mask.left.shape[2], record.mask.right.shape[2]) == (queries, keys)
    assert record.attention.shape[-2:] == (queries, keys)


@pytest.mark.parametrize("name", ["pvt_v2_b0", "hiera_tiny_224", "mobilenetv4_hybrid_medium"])
def test_position_keys_are_refused_where_the_number_of_keys_may_change(name: str) -> None:
    with pytest.raises(ConfigError, match=r"its number of keys changes .*; use keys='content'"):
        add_lam(STAGED[name].create(), LamConfig(keys="position"))


def test_windows_of_several_sizes_share_no_mask() -> None:
    with pytest.raises(ConfigError, match=r"windows of several sizes; use layers='multi'"):
        add_lam(STAGED["sam2_hiera_tiny"].create(), LamConfig(layers="single"))


@pytest.mark.parametrize(
    ("name", "layer", "reason"),
    [
        pytest.param("xcit_nano_12_p16_224", "XCA", "over channels", marks=pytest.mark.slow),
        pytest.param("davit_tiny", "ChannelAttention", "over channels", marks=pytest.mark.slow),  # beside windows
        pytest.param("volo_d1_224", "OutlookAttention", "without keys", marks=pytest.mark.slow),
        pytest.param("lambda_resnet26t", "LambdaLayer", "linear attention", marks=pytest.mark.slow),
        pytest.param("swiftformer_xs", "EfficientAdditiveAttention", "linear attention", marks=pytest.mark.slow),
        ("davit_tiny", "ChannelAttention", "over channels"),
        ("coat_lite_tiny", "FactorAttnConvRelPosEnc", "linear attention"),
        ("mobilevitv2_050", "LinearSelfAttention", "linear attention"),
        ("edgenext_xx_small", "CrossCovarianceAttn", "over channels"),
        ("efficientvit_b0", "LiteMLA", "linear attention"),
    ],
)
def test_what_is_no_softmax_over_tokens_is_refused_with_that_reason(name: str, layer: str, reason: str) -> None:
    with pytest.raises(UnsupportedHostError, match=rf"\.{layer}\) can't carry .* softmax over tokens: .*{reason}"):
        add_lam(timm.create_model(name, device="meta"))
