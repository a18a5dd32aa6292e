"""Token scores: how important each token of a layer is, from its mask and its attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lamzoo.lam.kernels.eager import attention_weights
from lamzoo.lam.masks import FactoredMask
from lamzoo.lam.ops import Op
from lamzoo.reduction.config import Score
from lamzoo.reduction.matching import full_precision


@dataclass(frozen=True)
class AttentionInputs:
    """Inputs of one layer's self-attention.

    Attributes:
        query: ``(B, H, N, d)``.
        key: ``(B, H, N, d)``.
        value: ``(B, H, N, dv)``.
        mask: of the layer.
        op: how the mask acts.
        scale: of the attention scores.
        present: bool ``(B, N)``, False for tokens that are pruned and still in place; None where all are present.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: FactoredMask
    op: Op
    scale: float
    present: Tensor | None = None


class Scorer(Protocol):
    """Scores the tokens of a layer.

    Args:
        layer: inputs of its attention. Tokens that are not present are ignored; their scores are undefined.
        has_class_token: whether token 0 is a class token.

    Returns:
        ``(B, N)``, float; higher is more important.
    """

    def __call__(self, layer: AttentionInputs, *, has_class_token: bool) -> Tensor: ...


def mask_importance(layer: AttentionInputs, *, has_class_token: bool) -> Tensor:
    """Mean mask value of each key over queries and heads; a :class:`Scorer`."""
    with full_precision(layer.query.device):  # values of multiplicative masks differ by less than half precision has
        importance = layer.mask.precise().importance(layer.present)
    return importance.mean(dim=1).expand(layer.query.shape[0], -1)


def summary_attention(layer: AttentionInputs, *, has_class_token: bool) -> Tensor:
    """Log-attention of the class token, or of the mean query, averaged over the heads; a :class:`Scorer`."""
    return _summary_weights(layer, has_class_token).mean(dim=1).log()


def summary_contribution(layer: AttentionInputs, *, has_class_token: bool) -> Tensor:
    """As :func:`summary_attention`, each head's weights times the norms of its values; a :class:`Scorer`."""
    return (_summary_weights(layer, has_class_token) * layer.value.norm(dim=-1)).mean(dim=1).log()


def redundancy(layer: AttentionInputs, *, has_class_token: bool) -> Tensor:
    """Dissimilarity of each token's value to those of every second token; a :class:`Scorer`.

    Every second token ranks above all others, as in ToMe's matching (arXiv 2210.09461, section 3), which compares keys.
    The others are scored by the sum of their dissimilarity and, at half its weight, the mean mask value of
    :func:`mask_importance`, each standardised over the sample. Where fewer than half of the tokens are kept, the mask
    alone ranks every second token.
    """
    values = F.normalize(layer.value.transpose(1, 2).flatten(2).float(), dim=-1)
    there = values.new_ones(values.shape[:2]) if layer.present is None else layer.present.float()
    places = there.cumsum(dim=1) - 1 - int(has_class_token)  # among present tokens; below 0: the class token
    others = there * (places.remainder(2) == 1) * (places > 0)
    certain = there * (places.remainder(2) == 0) * (places >= 0)
    alike = (values @ values.transpose(-2, -1)).masked_fill(certain.unsqueeze(1) == 0, -1.0).amax(dim=-1)
    important = mask_importance(layer, has_class_token=has_class_token).float()
    scores = standardise(-alike, others) + standardise(important, others) / 2
    return torch.where(others > 0, scores, _CERTAIN + standardise(important, certain))


_CERTAIN = 1e3  # standard deviations


def standardise(scores: Tensor, among: Tensor, least: float = 1e-3) -> Tensor:
    """Subtracts the mean of a subset of the scores and divides by its standard deviation.

    Args:
        scores: ``(B, N)``.
        among: ``(B, N)``, 1 for the subset and 0 elsewhere.
        least: smallest standard deviation to divide by, so that scores which differ by rounding alone stay close, with
            a finite gradient.

    Returns:
        ``(B, N)``.
    """
    count = among.sum(dim=1, keepdim=True).clamp_min(1)
    centred = scores - (scores * among).sum(dim=1, keepdim=True) / count
    variance = (centred.square() * among).sum(dim=1, keepdim=True) / count
    return (centred / (variance + least**2).sqrt()).clamp(-_CERTAIN / 10, _CERTAIN / 10)


SCORERS: dict[Score, Scorer] = {
    "mask": mask_importance,
    "attention": summary_attention,
    "attention-value": summary_contribution,
    "redundancy": redundancy,
}


def _summary_weights(layer: AttentionInputs, has_class_token: bool) -> Tensor:
    """Returns the attention weights of one query that summarises all tokens, ``(B, H, N)``."""
    query, left = (
        x[:, :, :1] if has_class_token else _mean_token(x, layer.present) for x in (layer.query, layer.mask.left)
    )
    allowed = None if layer.present is None else layer.present[:, None, None, :]
    weights = attention_weights(
        query, layer.key, FactoredMask(left, layer.mask.right),
        op=layer.op, allowed=allowed, bias=None, is_causal=False, scale=layer.scale,
    )  # fmt: skip
    return weights.squeeze(2).clamp_min(torch.finfo(weights.dtype).tiny)  # for the logarithm


def _mean_token(tokens: Tensor, present: Tensor | None) -> Tensor:
    """Returns the mean over present tokens, ``(B, H, 1, C)`` of ``(B, H, N, C)``."""
    if present is None:
        return tokens.mean(dim=2, keepdim=True)
    weights = present / present.sum(dim=1, keepdim=True).clamp_min(1)  # a sample may keep none of its patches
    return weights.to(tokens.dtype)[:, None, None, :] @ tokens
