"""``lamzoo info``: a model's cost, masks, preprocessing and weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lamzoo.cli import _output as out
from lamzoo.cli._options import Json, Name, saved_source

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

    from lamzoo.lam import LamConfig
    from lamzoo.reduction import PruneConfig
    from lamzoo.registry.cards import ModelSpec, PretrainedWeights

_PREPROCESSING = ("input_size", "interpolation", "crop_pct", "mean", "std")


def info(name: Name, json: Json = False) -> None:
    """Shows what is known of a model: its cost, masks, preprocessing and weights."""
    facts, tags = describe(name)
    if json:
        out.print_json({**facts, "tags": tags})
        return
    out.print_table(("property", "value"), [(key, _brief(value)) for key, value in facts.items() if value is not None])
    if tags:
        columns = ("tag", "dataset", "licence", "source", "metrics")
        out.print_table(columns, [[_brief(tag[column]) for column in columns] for tag in tags], title="weights")


def describe(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the facts about a model and its sets of weights, both ready for JSON.

    Parameters and GMACs are the card's; where no card has them, the model is built and measured.

    Args:
        name: as for :func:`lamzoo.create_model`.

    Raises:
        UnknownModelError: no such model or tag.
        WeightsError: a ``local-dir:`` or ``hf-hub:`` that cannot be read.
    """
    from lamzoo.registry.catalog import find_spec, find_weights, get_pretrained_cfg, model_info
    from lamzoo.registry.saving import read_saved

    source = saved_source(name)
    if source is None:
        card: ModelSpec = model_info(name)
        tags = [_tag(tag) for tag in card.tags.values()]
        chosen = find_weights(card, name)
        return _facts(name, card, get_pretrained_cfg(name), card.lam, chosen.prune if chosen else None), tags
    saved = read_saved(source, name.partition(":")[2], with_weights=False)
    return _facts(name, find_spec(saved.name), saved.cfg, saved.lam, saved.prune, changed=True), []


def _facts(
    name: str,
    card: ModelSpec,
    cfg: PretrainedCfg,
    lam: LamConfig | None,
    pruning: PruneConfig | None,
    *,
    changed: bool = False,
) -> dict[str, Any]:
    params, gmacs = card.params, card.gmacs
    if changed or pruning is not None or params is None or gmacs is None:
        from lamzoo.profiling import profile
        from lamzoo.registry.factory import create_model

        measured = profile(create_model(name))
        params, gmacs = round(measured.params_m * 1e6), measured.gmacs
    record = cfg.to_dict()
    facts: dict[str, Any] = {
        "name": name,
        "family": card.family,
        "description": card.description or None,
        "parameters": params,
        "gmacs": round(gmacs, 4),
        "masks": None if lam is None else lam.to_dict(),
        "pruning": None if pruning is None else pruning.to_dict(),
        "classes": record.get("num_classes") or None,
        "label names": record.get("label_names"),
    }
    if card.family in ("lam_moment_detr", "lam_describer"):  # they read features: timm's defaults say nothing of them
        return facts
    return facts | {key: record.get(key) for key in _PREPROCESSING}


def _tag(tag: PretrainedWeights) -> dict[str, Any]:
    elsewhere = {"hf-hub": tag.hub, "timm": tag.timm, "open_clip": tag.open_clip}
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
        return shown if len(value) <= 10 else f"{shown}, ... ({len(value)})"
    return "" if value is None else str(value)
