"""Which tokens of a layer merge: pairs that are alike, and that the layer's mask sees alike."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lamzoo.lam.token_map import TokenMap

MASK_WEIGHT = 0.5  # of the distance in the mask's key factor, beside that of the tokens
_ROUNDING = 1e-5  # of squared distances in float32, relative to the squared norms that they are computed from
_LONGEST = 1000.0  # by which an average of tokens is lengthened at most


def match(
    tokens: Tensor, count: int, num_prefix_tokens: int, sizes: Tensor | None = None, right: Tensor | None = None
) -> tuple[TokenMap, Tensor]:
    """Finds the pairs of patches whose merge loses least, by bipartite matching (ToMe, arXiv 2210.09461, section 3).

    Patches with even places may merge into those with odd places, several of them into the same one. The cost of a
    merge is Ward's: the squared distance of the two tokens, times ``s_a s_b / (s_a + s_b)`` of their sizes. Distances
    are divided by their mean over the sample; that of the rows of the mask's key factor counts half beside that of the
    tokens, because tokens are only alike if they are seen alike.

    Args:
        tokens: ``(B, N, C)``, inputs of the layer's attention.
        count: number of patches that merge into others, at most half of all.
        num_prefix_tokens: class and register tokens at the start, which never merge.
        sizes: number of the stack's input tokens in each token, ``(B, N)``; None where all are one.
        right: key factor of the layer's mask, ``(1 | B, Hm, N, R)``; None without a mask.

    Returns:
        The map, which averages by sizes, and the sizes of the remaining tokens, ``(B, N - count)``, float32.
    """
    with _full_precision(tokens):
        batch, length, _ = tokens.shape
        wide = tokens.detach().float()
        if right is None:
            cost = _distances(wide, num_prefix_tokens)
        else:
            seen = right.detach().float().transpose(1, 2).flatten(2)
            cost = _over_mean(wide, num_prefix_tokens) + _over_mean(seen, num_prefix_tokens, MASK_WEIGHT)
        if sizes is None:
            sizes = torch.ones(batch, length, device=tokens.device)
        else:
            inverse = sizes[:, num_prefix_tokens:].reciprocal()
            cost = cost / (inverse[:, ::2, None] + inverse[:, None, 1::2])
        least, partner = cost.min(dim=-1)
        leaves = least.topk(count, dim=-1, largest=False, sorted=False).indices
        gone = leaves * 2 + num_prefix_tokens
        target = partner.gather(1, leaves) * 2 + (num_prefix_tokens + 1)
        # Those that stay are numbered from the last one to the first, and the largest numbers taken in order.
        numbers = torch.arange(length, 0, -1, device=tokens.device).expand(batch, -1).scatter(1, gone, 0)
        kept = numbers.topk(length - count, dim=1).indices
        into = (numbers > 0).cumsum(dim=1) - 1
        into = into.scatter(1, gone, into.gather(1, target))
        few = torch.zeros(kept.shape, device=tokens.device).scatter_add(1, into, sizes)
        return TokenMap(length, kept, into, sizes / few.gather(1, into)), few


def merges_of_samples(
    sizes: Tensor, num_prefix_tokens: int, count: int, keep: float, layers: int, layer: int
) -> Tensor:
    """Returns how many patches of each padded sample merge, so that it merges as it does alone.

    Args:
        sizes: number of the stack's input tokens in each token, ``(B, N)``; 0 in padding.
        num_prefix_tokens: class and register tokens at the start.
        count: number of tokens by which the batch gets shorter.
        keep: as for :func:`lamzoo.reduction.plan.merges_per_layer`, of which this is the value in one layer, without
            a cap, for the length of each sample.
        layers: likewise.
        layer: place of the layer among them.

    Returns:
        int64 ``(B,)``; at least as many as it takes for the remaining patches to fit into the shorter batch.
    """
    patches = sizes[:, num_prefix_tokens:]
    left, whole = (patches > 0).sum(dim=1), patches.sum(dim=1).long()
    gone = (whole - (keep * whole.double()).round().clamp_min(1).long()).clamp_min(0)
    due = [torch.div(place * gone, layers, rounding_mode="floor") for place in (layer, layer + 1)]
    own = torch.minimum(due[1] - due[0], left // 2)
    return torch.maximum(own, left - (patches.shape[1] - count))


def match_padded(
    tokens: Tensor, count: int, counts: Tensor, num_prefix_tokens: int, sizes: Tensor, right: Tensor | None = None
) -> tuple[TokenMap, Tensor]:
    """As :func:`match`, for padded samples: padding has size 0, merges with no patch, and fills the remaining places.

    Args:
        tokens: ``(B, N, C)``, inputs of the layer's attention.
        count: number of tokens by which the batch gets shorter.
        counts: number of patches of each sample that merge into others, int64 ``(B,)``; see
            :func:`merges_of_samples`.
        num_prefix_tokens: class and register tokens at the start, which never merge.
        sizes: number of the stack's input tokens in each token, ``(B, N)``; 0 in padding.
        right: key factor of the layer's mask, ``(1 | B, Hm, N, R)``; None without a mask.

    Returns:
        The map, which averages by sizes, and the sizes of the remaining tokens, ``(B, N - count)``, float32.
    """
    with _full_precision(tokens):
        batch, length, _ = tokens.shape
        there = sizes > 0
        even, odd = slice(num_prefix_tokens, None, 2), slice(num_prefix_tokens + 1, None, 2)
        pairs = there[:, even].unsqueeze(2) & there[:, odd].unsqueeze(1)
        cost = _over_mean(tokens.detach().float(), num_prefix_tokens, pairs=pairs)
        if right is not None:
            seen = right.detach().float().transpose(1, 2).flatten(2)
            cost = cost + _over_mean(seen, num_prefix_tokens, MASK_WEIGHT, pairs)
        ours, theirs = sizes[:, even].unsqueeze(2), sizes[:, odd].unsqueeze(1)
        cost = (cost * (ours * theirs / (ours + theirs).clamp_min(1))).masked_fill(~pairs, torch.inf)
        least, partner = cost.min(dim=-1)
        leaves = least.argsort(dim=-1).argsort(dim=-1) < counts.unsqueeze(1)
        leaving = torch.zeros_like(there)
        leaving[:, even] = leaves
        stays = there & ~leaving
        into = stays.cumsum(dim=1) - 1
        last = length - count - 1
        places = torch.arange(length, device=tokens.device).expand(batch, -1)
        # Tokens that leave write their own places behind the others, where nothing is read. What stays unwritten is
        # padding: tokens of no weight.
        kept = torch.full((batch, last + 2), length - 1, device=tokens.device)
        kept = kept.scatter(1, torch.where(stays, into, last + 1), places)[:, :-1]
        into[:, even] = torch.where(leaves, into.gather(1, num_prefix_tokens + 1 + 2 * partner), into[:, even])
        into = torch.where(there, into, last)
        few = torch.zeros(kept.shape, device=tokens.device).scatter_add(1, into, sizes)
        return TokenMap.averaging(kept, into, sizes), few


def merged(tokens: Tensor, token_map: TokenMap) -> Tensor:
    """Averages tokens ``(B, N, C)`` to ``(B, K, C)``, with the average of their norms.

    The average of vectors of different directions is shorter than they are; merged tokens would shrink from layer to
    layer.
    """
    dtype = torch.promote_types(tokens.dtype, torch.float32)  # norms of half-precision tokens overflow
    norms = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True, dtype=dtype)
    few, norms = token_map(torch.cat((tokens.to(dtype), norms), dim=-1)).split((tokens.shape[-1], 1), dim=-1)
    lengths = torch.linalg.vector_norm(few, dim=-1, keepdim=True)
    # Opposite tokens average to nothing, and no factor gives that a length.
    scale = norms / lengths.maximum(norms / _LONGEST).clamp_min(torch.finfo(dtype).tiny)
    return (few * scale).to(tokens.dtype)


def _distances(tokens: Tensor, num_prefix_tokens: int) -> Tensor:
    """Returns the squared distances of even to odd patches, ``(B, Ne, No)`` of ``(B, N, C)``."""
    patches = tokens[:, num_prefix_tokens:]
    squares = patches.square().sum(-1)
    sums = squares[:, ::2, None] + squares[:, None, 1::2]
    return torch.baddbmm(sums, patches[:, ::2], patches[:, 1::2].transpose(1, 2), alpha=-2)


def _over_mean(tokens: Tensor, num_prefix_tokens: int, weight: float = 1.0, pairs: Tensor | None = None) -> Tensor:
    """Returns the distances over their mean in each sample, of bool ``pairs (B, Ne, No)`` or of all, times a weight."""
    distances = _distances(tokens, num_prefix_tokens)
    if pairs is None:
        mean = distances.mean(dim=(1, 2), keepdim=True)
    else:
        mean = (distances * pairs).sum(dim=(1, 2), keepdim=True) / pairs.sum(dim=(1, 2), keepdim=True).clamp_min(1)
    # Where all tokens are equal, their distances are rounding errors, which the mean would make large.
    least = 2 * _ROUNDING * tokens[:, num_prefix_tokens:].square().sum(-1).mean(dim=1)
    return distances * (weight / mean.maximum(least[:, None, None]).clamp_min(torch.finfo(distances.dtype).tiny))


def _full_precision(tokens: Tensor) -> AbstractContextManager[object]:
    """Leaves ``torch.autocast``, if it is on: half precision is too coarse to compare distances."""
    device = tokens.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
