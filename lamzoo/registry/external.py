"""Cards of models that other libraries name, timm's and open_clip's, made of what those libraries say of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.models import get_arch_pretrained_cfgs

from lamzoo.registry.cards import ModelSpec, PretrainedWeights

TIMM_PREFIX = "timm/"
OPEN_CLIP_PREFIX = "open_clip/"
# timm's modules whose attention the adapters serve; other timm names can be created, but not listed.
TIMM_MODULES = (
    "beit", "deit", "eva", "naflexvit", "vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos"
)  # fmt: skip


def timm_spec(arch: str) -> ModelSpec:
    """Returns the card of an architecture of timm, its tags those with weights."""
    tags = {}
    for name, cfg in get_arch_pretrained_cfgs(arch).items():
        if cfg.has_weights and cfg.tag:
            tags[cfg.tag] = PretrainedWeights(cfg.tag, timm=name, licence=cfg.license)
    return ModelSpec(
        name=TIMM_PREFIX + arch,
        family="timm",
        builder="lamzoo.models.vit:lam_vit",
        backbone={"timm": arch},
        description=f"timm's {arch}, with masks where lam= is given.",
        tags=tags,
        source="timm",
    )


def open_clip_models() -> list[str]:
    """Lists ``open_clip/<name>`` for all models of open_clip; none where it is not installed."""
    if importlib.util.find_spec("open_clip") is None:
        return []
    import open_clip

    return [OPEN_CLIP_PREFIX + arch for arch in open_clip.list_models()]


def open_clip_spec(arch: str) -> ModelSpec:
    """Returns the card of CLIP4Clip on a model of open_clip, its tags those with weights on the hub."""
    import open_clip

    tags = {}
    for name in open_clip.list_pretrained_tags_by_model(arch):
        cfg = open_clip.get_pretrained_cfg(arch, name)
        if cfg.get("hf_hub"):
            args = {"quick_gelu": True} if cfg.get("quick_gelu") else {}
            tags[name] = PretrainedWeights(
                name, open_clip=f"{arch}:{name}", args=args, pretrained_cfg=_open_clip_ends(cfg)
            )
    config = open_clip.get_model_config(arch)
    size = config["vision_cfg"].get("image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    return ModelSpec(
        name=OPEN_CLIP_PREFIX + arch,
        family="open_clip",
        builder="lamzoo.models.clip4clip.model:clip4clip",
        backbone={"open_clip": arch, "similarity": "mean"},
        description=f"CLIP4Clip on the towers of open_clip's {arch}, with masks where lam= is given.",
        pretrained_cfg={"input_size": (3, height, width), "num_classes": 0, "crop_pct": 1.0} | _open_clip_ends({}),
        tags=tags,
        source="open_clip",
    )


def _open_clip_ends(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Says in timm's words how open_clip preprocesses images for a set of weights."""
    return {
        "mean": cfg.get("mean") or OPENAI_CLIP_MEAN,
        "std": cfg.get("std") or OPENAI_CLIP_STD,
        "interpolation": cfg.get("interpolation") or "bicubic",
        "crop_mode": _CROP_MODES[cfg.get("resize_mode") or "shortest"],
    }


_CROP_MODES = {"shortest": "center", "squash": "squash", "longest": "border"}
