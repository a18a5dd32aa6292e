import pytest
import timm
import torch
from torch import nn

from lamzoo.adapters import add_lam, fuse, unfuse
from lamzoo.errors import UnsupportedHostError
from lamzoo.lam import LamConfig
from lamzoo.lam.fused import pinned_form
from lamzoo.models.vit import micro_vit
from lamzoo.profiling import analytic_macs, profile
from lamzoo.registry.catalog import list_models, model_info
from tests.zoo import on_meta, profiled

MICRO = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 10}
CONFIGS = [
    LamConfig(layers=layers, keys=keys, heads=heads, hidden=hidden, rank=5)
    for layers in ("multi", "single")
    for keys in ("content", "position")
    for heads in ("shared", "per-head")
    for hidden in ((), (24, 12))
]
# docs/model_profile.csv of open_clip at 3b37473b7178479e2494f60392442648ed262e8a; its GFLOPs are twice the GMACs
VIT_B_32 = {"gflops": 14.78, "image": 8.82, "text": 5.96, "mparams": 151.28}


@pytest.fixture(scope="module")
def clip():
    open_clip = pytest.importorskip("open_clip")
    with torch.device("meta"):
        return open_clip.create_model("ViT-B-32", device="meta")


def clip_inputs():
    return torch.zeros(1, 3, 224, 224, device="meta"), torch.zeros(1, 77, dtype=torch.long, device="meta")


@pytest.mark.parametrize("name", list_models())
def test_formula_and_counter_agree_for_every_registered_model(name):
    counted, formula = profiled(name), analytic_macs(on_meta(name))
    assert counted.gmacs == pytest.approx(formula.gmacs, rel=0.01)
    assert counted.lam_gmacs == pytest.approx(formula.lam_gmacs, rel=0.01)


@pytest.mark.parametrize("name", [name for name in list_models() if model_info(name).lam])
def test_no_registered_model_has_masks_for_nothing(name):
    masked, plain = on_meta(name), on_meta(name, lam=False)
    costs, base = profiled(name), profiled(name, lam=False)
    assert masked.lam_config is not None
    assert plain.lam_config is None
    assert costs.lam_gmacs > 0
    assert costs.lam_params_m > 0
    assert costs.gmacs > base.gmacs
    assert costs.gmacs - costs.lam_gmacs == pytest.approx(base.gmacs, rel=1e-9)
    assert costs.params_m - costs.lam_params_m == pytest.approx(base.params_m, rel=1e-9)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_formula_and_counter_agree_for_every_kind_of_mask(config):
    model = micro_vit(MICRO, lam=config)
    counted, formula = profile(model), analytic_macs(model)
    assert counted.gmacs == pytest.approx(formula.gmacs, rel=1e-9)
    assert counted.lam_gmacs == pytest.approx(formula.lam_gmacs, rel=1e-9)


@pytest.mark.parametrize(
    "config", [LamConfig(layers="single"), LamConfig(keys="position", rank=7, heads="shared")], ids=str
)
def test_formula_and_counter_agree_for_fused_masks(config):
    model = fuse(micro_vit(MICRO, lam=config))
    counted, formula = profile(model), analytic_macs(model)
    assert counted.fused_layers == 2
    assert counted.gmacs == pytest.approx(formula.gmacs)
    assert counted.lam_gmacs == pytest.approx(formula.lam_gmacs)
    with pinned_form(False):
        assert profile(model) == profile(unfuse(model))


@pytest.mark.parametrize("fused", [False, True])
def test_formula_and_counter_agree_for_masks_in_some_blocks(fused):
    model = micro_vit(MICRO | {"depth": 3}, lam=LamConfig(keys="position", rank=7), lam_blocks=[1])
    if fused:
        fuse(model)
    counted, formula = profile(model), analytic_macs(model)
    assert counted.fused_layers == int(fused)
    assert counted.lam_gmacs == pytest.approx(formula.lam_gmacs)
    assert counted.gmacs == pytest.approx(formula.gmacs)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch32_384", "vit_base_patch14_reg4_dinov2"])
def test_formula_and_counter_agree_for_timms_transformers(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert analytic_macs(model).gmacs == pytest.approx(profile(model).gmacs, rel=1e-9)


def test_formula_and_counter_agree_for_images_that_are_not_square():
    model = micro_vit({**MICRO, "img_size": (32, 48)}, lam=LamConfig())
    assert analytic_macs(model).gmacs == pytest.approx(profile(model).gmacs, rel=1e-9)


def test_attention_is_counted():
    # Linears alone are quadratic in the width and linear in the tokens, so only attention tells these two apart.
    layers = profiled("vit_micro").by_layer
    linears = sum(layers[f"blocks.0.{name}"] for name in ("attn.qkv", "attn.proj", "mlp"))
    assert layers["blocks.0"] - linears == pytest.approx(2 * 64**2 * 128 / 1e9)


@pytest.mark.parametrize("config", [None, LamConfig(), LamConfig(layers="single", heads="per-head")], ids=str)
def test_formula_and_counter_agree_for_clips_towers(config):
    open_clip = pytest.importorskip("open_clip")
    with torch.device("meta"):
        model = open_clip.create_model("ViT-B-32", device="meta")
        model = model if config is None else add_lam(model, config)
    counted, formula = profile(model, clip_inputs()), analytic_macs(model)
    assert counted.gmacs == pytest.approx(formula.gmacs, rel=0.01)
    assert counted.lam_gmacs == pytest.approx(formula.lam_gmacs, rel=0.01)


def test_clips_figures_are_those_that_open_clip_publishes(clip):
    counted = profile(clip, clip_inputs())
    image = profile(clip.visual, clip_inputs()[0])
    assert 2 * counted.gmacs == pytest.approx(VIT_B_32["gflops"], rel=0.01)
    assert 2 * image.gmacs == pytest.approx(VIT_B_32["image"], rel=0.01)
    assert 2 * (counted.gmacs - image.gmacs) == pytest.approx(VIT_B_32["text"], rel=0.01)
    assert counted.params_m == pytest.approx(VIT_B_32["mparams"], rel=0.01)


@pytest.mark.parametrize("name", ["vit_small_patch16_18x2_224", "vit_base_patch16_siglip_224", "resnet18"])
def test_a_family_without_a_formula_is_refused_by_name(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UnsupportedHostError, match="no formula for the MACs of"):
        analytic_macs(model)
    with pytest.raises(UnsupportedHostError, match="Linear"):
        analytic_macs(nn.Linear(1, 1))
