"""What ``lamzoo info`` says of a model, and how ``lamzoo download`` brings its weights; prints nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from timm.models import PretrainedCfg

from lamzoo.errors import WeightsNotFoundError
from lamzoo.lam import LamConfig, PruneConfig
from lamzoo.profiling import profile
from lamzoo.registry.cards import ModelCard, TagCard
from lamzoo.registry.catalog import find_card, find_tag, get_pretrained_cfg, model_info
from lamzoo.registry.factory import create_model, obtain
from lamzoo.registry.saving import read_saved
from lamzoo.weights.files import WeightsFile, read_state_dict

_PREPROCESSING = ("input_size", "interpolation", "crop_pct", "mean", "std")


def describe(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the facts about a model and its sets of weights, both ready for JSON.

    Parameters and GMACs are the card's; where no card has them, the model is built and measured.

    Args:
        name: as for :func:`lamzoo.create_model`.

    Raises:
        UnknownModelError: no such model or tag.
        WeightsError: a ``local-dir:`` or ``hf-hub:`` that cannot be read.
    """
    source = _source(name)
    if source is None:
        card: ModelCard = model_info(name)
        tags = [_tag(tag) for tag in card.tags.values()]
        chosen = find_tag(card, name)
        return _facts(name, card, get_pretrained_cfg(name), card.lam, chosen.prune if chosen else None), tags
    saved = read_saved(source, name.partition(":")[2], with_weights=False)
    return _facts(name, find_card(saved.name), saved.cfg, saved.lam, saved.prune, changed=True), []


def fetch(name: str) -> list[Path]:
    """Brings the weights of a model here, reads them once to check them, and returns their files.

    Raises:
        UnknownModelError: no such model or tag.
        WeightsError: they cannot be had here, or are damaged.
    """
    source = _source(name)
    if source is None:
        card = find_card(name)
        find_tag(card, name)
        file: WeightsFile | None = obtain(card, name)[1]
    else:
        file = read_saved(source, name.partition(":")[2], with_weights=True).weights
    if file is None:
        raise WeightsNotFoundError(f"{name} has no weights")
    read_state_dict(file.path, sha256=file.sha256)
    return [file.path]


def _source(name: str) -> Literal["local-dir", "hf-hub"] | None:
    if name.startswith("local-dir:"):
        return "local-dir"
    return "hf-hub" if name.startswith("hf-hub:") else None


def _facts(
    name: str,
    card: ModelCard,
    cfg: PretrainedCfg,
    lam: LamConfig | None,
    pruning: PruneConfig | None,
    *,
    changed: bool = False,
) -> dict[str, Any]:
    params, gmacs = card.params, card.gmacs
    if changed or pruning is not None or params is None or gmacs is None:
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


def _tag(tag: TagCard) -> dict[str, Any]:
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
