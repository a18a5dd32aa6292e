"""``lamzoo info``: a model's cost, masks, preprocessing and weights; of masks without their model, their base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lamzoo.cli import _output as out
from lamzoo.cli._options import Json, Name
from lamzoo.reduction.config import TokenReduction
from lamzoo.registry.cards import PretrainedWeights
from lamzoo.registry.catalog import ModelInfo, get_pretrained_cfg, model_info, model_ref
from lamzoo.tasks import find_task
from lamzoo.weights.mask_folder import (
    MASKS_NAME,
    MasksOnlyError,
    bundled_masks,
    find_mask_folder,
    has_masks_only,
    read_mask_folder,
)

_PREPROCESSING = ("input_size", "interpolation", "crop_pct", "mean", "std")


def info(name: Name, json: Json = False) -> None:
    """Shows a model's cost, masks, preprocessing and weights, or what masks saved without their model are."""
    facts, tags = describe(name)
    if json:
        out.print_json({**facts, "tags": tags})
        return
    facts.pop("pruning", None)  # the reduction under its earlier name
    out.print_table(("property", "value"), [(key, _brief(value)) for key, value in facts.items() if value is not None])
    if tags:
        columns = ("tag", "dataset", "licence", "source", "metrics")
        out.print_table(columns, [[_brief(tag[column]) for column in columns] for tag in tags], title="weights")
    for tag in tags:
        if tag["note"] is not None:
            out.print_line(f"{tag['tag']}: {tag['note']}")


def describe(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the facts about a model and its sets of weights, both ready for JSON.

    Parameters and GMACs come from the card; if it has none, the model is built and measured. A model of the zoo's own
    cards is described without importing torch or timm.

    Args:
        name: as for :func:`lamzoo.create_model`, or a folder of :func:`lamzoo.save_lam`, also on the hub.

    Raises:
        UnknownModelError: no such model or tag.
        WeightsError: the configuration of a saved model cannot be read.
    """
    ref = model_ref(name)
    if ref.kind == "local-dir" and ref.path is not None and has_masks_only(ref.path):
        return _describe_masks(name, ref.path), []
    if name in bundled_masks():
        return _describe_masks(name, find_mask_folder(name)), []
    try:
        info = model_info(name)
    except MasksOnlyError:
        return _describe_masks(name, find_mask_folder(name)), []
    params, gmacs = info.params, info.gmacs
    if info.reduction is not None or params is None or gmacs is None:
        import torch

        from lamzoo.profiling import profile
        from lamzoo.registry.factory import create_for_images

        with torch.device("meta"):  # without memory: a configuration may ask for any size
            measured = profile(create_for_images(name))
        params, gmacs = round(measured.params_m * 1e6), measured.gmacs
    record = _record(name, info)
    facts: dict[str, Any] = {
        "name": name,
        "family": info.family,
        "task": info.task,
        "description": info.description or None,
        "parameters": params,
        "gmacs": round(gmacs, 4),
        "masks": None if info.lam is None else info.lam.to_dict(),
        "pruning": None if info.prune is None else info.prune.to_dict(),
        "reduction": None if info.reduction is None else TokenReduction.to_dict(info.reduction),
        "fused": info.fused or None,
        "classes": record.get("num_classes") or None,
        "label names": record.get("label_names"),
    }
    facts |= {key: record.get(key) for key in _PREPROCESSING if find_task(info.task).reads_images}
    return facts, [_tag(tag) for tag in info.tags.values()]


def _describe_masks(name: str, folder: Path) -> dict[str, Any]:
    masks = read_mask_folder(folder)
    return {
        "name": name,
        "description": "masks without their model; lamzoo.load_lam(model, folder) loads them into it",
        "base": masks.base_model.name,
        "base class": masks.base_model.model_class,
        "base revision": masks.base_model.revision,
        "masks": masks.config.to_dict(),
        "layers": masks.layers,
        "stored besides": masks.also or None,
        "label names": masks.label_names,
        "bytes": (folder / MASKS_NAME).stat().st_size if (folder / MASKS_NAME).is_file() else None,
        "lamzoo": masks.lamzoo.version or None,
    }


def _record(name: str, info: ModelInfo) -> dict[str, Any]:
    """Returns the keys of timm's ``PretrainedCfg``: from the card if it states them, otherwise from timm."""
    stated = info.cfg(info.tag)
    if model_ref(name).is_saved or not find_task(info.task).reads_images or set(_PREPROCESSING) <= stated.keys():
        return stated
    return get_pretrained_cfg(name).to_dict()


def _tag(tag: PretrainedWeights) -> dict[str, Any]:
    elsewhere = {"timm": tag.timm, "open_clip": tag.open_clip, "hf-hub": tag.hub}
    source = tag.file or next(f"{where}:{what}" for where, what in elsewhere.items() if what)
    return {
        "tag": tag.name,
        "dataset": tag.dataset,
        "licence": tag.licence,
        "source": source,
        "sha256": tag.sha256,
        "masks": None if tag.lam is None else tag.lam.to_dict(),
        "metrics": dict(tag.metrics),
        "note": tag.note,
    }


def _brief(value: Any) -> str:
    """Writes a value for a table cell: tables as ``key value`` pairs, long lists cut."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_brief(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        shown = ", ".join(map(_brief, value[:10]))
        return shown or "none" if len(value) <= 10 else f"{shown}, ... ({len(value)})"
    return "" if value is None else str(value)
