"""The models of a benchmark: models that match patterns, and the plain twins of masked models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lamzoo.errors import UnknownModelError
from lamzoo.lam.config import LamConfig
from lamzoo.lam.fused import unsupported_config
from lamzoo.registry.cards import ModelSpec
from lamzoo.registry.catalog import (
    find_spec,
    find_weights,
    match_models,
    model_ref,
    pretrained_cfg_of,
    spec_of_saved,
)
from lamzoo.registry.refs import TIMM_PREFIX, join_name
from lamzoo.tasks import find_task
from lamzoo.weights.saved import read_saved


@dataclass(frozen=True)
class Candidate:
    """A model to measure.

    Attributes:
        model: architecture, or ``local-dir:`` or ``hf-hub:`` with a location.
        tag: tag of the weights.
        plain: name of the plain twin; None for a plain model, or without a twin.
        img_size: the model's input size, ``"224"`` or ``"HxW"``; None for models without images.
        task: name of the task.
        fusible: whether its masks have a form for inference, see :func:`lamzoo.fuse`.
        reranks: whether it has a joint transformer for the second stage of retrieval.
    """

    model: str
    tag: str | None
    plain: str | None = None
    img_size: str | None = None
    task: str = "classification"
    fusible: bool = False
    reranks: bool = False

    @property
    def name(self) -> str:
        """The name for ``create_model``."""
        return join_name(self.model, self.tag)


def select_models(patterns: Sequence[str], *, weights: bool, plain: bool) -> list[Candidate]:
    """Finds the models that match patterns, in natural order, with each plain twin once, after its first masked model.

    Args:
        patterns: names (``arch``, ``arch.tag``, ``timm/NAME``, ``local-dir:DIR``, ``hf-hub:REPO``), wildcards, or
            parts of names, as in ``lamzoo list``.
        weights: whether to select weights: a bare name then selects its default tag, and a wildcard every tag.
            Otherwise a bare name selects the architecture.
        plain: include the plain twins of masked models.

    Returns:
        The models, without duplicates.

    Raises:
        UnknownModelError: a pattern matches nothing, or is empty.
        WeightsError: the configuration of a ``local-dir:`` or ``hf-hub:`` model cannot be read.
    """
    found: dict[str, Candidate] = {}
    for pattern in patterns:
        if not pattern:  # a part of every name, but probably a variable without a value
            raise UnknownModelError("a pattern is empty; write '*' for all models")
        for name in _names(pattern, weights):
            candidate = candidate_of(name, weights=weights)
            found.setdefault(candidate.name, candidate)
            if plain and candidate.plain is not None:
                found.setdefault(candidate.plain, candidate_of(candidate.plain, weights=weights))
    return list(found.values())


def candidate_of(name: str, *, weights: bool) -> Candidate:
    """Returns the candidate for a single name, as accepted by ``create_model``.

    Raises:
        UnknownModelError: the model or tag is unknown.
        WeightsError: the configuration of a saved model cannot be read.
    """
    ref = model_ref(name)
    if ref.is_saved:
        saved = read_saved(ref, with_weights=False)
        spec = spec_of_saved(saved)
        task = find_task(spec.task)
        size = size_text(saved.args.get("img_size") or saved.cfg.input_size[1:]) if task.reads_images else None
        head = saved.args.get("similarity") or spec.backbone.get("similarity")
        return Candidate(ref.name, None, None, size, task.name, _is_fusible(spec.lam), reranks=head == "tight")
    card = find_spec(ref)
    tag = find_weights(card, ref)
    cfg = pretrained_cfg_of(card, tag)
    keep = weights or ref.tag is not None
    return Candidate(
        model=card.name,
        tag=tag.name if keep and tag is not None else None,
        plain=_plain_twin(card, tag.name if keep and tag is not None else None),
        img_size=size_text(cfg.input_size[1:]) if find_task(card.task).reads_images else None,
        task=card.task,
        fusible=_is_fusible((card.of_tag(tag) if keep else card).lam),
        reranks=card.backbone.get("similarity") == "tight",
    )


def _is_fusible(lam: LamConfig | None) -> bool:
    return lam is not None and unsupported_config(lam) is None


def _plain_twin(card: ModelSpec, tag: str | None) -> str | None:
    """Returns the name of the same backbone without masks, with corresponding weights if there is a tag."""
    if card.lam is None:
        return None
    if tag is not None and card.tags[tag].timm is not None:
        return f"{TIMM_PREFIX}{card.tags[tag].timm}"
    if card.plain is not None:
        twin = model_ref(str(card.plain_of(card.tags.get(tag or ""))))
        return twin.text if twin.tag is None or twin.tag in find_spec(twin).tags else None
    backbone = card.backbone.get("timm")
    return f"{TIMM_PREFIX}{backbone}" if tag is None and backbone and "kwargs" not in card.backbone else None


def _names(pattern: str, weights: bool) -> list[str]:
    if not set(pattern) & set("*?["):
        ref = model_ref(pattern)
        if ref.is_saved:
            return [pattern]
        try:
            find_spec(ref)
        except UnknownModelError:
            if ref.kind not in ("registered", "timm"):
                raise
        else:
            return [pattern]
    return match_models(pattern, pretrained=weights, include_tags=weights or "." in pattern)


def size_text(size: int | Sequence[int]) -> str:
    """Formats ``(height, width)`` for a table: ``"224"``, or ``"HxW"`` if they differ."""
    height, width = (size, size) if isinstance(size, int) else (size[0], size[1])
    return str(height) if height == width else f"{height}x{width}"
