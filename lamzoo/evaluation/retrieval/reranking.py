"""Two-stage retrieval: the embeddings select candidates, and a joint transformer orders them (arXiv 2107.07651)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lamzoo.errors import ConfigError
from lamzoo.evaluation.runtime import check_finite


def check_rerank(model: Any, count: int, top: int = 1) -> None:
    """Checks that a model can order candidates.

    Args:
        model: a model of the family ``lam_clip4clip``.
        count: number of candidates.
        top: number of them that are wanted.

    Raises:
        ConfigError: there are fewer candidates than wanted, or the model has no joint transformer.
    """
    if count < top:
        raise ConfigError(f"rerank is {count} candidates; it must be at least {top}")
    if model.similarity_type != "tight":
        raise ConfigError(
            f'rerank needs a model with a joint transformer, similarity="tight", and that of this model is '
            f'"{model.similarity_type}"; leave it out'
        )


def rerank_candidates(
    model: Any, texts: Tensor, videos: Tensor, frame_masks: Tensor, dual: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Orders the best candidates of the first stage by the joint transformer, in both directions.

    As in ALBEF, candidates are ordered by the joint transformer alone. They rank before all others, which keep the
    order of the first stage.

    Args:
        model: a model of the family ``lam_clip4clip`` with ``similarity="tight"``.
        texts: text embeddings ``(T, D)``.
        videos: frame embeddings ``(V, F, D)``, on the same device.
        frame_masks: ``(V, F)``, bool.
        dual: scores of the first stage ``(T, V)``, from :func:`lamzoo.evaluation.retrieval.evaluate.compare`.
        count: candidates of each query.

    Returns:
        Two matrices ``(T, V)``, float64 on the CPU, whose order within each text, and within each video, is that of the
        two stages.

    Raises:
        ConfigError: as of :func:`check_rerank`, or a score is not finite.
    """
    check_rerank(model, count)
    to_video = _reordered(dual, count, lambda text, video: _match(model, texts, videos, frame_masks, text, video))
    to_text = _reordered(dual.T, count, lambda video, text: _match(model, texts, videos, frame_masks, text, video))
    return to_video, to_text.T


def _match(model: Any, texts: Tensor, videos: Tensor, frame_masks: Tensor, text: Tensor, video: Tensor) -> Tensor:
    """Returns the joint logits of pairs, given by the numbers of texts and videos ``(P,)``, on the CPU."""
    most, device = model.head.max_pairs, texts.device
    parts = []
    for some, others in zip(text.to(device).split(most), video.to(device).split(most), strict=True):
        parts.append(model.match(texts[some], videos[others], frame_masks[others]).float().cpu())
    logits = torch.cat(parts)
    check_finite(logits)
    return logits


def _reordered(dual: Tensor, count: int, match: Any) -> Tensor:
    """Raises the candidates of each row above all other scores, in the order of their logits."""
    dual = dual.double()
    best = dual.argsort(dim=1, descending=True, stable=True)[:, :count]
    rows = torch.arange(len(dual))[:, None].expand_as(best)
    logits = match(rows.flatten(), best.flatten()).double().view_as(best)
    above = dual.amax(dim=1, keepdim=True) + 1 - logits.amin(dim=1, keepdim=True)
    return dual.scatter(1, best, logits + above)
