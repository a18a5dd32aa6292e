import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import lamzoo
from lamzoo.adapters import add_lam, fuse
from lamzoo.errors import ConfigError
from lamzoo.lam import LamConfig
from lamzoo.models.vit import micro_vit
from lamzoo.profiling import analytic_macs, image_size, profile
from lamzoo.profiling.inputs import default_input, image_config

MICRO = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 10}
CONFIGS = [
    LamConfig(),
    LamConfig(rank=3, hidden=(12,), heads="per-head", op="add"),
    LamConfig(keys="position", rank=4),
    LamConfig(keys="position", layers="single"),
    LamConfig(op="mul", sign="positive", layers="single"),
]


@pytest.mark.parametrize(("name", "gmacs"), [("vit_small_patch16_224", 4.61), ("vit_base_patch16_224", 17.58)])
def test_gmacs_are_those_that_timm_publishes(name, gmacs):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert profile(model).gmacs == pytest.approx(gmacs, rel=0.01)


def test_gmacs_of_the_micro_vit_follow_the_formula():
    dim, tokens, depth = 64, 65, 2
    # four 3 x 3 convolutions, strides 1, 2, 2, 1
    stem = 9 * (3 * 16 * 32**2 + 16 * 32 * 16**2 + 32 * 64 * 8**2 + 64 * 64 * 8**2)
    block = 12 * tokens * dim**2 + 2 * tokens**2 * dim
    result = profile(micro_vit(MICRO, lam=None))
    assert result.gmacs * 1e9 == pytest.approx(stem + depth * block + 10 * dim)
    assert result.lam_gmacs == result.lam_params_m == 0


def test_lam_gmacs_of_a_shared_mask_follow_the_formula():
    dim, tokens, rank = 64, 65, 5
    result = profile(micro_vit(MICRO, lam=LamConfig(heads="shared", rank=rank)))
    network = tokens * dim * rank + tokens * dim * (rank + 1)
    assert result.lam_gmacs * 1e9 == pytest.approx(2 * (network + tokens**2 * (rank + 1)))


@pytest.mark.parametrize("config", [LamConfig(), LamConfig(keys="position", rank=7)], ids=str)
def test_lam_share_of_a_fused_model_is_the_difference_to_the_plain_backbone(config):
    model = micro_vit(MICRO, lam=None)
    plain, masked = profile(model), profile(fuse(add_lam(copy.deepcopy(model), config)))
    assert (plain.fused_layers, masked.fused_layers) == (0, 2)
    assert masked.lam_gmacs > 0
    assert masked.gmacs - masked.lam_gmacs == pytest.approx(plain.gmacs, rel=1e-12)


def test_lam_share_of_a_fused_layer_with_fewer_queries_is_the_difference_to_the_plain_backbone():
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    model = timm.models.VisionTransformer(**kwargs)
    masked = fuse(add_lam(copy.deepcopy(model), LamConfig(keys="position", rank=7)))
    plain, masked = (profile(lamzoo.merge_tokens(each, keep=1)) for each in (model, masked))
    assert masked.fused_layers == 2
    assert masked.gmacs - masked.lam_gmacs == pytest.approx(plain.gmacs, rel=1e-12)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_lam_share_is_the_difference_to_the_plain_backbone(config):
    model = micro_vit(MICRO, lam=None)
    plain = profile(model)
    masked = profile(add_lam(copy.deepcopy(model), config))
    assert masked.gmacs > plain.gmacs
    assert masked.gmacs - masked.lam_gmacs == pytest.approx(plain.gmacs, rel=1e-12)
    assert masked.params_m - masked.lam_params_m == pytest.approx(plain.params_m, rel=1e-12)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_a_wrapped_model_has_the_inputs_and_figures_of_the_model_in_it(wrap):
    model = lamzoo.create_model("lam_vit_micro", img_size=48, in_chans=1)
    wrapped = wrap(model)
    assert image_size(wrapped) == image_size(model) == (1, 48, 48)
    assert image_config(wrapped) == image_config(model)
    assert default_input(wrapped, 2).shape == default_input(model, 2).shape
    assert analytic_macs(wrapped) == analytic_macs(model)


def test_a_wrapped_model_s_own_example_inputs_are_its_default_input():
    model = lamzoo.create_model("lam_moment_detr_micro")
    assert len(default_input(nn.DataParallel(model))) == len(default_input(model)) > 1
    assert analytic_macs(nn.DataParallel(model)) == analytic_macs(model)


def test_figures_do_not_depend_on_the_backend():
    model = micro_vit(MICRO, lam=LamConfig(op="add"))
    first = profile(model)
    for block in model.blocks:
        block.attn.lam.backend = "sdpa"
    assert profile(model) == first
    assert all(block.attn.lam.backend == "sdpa" for block in model.blocks)


def test_layers_add_up():
    layers = profile(micro_vit(MICRO, lam=LamConfig())).by_layer
    total = layers["patch_embed"] + layers["blocks"] + layers["head"]
    assert layers["blocks.0"] + layers["blocks.1"] == pytest.approx(layers["blocks"])
    assert layers["blocks.0.attn.lam"] < layers["blocks.0.attn"] < layers["blocks.0"]
    assert total == pytest.approx(profile(micro_vit(MICRO, lam=LamConfig())).gmacs)


def test_multihead_attention_is_counted_in_full():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    macs = 10 * (4 * 32**2 + 2 * 32 * 64) + 2 * 10**2 * 32
    assert profile(layer, torch.rand(1, 10, 32)).gmacs * 1e9 == macs
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_pooling_with_a_latent_query_is_counted():
    kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 1, "num_heads": 4, "class_token": False}
    model = timm.create_model("vit_base_patch16_siglip_224", num_classes=0, **kwargs)
    tokens, dim = 16, 64
    patches, block = tokens * 48 * dim, 12 * tokens * dim**2 + 2 * tokens**2 * dim
    pooling = (1 + 2 * tokens) * dim**2 + 2 * tokens * dim + dim**2 + 8 * dim**2
    assert profile(model).gmacs * 1e9 == pytest.approx(patches + block + pooling)


class _Attention(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


def test_attention_that_torch_counts_as_zero_is_refused(monkeypatch):
    from torch.utils import flop_counter

    registry = {op: formula for op, formula in flop_counter.flop_registry.items() if "attention" not in str(op)}
    monkeypatch.setattr(flop_counter, "flop_registry", registry)
    with pytest.raises(ConfigError, match=r"scaled_dot_product.* as zero"):
        profile(_Attention(), torch.rand(1, 2, 8, 16))


def test_a_model_without_any_macs_is_refused():
    with pytest.raises(ConfigError, match="ReLU"):
        profile(nn.ReLU(), torch.rand(1, 4))


def test_the_model_is_left_as_it_was():
    model = micro_vit(MICRO, lam=LamConfig()).train()
    model.norm.eval()
    state = copy.deepcopy(model.state_dict())
    profile(model)
    assert model.training
    assert model.blocks[0].training
    assert not model.norm.training
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert not model.blocks[0].attn.lam._forward_hooks


def test_the_default_input_is_the_size_that_the_model_was_built_for():
    assert image_size(micro_vit({**MICRO, "img_size": (32, 64)}, lam=None)) == (3, 32, 64)
    assert image_size(timm.create_model("test_vit", img_size=64, in_chans=1)) == (1, 64, 64)
    with pytest.raises(ConfigError, match="Linear"):
        image_size(nn.Linear(2, 2))


def test_a_batch_costs_its_images():
    model = micro_vit(MICRO, lam=LamConfig())
    assert profile(model, torch.rand(3, 3, 32, 32)).gmacs == pytest.approx(3 * profile(model).gmacs)
