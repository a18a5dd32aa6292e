"""Specs of the models of timm and open_clip, made from what these libraries state; imports them on use."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from lamzoo.registry.cards import ModelSpec, PretrainedWeights
from lamzoo.registry.refs import OPEN_CLIP_PREFIX, TIMM_PREFIX

# timm's modules whose attention has an adapter; other timm models can be created, but are not listed.
TIMM_MODULES = (
    "beit", "deit", "eva", "naflexvit", "vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos"
)  # fmt: skip


def timm_models(every: bool = False) -> list[str]:
    """Lists timm's architectures with an adapter, or all of them, without the prefix ``timm/``."""
    import timm

    return [
        arch for arch in (timm.list_models() if every else timm.list_models(module=TIMM_MODULES)) if _is_timms(arch)
    ]


def timm_spec(arch: str) -> ModelSpec | None:
    """Returns the spec of a timm architecture, with a tag for each set of weights; None if timm has no such model."""
    from timm.models import get_arch_pretrained_cfgs

    if not _is_timms(arch):
        return None
    tags = {}
    for name, cfg in get_arch_pretrained_cfgs(arch).items():
        if cfg.has_weights and cfg.tag:
            tags[cfg.tag] = PretrainedWeights(cfg.tag, timm=name, licence=cfg.license)
    return ModelSpec(
        name=TIMM_PREFIX + arch,
        family="timm",
        builder="lamzoo.models.vit:lam_vit",
        backbone={"timm": arch},
        description=f"timm's {arch}, with masks if lam= is given.",
        tags=tags,
        source="timm",
    )


def _is_timms(arch: str) -> bool:
    """Returns whether timm has an architecture, other than those that ``lamzoo.timm`` has registered with it."""
    from timm.models import is_model, model_entrypoint

    return is_model(arch) and model_entrypoint(arch).__module__ != "lamzoo.timm"


def open_clip_models() -> list[str]:
    """Lists open_clip's models as ``open_clip/<name>``; empty if open_clip is not installed."""
    if importlib.util.find_spec("open_clip") is None:
        return []
    import open_clip

    return [OPEN_CLIP_PREFIX + arch for arch in open_clip.list_models()]


def open_clip_spec(arch: str) -> ModelSpec:
    """Returns the spec of CLIP4Clip on an open_clip model, with a tag for each set of weights on the hub."""
    import open_clip

    tags = {}
    for name in open_clip.list_pretrained_tags_by_model(arch):
        cfg = open_clip.get_pretrained_cfg(arch, name)
        if cfg.get("hf_hub"):
            args = {"quick_gelu": True} if cfg.get("quick_gelu") else {}
            tags[name] = PretrainedWeights(
                name, open_clip=f"{arch}:{name}", args=args, pretrained_cfg=_open_clip_preprocessing(cfg)
            )
    config = open_clip.get_model_config(arch)
    size = config["vision_cfg"].get("image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    return ModelSpec(
        name=OPEN_CLIP_PREFIX + arch,
        family="open_clip",
        builder="lamzoo.models.clip4clip.builder:clip4clip",
        task="retrieval",
        backbone={"open_clip": arch, "similarity": "mean"},
        description=f"CLIP4Clip on the towers of open_clip's {arch}, with masks if lam= is given.",
        pretrained_cfg={"input_size": (3, height, width), "num_classes": 0, "crop_pct": 1.0}
        | _open_clip_preprocessing({}),
        tags=tags,
        source="open_clip",
    )


def _open_clip_preprocessing(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Translates open_clip's preprocessing of a set of weights into keys of timm's ``PretrainedCfg``."""
    from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    return {
        "mean": cfg.get("mean") or OPENAI_CLIP_MEAN,
        "std": cfg.get("std") or OPENAI_CLIP_STD,
        "interpolation": cfg.get("interpolation") or "bicubic",
        "crop_mode": _CROP_MODES[cfg.get("resize_mode") or "shortest"],
    }


_CROP_MODES = {"shortest": "center", "squash": "squash", "longest": "border"}
