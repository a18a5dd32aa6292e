"""Losses of a joint transformer as a second stage: hard negatives of the batch (ALBEF), or groups of it (CLIP4Clip)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lamzoo.training.retrieval.contrastive import contrastive_loss


def matching_loss(
    model: Any,
    text: Tensor,
    video: Tensor,
    frame_mask: Tensor,
    dual: Tensor,
    positives: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Binary cross-entropy of the joint transformer on matching pairs and on hard negatives.

    This is ALBEF's (arXiv 2107.07651, section 3.2). Each text has one negative video and each video one negative text,
    drawn by :func:`hard_negatives`, so that two thirds of the pairs don't match.

    Args:
        model: a model of the family ``lam_clip4clip`` with ``similarity="tight"``.
        text: ``(B, D)``.
        video: ``(B, F, D)``.
        frame_mask: ``(B, F)``, bool.
        dual: similarities of the embeddings ``(B, B)``, texts in rows.
        positives: matching pairs ``(B, B)``, bool, symmetric, including the diagonal.
        generator: draws the negatives, on the CPU.

    Returns:
        The loss, a scalar, float32.
    """
    own = torch.arange(len(text), device=text.device)
    # Videos and texts that match everything have no negative.
    other_video = hard_negatives(dual, positives, generator)
    other_text = hard_negatives(dual.T, positives, generator)
    texts = torch.cat([own, own[other_video >= 0], other_text[other_text >= 0]])
    videos = torch.cat([own, other_video[other_video >= 0], own[other_text >= 0]])
    logits = model.match(text[texts], video[videos], frame_mask[videos])
    labels = torch.zeros_like(logits)
    labels[: len(own)] = 1
    return F.binary_cross_entropy_with_logits(logits, labels)


def group_loss(model: Any, text: Tensor, video: Tensor, frame_mask: Tensor, positives: Tensor, size: int) -> Tensor:
    """Contrastive loss of the joint transformer within groups of the batch, each text with each video of its group.

    It is CLIP4Clip's loss for this head (arXiv 2104.08860, equation 8) on a part of the pairs, so that its cost grows
    with the batch and not with its square.

    Args:
        model: as of :func:`matching_loss`, like the next three.
        text: ``(B, D)``.
        video: ``(B, F, D)``.
        frame_mask: ``(B, F)``, bool.
        positives: matching pairs ``(B, B)``, bool; those beside the diagonal are left out.
        size: pairs of a group; the last group may be smaller.

    Returns:
        The loss, a scalar, float32.
    """
    groups = torch.arange(len(text), device=text.device).split(size)
    texts = torch.cat([group.repeat_interleave(len(group)) for group in groups])
    videos = torch.cat([group.repeat(len(group)) for group in groups])
    logits = model.match(text[texts], video[videos], frame_mask[videos])
    losses = []
    for group, scores in zip(groups, logits.split([len(group) ** 2 for group in groups]), strict=True):
        others = positives[group][:, group] & (group[:, None] != group)
        scores = scores.unflatten(0, (len(group), -1)).masked_fill(others, float("-inf"))
        losses.append(len(group) * contrastive_loss(scores))
    return torch.stack(losses).sum() / len(text)


@torch.no_grad()
def hard_negatives(similarity: Tensor, positives: Tensor, generator: torch.Generator) -> Tensor:
    """Draws a negative for each row: the more similar, the likelier, by a softmax over the row without its positives.

    Args:
        similarity: ``(B, B)``, float, scaled by the temperature.
        positives: ``(B, B)``, bool.
        generator: random state, on the CPU, so that all devices draw the same.

    Returns:
        Columns, int64 ``(B,)``; -1 where a row has no negative.
    """
    scores = similarity.detach().float().cpu().masked_fill(positives.cpu(), float("-inf"))
    there = scores.isfinite().any(dim=1)
    drawn = torch.full((len(scores),), -1)
    if there.any():
        drawn[there] = scores[there].softmax(dim=1).multinomial(1, generator=generator)[:, 0]
    return drawn.to(similarity.device)
