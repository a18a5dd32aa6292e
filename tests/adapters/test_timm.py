"""What add_lam promises of timm's transformers: the same outputs at first, the same keys, and nothing left unmasked."""

import copy
import itertools
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.testing import assert_close

from lamzoo.adapters import add_lam, capture_masks, remove_lam
from lamzoo.adapters.timm import TimmAdapter
from lamzoo.errors import ConfigError, MaskShapeError, UnsupportedHostError
from lamzoo.lam import Lam, LamConfig
from lamzoo.registry.factory import create_model
from tests.adapters.timm_hosts import FEW, HOSTS, Host, layer_params, params

CONFIGS = [
    LamConfig(layers=layers, keys=keys, op=op, heads=heads, rank=3)
    for layers, keys, op, heads in itertools.product(
        ("multi", "single"), ("content", "position"), ("mul", "add"), ("shared", "per-head")
    )
] + [LamConfig(op="mul", sign="positive"), LamConfig(op="mul", sign="positive", keys="position", hidden=(8,))]

hosts = pytest.mark.parametrize("host", params())
host_layers = pytest.mark.parametrize(("host", "layers"), layer_params())
few_hosts = pytest.mark.parametrize("host", [HOSTS[name] for name in FEW], ids=FEW)
layers = pytest.mark.parametrize("layers", ["multi", "single"])


def configs_for(host: Host) -> list[LamConfig]:
    """All configurations for one host of each kind, some that have every value between them for the others."""
    configs = CONFIGS if host.name in FEW else [CONFIGS[index] for index in (1, 6, 8, 15, 16)]
    configs = [config for config in configs if config.layers in host.kinds_of_layers()]
    return [config for config in configs if host.positions or config.keys == "content"]


def paper_lam(host: Host, layers: str = "multi", **fields: object) -> LamConfig:
    """A configuration that changes the outputs, with position keys where the host has them."""
    return LamConfig(layers=layers, keys="position" if host.positions else "content", init="paper", rank=3, **fields)


def attention_paths(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, tuple(TimmAdapter.takeovers))]


def without_fused(model: nn.Module) -> nn.Module:
    for path in attention_paths(model):
        model.get_submodule(path).fused_attn = False
    return model


@hosts
def test_identity_lam_keeps_outputs_to_1e5(host: Host) -> None:
    plain, x = host.create().eval(), host.images()
    for config in configs_for(host):
        masked = add_lam(copy.deepcopy(plain), config)
        with torch.no_grad():
            assert_close(masked(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("host", params([host for host in HOSTS.values() if host.bitwise]))
def test_identity_lam_keeps_outputs_bitwise_where_timm_does_not_fuse(host: Host) -> None:
    plain, x = without_fused(host.create().eval()), host.images()
    for config in configs_for(host):
        if config.sign == "free":
            with torch.no_grad():
                assert torch.equal(add_lam(copy.deepcopy(plain), config)(x), plain(x)), config


@hosts
def test_every_attention_of_the_host_is_masked_and_every_mask_changes_the_outputs(host: Host) -> None:
    plain, x = host.create().eval(), host.images()
    paths = attention_paths(plain)
    for layers in host.kinds_of_layers():
        masked = add_lam(copy.deepcopy(plain), LamConfig(layers=layers, init="paper", op="add"))
        with torch.no_grad(), capture_masks(masked) as masks:
            assert (masked(x) - plain(x)).abs().max() > 1e-5
        assert sorted(masks) == sorted(paths)
    masked, expected = add_lam(plain, LamConfig(op="add")), plain(x)
    for path in paths:
        last = masked.get_submodule(path).lam.network.key[-1]
        with torch.no_grad():
            last.weight.normal_()
            assert (masked(x) - expected).abs().max() > 1e-5, path
            last.weight.zero_()


@hosts
def test_host_keys_and_weights_stay_as_they_are(host: Host) -> None:
    plain = host.create()
    masked = add_lam(copy.deepcopy(plain), LamConfig(keys="position" if host.positions else "content"))
    state = masked.state_dict()
    assert [key for key in state if ".lam." not in key] == list(plain.state_dict())
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    assert masked.lam_config.rank == 8


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("beit_base_patch16_224", {}),
        ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
        ("beit_base_patch16_224", {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": True}),
        ("vit_srelpos_small_patch16_224", {}),
        ("vit_srelpos_small_patch16_224", {"shared_rel_pos": False}),
        ("vit_srelpos_small_patch16_224", {"shared_rel_pos": False, "rel_pos_type": "bias", "class_token": True}),
    ],
)
def test_relative_position_biases_act_and_learn_as_before(name: str, kwargs: dict[str, Any]) -> None:
    plain, x = HOSTS[name].create(**kwargs).eval(), HOSTS[name].images()
    without = copy.deepcopy(plain)
    biases = {n: p for n, p in without.named_parameters() if "rel" in n and "pos" in n}
    with torch.no_grad():
        for bias in biases.values():
            bias.zero_()
        assert (without(x) - plain(x)).abs().max() > 1e-4
    masked = add_lam(copy.deepcopy(plain))
    assert_close(masked(x), plain(x), rtol=1e-5, atol=1e-5)
    ours, theirs = (gradients(model, model(x).square().sum()) for model in (masked, plain))
    for bias in biases:
        assert_close(ours[bias], theirs[bias], rtol=1e-4, atol=1e-5, msg=bias)
        assert theirs[bias].any()


@host_layers
def test_every_mask_parameter_gets_a_gradient(host: Host, layers: str) -> None:
    model = add_lam(host.create(), paper_lam(host, layers, heads="per-head")).train()
    model(host.images()).square().sum().backward()
    for name, parameter in model.named_parameters():
        if ".lam." in name:
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@hosts
def test_identity_lam_lets_the_host_train_as_before(host: Host) -> None:
    plain = without_fused(host.create(**({} if host.attn_drop is None else {host.attn_drop: 0.3}))).train()
    masked, x = add_lam(copy.deepcopy(plain)), host.images()
    grads = []
    for model in (plain, masked):
        with torch.random.fork_rng(devices=[]):  # the same dropout
            model(x).square().sum().backward()
        host_parameters = [(name, p) for name, p in model.named_parameters() if ".lam." not in name]
        grads.append({name: p.grad for name, p in host_parameters if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        largest = max(1.0, grad.abs().max().item())
        assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize(("host", "layers"), layer_params([host for host in HOSTS.values() if host.checkpointing]))
def test_gradient_checkpointing_keeps_outputs_and_gradients(host: Host, layers: str) -> None:
    model, x = add_lam(host.create(), paper_lam(host, layers)).eval(), host.images()
    output = model(x)
    expected = gradients(model, output.square().sum())
    model.set_grad_checkpointing(True)
    again = model(x)
    assert_close(again, output)
    found = gradients(model, again.square().sum())
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert_close(grad, expected[name], msg=name)


@few_hosts
@layers
def test_gradient_checkpointing_finds_the_right_pass_among_several(host: Host, layers: str) -> None:
    kwargs = {} if "naflex" in host.name else {"dynamic_img_size": True}
    model = add_lam(host.create(**kwargs), paper_lam(host, layers)).eval()
    size = host.size
    views = [torch.randn(2, 3, size, size), torch.randn(2, 3, size // 2, size * 2), torch.randn(2, 3, size, size)]
    expected = gradients(model, sum(model(view).square().sum() for view in views))
    model.set_grad_checkpointing(True)
    found = gradients(model, sum(model(view).square().sum() for view in views))
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert_close(grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_reentrant_checkpointing_of_a_shared_mask_is_an_error_not_a_wrong_gradient() -> None:
    host = HOSTS["vit_tiny_patch16_224"]
    model = add_lam(host.create(), LamConfig(layers="single"))
    timm.layers.set_reentrant_ckpt(True)
    try:
        model.set_grad_checkpointing(True)
        loss = model(host.images()).sum()
        with pytest.raises(ConfigError, match="layers='multi'"):
            loss.backward()
    finally:
        timm.layers.set_reentrant_ckpt(False)


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: grad for name, grad in zip(names, grads, strict=True) if grad is not None}


# Of those with a grid of tokens.
GRIDS = [host for host in HOSTS.values() if host.positions]


@pytest.mark.parametrize("host", params([host for host in GRIDS if host.any_size is not None]))
def test_images_of_another_size_keep_outputs_with_every_kind_of_keys(host: Host) -> None:
    plain = host.create(**host.any_size).eval()
    x = torch.randn(1, 3, host.size * 2, host.size)
    for keys in ("content", "position"):
        with torch.no_grad():
            assert_close(add_lam(copy.deepcopy(plain), LamConfig(keys=keys))(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("host", params([host for host in GRIDS if host.resizes]))
def test_set_input_size_keeps_outputs_with_every_kind_of_keys(host: Host) -> None:
    size = (host.size * 2, host.size)
    plain, x = host.create().eval(), torch.randn(1, 3, *size)
    masked = [add_lam(copy.deepcopy(plain), LamConfig(keys=keys)) for keys in ("content", "position")]
    plain.set_input_size(img_size=size)
    for model in masked:
        model.set_input_size(img_size=size)
        with torch.no_grad():
            assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)


@few_hosts
@layers
def test_position_table_follows_the_patch_grid(host: Host, layers: str) -> None:
    if not host.positions:
        pytest.skip("has no fixed positions")
    model = add_lam(host.create(dynamic_img_size=True).eval(), LamConfig(layers=layers, keys="position"))
    rows = torch.arange(16.0).view(4, 4)[:, :1].expand(4, 4)  # each patch's row
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Lam) and module.network is not None:
                module.network.table.bias[0, -16:] = rows.flatten()
        with capture_masks(model) as masks:
            model(torch.randn(1, 3, host.size * 2, host.size // 2))  # 8 x 2 patches: as many, in another grid
    for record in masks.values():
        grid = record.importance[0, 0, -16:].view(8, 2)
        assert_close(grid[:, 0], grid[:, 1])
        assert (grid.diff(dim=0) > 0).all()


@pytest.mark.parametrize("size", [(30, 30), (61, 47)])
@pytest.mark.parametrize("padded", [False, True])
def test_images_that_a_stem_does_not_divide_keep_their_outputs(size: tuple[int, int], padded: bool) -> None:
    options = {"dynamic_img_size": True, "dynamic_img_pad": padded}
    for plain in (HOSTS["vit_tiny_r_s16_p8_224"].create(**options), create_model("vit_micro", **options)):
        masked, x = add_lam(copy.deepcopy(plain.eval()), LamConfig(keys="position")), torch.randn(1, 3, *size)
        with torch.no_grad():
            assert_close(masked(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("host", "layers"), layer_params([h for h in HOSTS.values() if "mobilevit" not in h.name]))
def test_features_and_intermediates_stay_the_same(host: Host, layers: str) -> None:
    plain, x = host.create().eval(), host.images()
    masked = add_lam(copy.deepcopy(plain), LamConfig(layers=layers))
    with torch.no_grad():
        assert_close(masked.forward_features(x), plain.forward_features(x), rtol=1e-5, atol=1e-5)
        ours, theirs = masked.forward_intermediates(x, indices=[0]), plain.forward_intermediates(x, indices=[0])
        assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@host_layers
def test_features_only_models_stay_the_same(host: Host, layers: str) -> None:
    kwargs = {} if "mobilevit" in host.name else {"out_indices": (0, 1)}
    plain, x = host.create(features_only=True, **kwargs).eval(), host.images()
    masked = add_lam(copy.deepcopy(plain), LamConfig(layers=layers, keys="position" if host.positions else "content"))
    with torch.no_grad():
        assert_close(masked(x), plain(x), rtol=1e-5, atol=1e-5)


@hosts
def test_reset_classifier_works(host: Host) -> None:
    model = add_lam(host.create()).eval()
    model.reset_classifier(3)
    assert model(host.images()).shape == (2, 3)


def naflex_batch(batch: int = 2, patches: int = 6) -> dict[str, torch.Tensor]:
    coord = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij"), dim=-1).view(6, 2)
    valid = torch.ones(batch, patches, dtype=torch.bool)
    valid[1, 4:] = False
    return {
        "patches": torch.randn(batch, patches, 8 * 8 * 3),
        "patch_coord": coord.expand(batch, -1, -1).clone(),
        "patch_valid": valid,
    }


@pytest.mark.parametrize("name", ["naflexvit_base_patch16_gap", "naflexvit_base_patch16_siglip"])
def test_naflex_batches_with_padding_keep_outputs(name: str) -> None:
    plain, batch = HOSTS[name].create().eval(), naflex_batch()
    for layers in ("multi", "single"):
        with torch.no_grad():
            masked = add_lam(copy.deepcopy(plain), LamConfig(layers=layers))
            assert_close(masked(batch), plain(batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["naflexvit_base_patch16_gap", "naflexvit_base_patch16_siglip"])
def test_naflex_padding_reaches_no_output(name: str) -> None:
    model, batch = add_lam(HOSTS[name].create().eval(), LamConfig(init="paper")), naflex_batch()
    with torch.no_grad():
        before = model(batch)
        batch["patches"][1, 4:] = 100.0
        assert_close(model(batch), before)


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "vit_small_patch16_rope_224",
        "eva02_tiny_patch14_224",
        "vit_base_patch16_xp_224",
        "vit_dwee_patch16_reg1_gap_256",
    ],
)
def test_attention_masks_mean_what_they_mean_in_timm(name: str) -> None:
    host = HOSTS[name]
    plain, x = host.create().eval(), host.images()
    masked = add_lam(copy.deepcopy(plain))
    tokens = plain.forward_features(x).shape[1]
    allowed = (torch.rand(2, 1, tokens, tokens) > 0.3) | torch.eye(tokens, dtype=torch.bool)
    bias = torch.randn(1, host.kwargs["num_heads"], tokens, tokens)
    with torch.no_grad():
        for kwargs in ({"attn_mask": allowed}, {"attn_mask": bias}, {"is_causal": True}):
            ours, theirs = masked.forward_features(x, **kwargs), plain.forward_features(x, **kwargs)
            assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    with pytest.raises(MaskShapeError, match="one mask per head"):
        masked.forward_features(x, attn_mask=allowed[:, 0])


@pytest.mark.parametrize("name", [name for name, host in HOSTS.items() if not host.positions])
def test_position_keys_are_refused_where_tokens_have_no_fixed_positions(name: str) -> None:
    model = HOSTS[name].create()
    before = fingerprint(model)
    with pytest.raises(ConfigError, match=r"keys='position'.*keys='content'"):
        add_lam(model, LamConfig(keys="position", max_length=9))
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_rope_224"])
def test_patch_dropout_takes_content_keys_alone(name: str) -> None:
    host = HOSTS[name]
    model = host.create(patch_drop_rate=0.5).train()
    with pytest.raises(ConfigError, match="patch_drop_rate"):
        add_lam(model, LamConfig(keys="position"))
    assert add_lam(model)(host.images()).isfinite().all()


def fingerprint(model: nn.Module) -> list[tuple[str, type, int]]:
    return [(path, type(module), len(module._forward_pre_hooks)) for path, module in model.named_modules()]


class Attentionless(nn.Module):
    """A block without any attention."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class OwnAttention(Attention):
    """A subclass that may compute anything."""


def half_replaced() -> nn.Module:
    model = HOSTS["vit_tiny_patch16_224"].create()
    model.blocks[1] = Attentionless()
    return model


def subclassed() -> nn.Module:
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, attn_layer=OwnAttention)


def test_a_hybrid_with_residual_blocks_in_its_stem_gets_masks_in_its_transformer() -> None:
    model = add_lam(timm.create_model("vit_base_r26_s32_224", device="meta"))
    masked = [path for path, module in model.named_modules() if isinstance(module, Lam)]
    assert masked == [f"blocks.{index}.attn.lam" for index in range(12)]


REFUSED = {
    "csatv2": r"\(timm\.models\.csatv2\.SpatialTransformerBlock\)",
    "resnet10t": "no attention layer",
    "skresnet18": "no attention layer",
}


@pytest.mark.parametrize("name", REFUSED)
def test_hosts_that_cannot_be_served_are_refused_by_name_and_left_alone(name: str) -> None:
    model = timm.create_model(name, device="meta")
    before = fingerprint(model)
    with pytest.raises(UnsupportedHostError, match=REFUSED[name]):
        add_lam(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (half_replaced, r"blocks\.1 \([a-z_.]+\.Attentionless\)"),
        (subclassed, r"blocks\.0\.attn \([a-z_.]+\.OwnAttention\)"),
    ],
)
def test_a_model_is_never_masked_in_part(build, message: str) -> None:
    model = build()
    with pytest.raises(UnsupportedHostError, match=message):
        add_lam(model)


def test_bare_blocks_and_attentions_are_refused_with_a_way_out() -> None:
    with pytest.raises(UnsupportedHostError, match="outside of any list of blocks"):
        add_lam(Block(24, 3))
    with pytest.raises(UnsupportedHostError, match="outside of any list of blocks"):
        add_lam(Attention(24, 3))


def test_a_timm_model_inside_another_module_is_served() -> None:
    host = HOSTS["vit_tiny_patch16_224"]
    plain = nn.Sequential(host.create(), nn.Linear(5, 2)).eval()
    masked, x = add_lam(copy.deepcopy(plain), LamConfig(layers="single", keys="position")), host.images()
    assert isinstance(masked[0].blocks[0].attn.lam, Lam)
    with torch.no_grad():
        assert_close(masked(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("given", "rank"), [({"rank": 3}, 3), (True, 8), (None, 8)])
def test_add_lam_takes_a_dict_of_fields(given: Any, rank: int) -> None:
    assert add_lam(HOSTS["vit_tiny_patch16_224"].create(), given).lam_config == LamConfig(rank=rank)


def test_a_second_lam_is_refused_until_the_first_is_removed() -> None:
    model = add_lam(HOSTS["vit_tiny_patch16_224"].create())
    with pytest.raises(UnsupportedHostError, match="remove_lam"):
        add_lam(model)
    add_lam(remove_lam(model), LamConfig(rank=2))


def test_eva_buffers_survive_meta_materialisation() -> None:
    host = HOSTS["eva_giant_patch14_224"]
    model = add_lam(host.create().to("meta")).to_empty(device="cpu")
    attn = model.blocks[0].attn
    for biases in (attn.q_bias, attn.k_bias, attn.v_bias):
        biases.data.fill_(float("nan"))
    attn.reset_parameters()
    assert not any(biases.any() for biases in (attn.q_bias, attn.k_bias, attn.v_bias))
