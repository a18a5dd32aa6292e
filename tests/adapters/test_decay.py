"""Optimisers leave the tables and biases of masks undecayed, in timm's own way of saying so."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import open_clip
import pytest
import timm.optim
import torch
from torch import nn

import lamzoo
from lamzoo.adapters import add_lam, load_lam_state_dict, remove_lam
from lamzoo.lam import LamConfig
from lamzoo.training.build import build_optimizer
from lamzoo.training.recipe_common import OptimizerSection
from tests.adapters.timm_hosts import HOSTS, Host, params

hosts = pytest.mark.parametrize("host", params())
VIT = HOSTS["vit_tiny_patch16_224"]
TABLES = LamConfig(keys="position", op="mul", rank=3)


def is_exempt(name: str) -> bool:
    return ".lam." in name and (".table." in name or name.endswith(".bias"))


def decayed(optimizer: torch.optim.Optimizer, model: nn.Module) -> set[str]:
    """Returns the names of the parameters that an optimiser decays."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}


def lr_scales(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}


@hosts
def test_no_weight_decay_of_every_timm_host_has_the_tables_and_biases_of_its_masks(host: Host) -> None:
    plain = host.create()
    before = set(plain.no_weight_decay()) if hasattr(plain, "no_weight_decay") else set()
    for layers in host.kinds_of_layers():
        config = LamConfig(layers=layers, keys="position" if host.positions else "content", rank=3, hidden=(4,))
        model = add_lam(copy.deepcopy(plain), config)
        masks = {name for name, _ in model.named_parameters() if is_exempt(name)}
        assert masks
        assert model.no_weight_decay() == before | masks


@pytest.mark.parametrize("layer_decay", [None, 0.75])
@pytest.mark.parametrize("exclude_1d", [True, False])
def test_timms_optimisers_see_it(layer_decay: float | None, exclude_1d: bool) -> None:
    model = add_lam(VIT.create(), TABLES)
    optimizer = timm.optim.create_optimizer_v2(
        model, "adamw", lr=1e-3, weight_decay=0.1, layer_decay=layer_decay, filter_bias_and_bn=exclude_1d
    )
    found = decayed(optimizer, model)
    assert not any(is_exempt(name) for name in found)
    assert "blocks.0.attn.qkv.weight" in found
    assert "blocks.0.attn.lam.network.query.0.weight" in found


def test_a_wrapper_without_the_method_names_the_masks_by_its_own_paths() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.extra = VIT.create(), nn.MultiheadAttention(24, 2)

    model: Any = add_lam(Wrapper(), LamConfig(keys="position", max_length=17))
    assert "backbone.blocks.1.attn.lam.network.table.bias" in model.no_weight_decay()
    assert "extra.lam.network.table.weight" in model.no_weight_decay()
    assert {"pos_embed", "blocks.1.attn.lam.network.table.bias"} <= model.backbone.no_weight_decay()


def test_taking_masks_out_gives_the_hosts_own_method_back() -> None:
    model = add_lam(VIT.create(), TABLES)
    assert remove_lam(model).no_weight_decay() == VIT.create().no_weight_decay()
    assert "no_weight_decay" not in vars(model)


def test_copies_and_pickles_keep_it() -> None:
    model = add_lam(VIT.create(), TABLES)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.no_weight_decay() == model.no_weight_decay()


_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1},
    "text_cfg": {"context_length": 16, "vocab_size": 600, "width": 32, "heads": 2, "layers": 1},
}


def test_a_method_made_of_the_towers_own_names_the_masks_of_both_towers() -> None:
    model: Any = add_lam(open_clip.CLIP(**_CLIP), TABLES)
    table = "transformer.resblocks.0.attn.lam.network.table.weight"
    assert {"positional_embedding", "visual.class_embedding", table, f"visual.{table}"} <= model.no_weight_decay()
    assert {"class_embedding", table} <= model.visual.no_weight_decay()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lam_moment_detr_micro", {"video_dim": 6, "text_dim": 6, "lam_in": ("encoder", "decoder")}),
        ("lam_qd_detr_micro", {"video_dim": 6, "text_dim": 6, "lam_in": ("encoder", "cross")}),
        ("lam_describer_micro", {"features": {"video": 12}}),
        ("lam_clip4clip_micro", {"clip": _CLIP, "lam_in": ("head", "vision", "text"), "similarity": "tight"}),
    ],
)
def test_models_of_every_task_leave_tables_and_biases_undecayed(name: str, options: dict[str, Any]) -> None:
    model = lamzoo.create_model(name, lam=TABLES, **options)
    found = decayed(build_optimizer(OptimizerSection(weight_decay=0.1), model), model)
    assert not any(is_exempt(name) for name in found)
    assert any(".lam." in name for name in found)
    plain = lamzoo.create_model(name, lam=False, **{k: v for k, v in options.items() if k != "lam_in"})
    assert {name for name in found if ".lam." not in name} == decayed(
        build_optimizer(OptimizerSection(weight_decay=0.1), plain), plain
    )


@pytest.mark.parametrize("layers", ["multi", "single"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_fresh_masks_are_not_layer_decayed(layers: Any, name: str) -> None:
    model = add_lam(VIT.create(), LamConfig(layers=layers, keys="position", rank=3))
    optimizer = build_optimizer(OptimizerSection(name, layer_decay=0.5), model)
    scales = lr_scales(optimizer, model)
    assert scales.keys() == {name for name, _ in model.named_parameters()}
    assert {scale for name, scale in scales.items() if ".lam." in name} == {1.0}
    assert scales["blocks.0.attn.qkv.weight"] == scales["blocks.1.attn.qkv.weight"] / 2 < 1
    assert not any(is_exempt(name) for name in decayed(optimizer, model))


@pytest.mark.parametrize("whole", [True, False])
def test_loaded_masks_are_decayed_with_their_layer_unless_all_layers_share_them(whole: bool) -> None:
    for layers in ("multi", "single"):
        model = add_lam(VIT.create(), LamConfig(layers=layers, keys="position", rank=3))
        state = model.state_dict()
        if whole:
            model.load_state_dict(state)
        else:
            load_lam_state_dict(model, {key: value for key, value in state.items() if ".lam." in key})
        scales = lr_scales(build_optimizer(OptimizerSection(layer_decay=0.5), model), model)
        block = scales["blocks.0.attn.qkv.weight"]
        assert block < 1
        assert scales["blocks.0.attn.lam.network.table.weight"] == (block if layers == "multi" else 1.0)


def test_masks_on_published_weights_of_the_backbone_are_fresh() -> None:
    model = VIT.create()
    state = copy.deepcopy(model.state_dict())
    add_lam(model).load_state_dict(state, strict=False)
    scales = lr_scales(build_optimizer(OptimizerSection(layer_decay=0.5), model), model)
    assert {scale for name, scale in scales.items() if ".lam." in name} == {1.0}
