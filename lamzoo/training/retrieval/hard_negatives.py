"""Matching loss of a joint transformer, with hard negatives from the batch (ALBEF, arXiv 2107.07651, section 3.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def matching_loss(
    model: Any,
    text: Tensor,
    video: Tensor,
    frame_mask: Tensor,
    dual: Tensor,
    positives: Tensor,
    generator: torch.Generator,
    *,
    mixed: bool = False,
) -> Tensor:
    """Binary cross-entropy of the joint transformer on matching pairs and on hard negatives.

    Each text has one negative video and each video one negative text, drawn by :func:`hard_negatives`, so that two
    thirds of the pairs don't match.

    Args:
        model: a model of the family ``lam_clip4clip`` with ``similarity="tight"``.
        text: ``(B, D)``.
        video: ``(B, F, D)``.
        frame_mask: ``(B, F)``, bool.
        dual: similarities of the embeddings ``(B, B)``, texts in rows.
        positives: matching pairs ``(B, B)``, bool, symmetric, including the diagonal.
        generator: draws the negatives, on the CPU.
        mixed: draw the negative texts uniformly; only the negative videos are hard.

    Returns:
        The loss, a scalar, float32.
    """
    own = torch.arange(len(text), device=text.device)
    # Videos and texts that match everything have no negative.
    other_video = hard_negatives(dual, positives, generator)
    other_text = hard_negatives(torch.zeros_like(dual) if mixed else dual.T, positives, generator)
    texts = torch.cat([own, own[other_video >= 0], other_text[other_text >= 0]])
    videos = torch.cat([own, other_video[other_video >= 0], own[other_text >= 0]])
    logits = model.match(text[texts], video[videos], frame_mask[videos])
    labels = torch.zeros_like(logits)
    labels[: len(own)] = 1
    return F.binary_cross_entropy_with_logits(logits, labels)


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
