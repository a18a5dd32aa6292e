"""Losses of Moment-DETR and QD-DETR: matched spans and classes, and clip ranking, as functions of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss

from lamzoo.data.grid_tokens import IGNORED
from lamzoo.data.moments.base import HIGHEST_GRADE
from lamzoo.errors import DivergedError, MissingExtraError
from lamzoo.models.moment_detr.model import MomentOutput
from lamzoo.models.moment_detr.spans import generalized_span_iou, to_boxes, to_edges
from lamzoo.training.moments.recipe import MomentWeights

if find_spec("scipy") is None:
    raise MissingExtraError("Matching moments needs SciPy, which is not installed; pip install 'lamzoo[moments]'.")

from scipy.optimize import linear_sum_assignment

_MOMENT, _NOTHING = 0, 1


@dataclass(frozen=True)
class MomentTargets:
    """Targets of a batch.

    Attributes:
        spans: for each sample ``(moments, 2)``, centre and width as fractions of the video.
        better: int64 ``(B, P)``, clips that match the sentence better than those in ``worse``.
        worse: int64 ``(B, P)``.
        grades: ``(B, N)``, relevance of each clip, 0 if irrelevant; up to 12 in QVHighlights, summed over three
            annotators.
        video_mask: bool ``(B, N)``, False at padding.
        words: int64 ``(B, N)``, the word spoken in each clip, 0 for none and -100 at padding; None if unknown.
    """

    spans: tuple[Tensor, ...]
    better: Tensor
    worse: Tensor
    grades: Tensor
    video_mask: Tensor
    words: Tensor | None = None


def moment_counts(targets: MomentTargets, queries: int) -> dict[str, Tensor]:
    """Counts the elements over which the losses of a batch are averaged.

    Args:
        targets: targets of the batch.
        queries: number of the model's queries, each of which predicts one moment.

    Returns:
        Int64 scalars: ``samples``; matched ``moments``; ``proposals``, pairs of a clip and a moment that contains it;
        and ``words``, clips with a known word.
    """
    device, words = targets.grades.device, targets.words
    moments = sum(min(queries, len(spans)) for spans in targets.spans)
    inside = [_inside(*pair).sum() for pair in zip(targets.spans, targets.video_mask, strict=True)]
    known = 0 if words is None else (words != IGNORED).sum()
    counts = {"samples": len(inside), "moments": moments, "proposals": torch.stack(inside).sum(), "words": known}
    return {name: torch.as_tensor(count, device=device) for name, count in counts.items()}


def moment_losses(
    found: MomentOutput, targets: MomentTargets, weights: MomentWeights, counts: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Computes the weighted losses (arXiv 2107.09609, section 4.2; arXiv 2303.13874, section 3.4).

    Args:
        found: the model's output.
        targets: targets of the batch.
        weights: weights of the losses.
        counts: as returned by :func:`moment_counts`, for a larger batch that contains this one; the losses of its parts
            then add up to that of the whole. None for this batch alone.

    Returns:
        ``span``, ``giou`` and ``label``, each over all decoder layers, and ``saliency``; QD-DETR's ``negative`` and
        ``contrast`` if the videos were also scored for other sentences; ``words`` if the model classifies words and
        they are known; ``proposal`` if the model proposes moments from clips. The total loss is their sum.
    """
    counts = moment_counts(targets, found.logits.shape[1]) if counts is None else counts
    counts = {name: count.clamp_min(1) for name, count in counts.items()}
    share = len(targets.spans) / counts["samples"]  # of the means over samples
    losses = {key: found.spans.new_zeros((), dtype=torch.float32) for key in ("span", "giou", "label")}
    for spans, logits in (*found.layers, (found.spans, found.logits)):
        for key, value in _set_losses(spans.float(), logits.float(), targets, weights, counts["moments"]).items():
            losses[key] = losses[key] + value
    losses["label"] = losses["label"] * share
    saliency = found.saliency.float()
    losses["saliency"] = weights.saliency * margin_loss(saliency, targets, weights.margin) * share
    if found.unrelated is not None:
        unrelated = found.unrelated.float()
        contrast = contrast_loss(saliency, unrelated, targets, weights.temperature)
        losses["negative"] = weights.saliency * negative_loss(unrelated, targets.video_mask) * share
        losses["contrast"] = weights.saliency * contrast * share
    if found.words is not None and targets.words is not None:
        said = F.cross_entropy(found.words.float().mT, targets.words, ignore_index=IGNORED, reduction="sum")
        losses["words"] = weights.words * said / counts["words"]
    if found.proposals is not None:
        losses["proposal"] = _proposal_loss(found.proposals, targets, weights, counts["proposals"])
    return losses


def match(
    spans: Tensor, logits: Tensor, targets: tuple[Tensor, ...], weights: MomentWeights
) -> list[tuple[Tensor, Tensor]]:
    """Assigns each moment to one query at the lowest total cost (Hungarian algorithm).

    Args:
        spans: ``(B, Q, 2)``, centre and width.
        logits: ``(B, Q, 2)``.
        targets: for each sample ``(moments, 2)``, at most ``Q``.
        weights: weights of the costs.

    Returns:
        For each sample the indices of the matched queries and of their moments.

    Raises:
        DivergedError: spans or logits are not finite.
    """
    if not (spans.isfinite().all() and logits.isfinite().all()):
        raise DivergedError(
            f"The training diverged: the model's spans or their scores are not finite. {DivergedError.way_out}"
        )
    assigned = []
    with torch.no_grad():
        for of_sample, scores, truth in zip(spans, logits.softmax(dim=-1), targets, strict=True):
            cost = weights.span * torch.cdist(of_sample, truth, p=1)
            cost -= weights.giou * generalized_span_iou(to_edges(of_sample), to_edges(truth))
            cost -= weights.label * scores[:, :1]
            queries, moments = linear_sum_assignment(cost.cpu().numpy())
            assigned.append((torch.as_tensor(queries), torch.as_tensor(moments)))
    return assigned


def _set_losses(
    spans: Tensor, logits: Tensor, targets: MomentTargets, weights: MomentWeights, moments: Tensor
) -> dict[str, Tensor]:
    """Returns the weighted losses of one layer: spans divided by the number of moments, labels averaged."""
    assigned = match(spans, logits, targets.spans, weights)
    classes = torch.full(logits.shape[:2], _NOTHING, device=logits.device)
    for sample, (queries, _) in enumerate(assigned):
        classes[sample, queries] = _MOMENT
    of_class = logits.new_tensor([1.0, weights.nothing])
    label = F.cross_entropy(logits.flatten(0, 1), classes.flatten(), of_class, reduction="none").mean()
    mine = torch.cat([of_sample[queries] for of_sample, (queries, _) in zip(spans, assigned, strict=True)])
    truth = torch.cat([of_sample[which] for of_sample, (_, which) in zip(targets.spans, assigned, strict=True)])
    return {**_span_losses(mine, truth, weights, moments), "label": weights.label * label}


def _span_losses(spans: Tensor, truth: Tensor, weights: MomentWeights, count: Tensor) -> dict[str, Tensor]:
    """Returns the weighted losses of spans ``(n, 2)``, centre and width, to targets ``(n, 2)``, divided by a count."""
    giou = generalized_box_iou_loss(to_boxes(to_edges(spans)), to_boxes(to_edges(truth)), reduction="sum")
    return {
        "span": weights.span * F.l1_loss(spans, truth, reduction="sum") / (2 * count),
        "giou": weights.giou * giou / count,
    }


def _inside(moments: Tensor, mask: Tensor) -> Tensor:
    """Returns which clips ``(N,)`` of a video have their centres in which moments: bool ``(N, moments)``."""
    middles = (torch.arange(len(mask), device=mask.device) + 0.5) / mask.sum()
    start, end = to_edges(moments).unbind(-1)
    return (middles[:, None] >= start) & (middles[:, None] <= end) & mask[:, None]


def _proposal_loss(proposals: Tensor, targets: MomentTargets, weights: MomentWeights, count: Tensor) -> Tensor:
    """Returns the distances of clip proposals ``(B, N, 2)`` to the moments that contain the clips' centres."""
    mine, truth = [], []
    for of_sample, moments, mask in zip(proposals.float(), targets.spans, targets.video_mask, strict=True):
        clips, which = _inside(moments, mask).nonzero(as_tuple=True)
        mine.append(of_sample[clips])
        truth.append(moments[which])
    losses = _span_losses(torch.cat(mine), torch.cat(truth), weights, count)
    return losses["span"] + losses["giou"]


def margin_loss(saliency: Tensor, targets: MomentTargets, margin: float) -> Tensor:
    """Returns the hinge loss of better clips ``(B, P)`` against worse ones, from saliencies ``(B, N)``."""
    better, worse = saliency.gather(1, targets.better), saliency.gather(1, targets.worse)
    return 2 * (margin + worse - better).clamp_min(0).mean()


def negative_loss(unrelated: Tensor, video_mask: Tensor) -> Tensor:
    """Returns the cross-entropy of clips ``(B, N)`` for an unrelated sentence, summed by video."""
    return (F.softplus(unrelated) * video_mask).sum(dim=1).mean()


def contrast_loss(saliency: Tensor, unrelated: Tensor, targets: MomentTargets, temperature: float) -> Tensor:
    """Contrasts, for each grade, clips of at least that grade with all others and with unrelated sentences.

    Args:
        saliency: ``(B, N)``.
        unrelated: ``(B, N)``, saliencies of the same videos for another sentence.
        targets: targets with grades.
        temperature: temperature of the softmax.
    """
    mask = targets.video_mask.repeat(1, 2)
    grades = torch.cat([targets.grades, torch.zeros_like(targets.grades)], dim=1)
    scores = torch.cat([saliency, unrelated], dim=1).masked_fill(~mask, -1e3) / temperature
    chances = scores.log_softmax(dim=1)
    total = scores.new_zeros(())
    for grade in range(1, HIGHEST_GRADE):
        good = (grades >= grade) & mask
        count = good.sum(dim=1)
        total = total - ((chances * good).sum(dim=1) / count.clamp_min(1)).mean()
    return total / HIGHEST_GRADE
