"""Which tokens are kept: by their scores in evaluation, by straight-through decisions in training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lamzoo.lam.masks import FactoredMask
from lamzoo.lam.token_map import TokenMap, take
from lamzoo.reduction.config import Rest
from lamzoo.reduction.scores import standardise


def select(scores: Tensor, keep: float, rest: Rest, num_prefix_tokens: int, tokens: Tensor | None = None) -> TokenMap:
    """Keeps the tokens with the highest scores.

    Args:
        scores: ``(B, N)``, of all tokens.
        keep: share of the tokens after the prefix to keep, rounded up, at least one.
        rest: what to do with the others, as in :class:`lamzoo.PruneConfig`.
        num_prefix_tokens: tokens at the start that are always kept.
        tokens: ``(B, N, C)``, compared by ``rest="nearest"``, which needs them; not read otherwise.

    Returns:
        The token map, with as many tokens for each sample.
    """
    length = scores.shape[1]
    scores = scores[:, num_prefix_tokens:]
    size = num_kept(scores.shape[1], keep)
    order = scores.argsort(dim=1, descending=True, stable=True) + num_prefix_tokens
    prefix = torch.arange(num_prefix_tokens, device=order.device).expand(order.shape[0], -1)
    kept = torch.cat([prefix, order[:, :size].sort(dim=1).values], dim=1)
    if rest == "drop" or size == scores.shape[1]:
        return TokenMap(length, kept)
    if rest == "nearest":
        assert tokens is not None
        into = _nearest(tokens.detach(), kept, num_prefix_tokens)
        return TokenMap.averaging(kept, into, torch.ones(into.shape, dtype=torch.float32, device=into.device))
    places = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    into = torch.full((kept.shape[0], length), kept.shape[1], device=kept.device).scatter(1, kept, places)
    weights = F.pad(scores.float(), (num_prefix_tokens, 0)).scatter(1, kept, -torch.inf).softmax(dim=1)
    kept = torch.cat([kept, order[:, size : size + 1]], dim=1)  # the best of the others takes their place
    return TokenMap(length, kept, into, weights.scatter(1, kept[:, :-1], 1.0))


def num_kept(tokens: int, keep: float) -> int:
    """Returns how many tokens a share keeps: rounded up, at least one."""
    return max(1, math.ceil(round(keep * tokens, 6)))  # 0.7 * 10 is 7.000000000000001


def decide(scores: Tensor, keep: float, num_prefix_tokens: int, before: Tensor | None = None) -> Tensor:
    """Decides which tokens to keep in training, with a straight-through gradient to the scores.

    Scores are standardised over a sample's remaining tokens; the best ``keep`` of the batch are kept. Samples with more
    outstanding tokens keep more of them, and the overall level of a sample's scores, which decides nothing in
    evaluation, decides nothing here. The gradient is that of a sigmoid around the threshold, one standard deviation
    wide.

    Args:
        scores: ``(B, N)``, of all tokens.
        keep: share of the remaining tokens after the prefix to keep, over the batch, rounded up.
        num_prefix_tokens: tokens at the start that are always kept.
        before: ``(B, N)``, earlier decisions; None at the first pruned layer.

    Returns:
        ``(B, N)``, float32: 1 for kept tokens, 0 for tokens pruned here or earlier.
    """
    patches = scores[:, num_prefix_tokens:].float()
    before = None if before is None else before[:, num_prefix_tokens:]
    there = torch.ones_like(patches, dtype=torch.bool) if before is None else before.detach() > 0
    standard = standardise(patches, there, least=1e-2)  # of mask values, which are all equal at first
    last = (keep * there.sum() - 1e-6).ceil().clamp_min(1).long() - 1
    ordered = standard.detach().masked_fill(~there, -torch.inf).flatten().sort(descending=True).values
    threshold = ordered.take(last)  # an index would be a Python number, which compiled graphs can't hold
    soft = (standard - threshold).sigmoid()
    hard = (standard.detach() >= threshold).float()
    decisions = hard + (soft - soft.detach())
    decisions = decisions if before is None else decisions * before
    return F.pad(decisions, (num_prefix_tokens, 0), value=1.0)


def attend_to_kept(
    attention: Callable[..., Tensor],
    kept: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: FactoredMask,
    *,
    allowed: Tensor | None = None,
    dropout_p: float = 0.0,
    **options: Any,
) -> Tensor:
    """Attention to the kept tokens alone, with a gradient to the decisions that kept them.

    With weights ``w`` over all tokens, output ``out_i`` of query ``i`` passes the gradient ``w_ij (v_j - out_i)`` to
    the decision on token ``j``: the change of the output with more of that token. The gradient of the softmax over kept
    tokens is this divided by their total weight, which may be close to zero; it was tens of thousands of times larger
    than all other gradients.

    Args:
        attention: called as :func:`lamzoo.lam.lam_attention`, twice.
        kept: ``(B, N)``, from :func:`decide`.
        query: ``(B, H, N, d)``.
        key: ``(B, H, N, d)``.
        value: ``(B, H, N, dv)``.
        mask: of the layer.
        allowed: bool, broadcastable to ``(B, H, N, N)``, True = may attend.
        dropout_p: of the attention weights.
        **options: further options of ``attention``.

    Returns:
        ``(B, H, N, dv)``.
    """
    present = kept.detach()[:, None, None, :] > 0
    seen = present if allowed is None else present & allowed
    out = attention(query, key, value, mask, allowed=seen, dropout_p=dropout_p, **options)
    decisions = kept[:, None, :, None].to(value.dtype).expand(*value.shape[:3], 1)
    weighted = torch.cat([value.detach() * decisions, decisions], dim=-1)
    attended = attention(query.detach(), key.detach(), weighted, mask.detach(), allowed=allowed, **options)
    gain = attended[..., :-1] - out.detach() * attended[..., -1:]
    return out + (gain - gain.detach())


def _nearest(tokens: Tensor, kept: Tensor, num_prefix_tokens: int) -> Tensor:
    """Returns the place of the kept token nearest to each token, int64 ``(B, N)``; see :class:`TokenMap`."""
    unit = F.normalize(tokens.float(), dim=-1)
    alike = unit @ take(unit, kept).transpose(-2, -1)  # (B, N, K)
    places = torch.arange(kept.shape[1], device=kept.device)
    alike = alike.masked_fill(places < num_prefix_tokens, -2.0)  # nothing is averaged into class and register tokens
    return alike.argmax(dim=2).scatter(1, kept, places.expand_as(kept))  # a kept token belongs to itself
