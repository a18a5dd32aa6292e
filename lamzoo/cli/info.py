"""``lamzoo info``: a model's cost, masks, preprocessing and weights."""

from __future__ import annotations

from typing import Any

from lamzoo.cli import _output as out
from lamzoo.cli._options import Json, Name
from lamzoo.reduction.config import TokenReduction
from lamzoo.registry.cards import PretrainedWeights
from lamzoo.registry.catalog import ModelInfo, get_pretrained_cfg, model_info, model_ref
from lamzoo.tasks import find_task

_PREPROCESSING = ("input_size", "interpolation", "crop_pct", "mean", "std")


def info(name: Name, json: Json = False) -> None:
    """Shows a model's cost, masks, preprocessing and weights."""
    facts, tags = describe(name)
    if json:
        out.print_json({**facts, "tags": tags})
        return
    del facts["pruning"]  # the reduction under its earlier name
    out.print_table(("property", "value"), [(key, _brief(value)) for key, value in facts.items() if value is not None])
    if tags:
        columns = ("tag", "dataset", "licence", "source", "metrics")
        out.print_table(columns, [[_brief(tag[column]) for column in columns] for tag in tags], title="weights")


def describe(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the facts about a model and its sets of weights, both ready for JSON.

    Parameters and GMACs come from the card; if it has none, the model is built and measured. A model of the zoo's own
    cards is described without importing torch or timm.

    Args:
        name: as for :func:`lamzoo.create_model`.

    Raises:
        UnknownModelError: no such model or tag.
        WeightsError: the configuration of a saved model cannot be read.
    """
    info = model_info(name)
    params, gmacs = info.params, info.gmacs
    if info.reduction is not None or params is None or gmacs is None:
        import torch

        from lamzoo.profiling import profile
        from lamzoo.registry.factory import create_model

        with torch.device("meta"):  # without memory: a configuration may ask for any size
            measured = profile(create_model(name))
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
        "metrics": dict(tag.metrics),
    }


def _brief(value: Any) -> str:
    """Writes a value for a table cell: tables as ``key value`` pairs, long lists cut."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_brief(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        shown = ", ".join(map(_brief, value[:10]))
        return shown or "none" if len(value) <= 10 else f"{shown}, ... ({len(value)})"
    return "" if value is None else str(value)
