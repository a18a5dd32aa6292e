"""Which tokens of a layer merge: pairs that are alike, and that the layer's mask sees alike."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

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
    # One operator for the compiler, which would generate its kernels anew for each number of tokens. Exported programs
    # have no operators of lamzoo.
    is_opaque = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    find = _least_pairs if is_opaque else _find_least_pairs
    seen = None if right is None else right.detach()
    kept, into, few = find(tokens.detach(), count, num_prefix_tokens, sizes, seen)
    return TokenMap(tokens.shape[1], kept, into, sizes, few), few


def _find_least_pairs(
    tokens: Tensor, count: int, num_prefix_tokens: int, sizes: Tensor | None, right: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``kept`` and ``into`` of the map of :func:`match`, and the sizes of the remaining tokens."""
    with full_precision(tokens.device):
        patches = slice(num_prefix_tokens, None)
        rows = None if right is None else right.transpose(1, 2).flatten(2)[:, patches]
        least, partner = least_costs(tokens[:, patches], None if sizes is None else sizes[:, patches], rows)
        leaves = least.topk(count, dim=-1, largest=False, sorted=False).indices
        target = partner.gather(1, leaves) * 2 + (num_prefix_tokens + 1)
        kept, into = without(leaves * 2 + num_prefix_tokens, target, tokens.shape[1])
        ones = torch.ones(tokens.shape[:2], dtype=torch.float32, device=tokens.device) if sizes is None else sizes
        few = torch.zeros(kept.shape, dtype=torch.float32, device=tokens.device).scatter_add(1, into, ones)
        return kept, into, few


_least_pairs = torch.library.custom_op("lamzoo::least_pairs", _find_least_pairs, mutates_args=())


@_least_pairs.register_fake
def _(tokens: Tensor, count: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, length = tokens.shape[:2]
    places = tokens.new_empty(batch, length, dtype=torch.int64)
    kept = places.new_empty(batch, length - count)
    return kept, places, kept.new_empty(kept.shape, dtype=torch.float32)


class Part(NamedTuple):
    """Tokens side by side that merge with each other, padding included: patches, or one of several streams.

    Attributes:
        start: place of the first.
        length: number of tokens, at least 2.
        gone: number by which the part gets shorter.
        due: number of tokens that merge into others in each sample, int64 ``(B,)``. This may be more than ``gone``,
            where padding takes the places of content, or less, where padding leaves.
    """

    start: int
    length: int
    gone: int
    due: Tensor


def match_padded(
    tokens: Tensor, parts: Sequence[Part], sizes: Tensor, right: Tensor | None = None
) -> tuple[TokenMap, Tensor]:
    """As :func:`match`, within parts of padded samples: padding has size 0, merges with no token, and comes last.

    Args:
        tokens: ``(B, N, C)``, inputs of the layer's attention.
        parts: in order; tokens outside of them never merge.
        sizes: number of the stack's input tokens in each token, ``(B, N)``; 0 in padding.
        right: key factor of the layer's mask, ``(1 | B, Hm, N, R)``; None without a mask.

    Returns:
        The map, which averages by sizes, and the sizes of the remaining tokens, float32, 0 in padding.
    """
    with full_precision(tokens.device):
        batch, length, _ = tokens.shape
        rows = None if right is None else right.transpose(1, 2).flatten(2)
        places = torch.arange(length, device=tokens.device).expand(batch, -1)
        kept, into, end, gone = [], [], 0, 0
        for part in parts:
            here = slice(part.start, part.start + part.length)
            of_part = None if rows is None else rows[:, here]
            part_kept, part_into = _match_part(tokens[:, here], part.gone, part.due, sizes[:, here], of_part)
            kept += [places[:, end : part.start], part_kept + part.start]
            into += [places[:, end : part.start] - gone, part_into + (part.start - gone)]
            end, gone = here.stop, gone + part.gone
        kept_places = torch.cat([*kept, places[:, end:]], dim=1)
        into_places = torch.cat([*into, places[:, end:] - gone], dim=1)
        few = torch.zeros(kept_places.shape, dtype=torch.float32, device=tokens.device)
        few = few.scatter_add(1, into_places, sizes)
        return TokenMap.averaging(kept_places, into_places, sizes), few


def _match_part(tokens: Tensor, gone: int, due: Tensor, sizes: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns ``kept`` and ``into`` of the map of :func:`match_padded`, within one part."""
    there = sizes > 0
    left = tokens.shape[1] - gone
    least, partner = least_costs(tokens, sizes, rows, there)
    due = torch.maximum(due, there.sum(dim=1) - left)  # the remaining tokens have to fit
    leaves = (least.argsort(dim=1).argsort(dim=1) < due.unsqueeze(1)) & least.isfinite()
    stays = there.clone()
    stays[:, ::2] &= ~leaves
    count = stays.cumsum(dim=1)
    into = torch.where(stays, count, count[:, -1:] + (~stays).cumsum(dim=1)) - 1  # those that stay come first
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(into)
    kept = torch.empty_like(into).scatter(1, into, places)[:, :left]
    into[:, ::2] = torch.where(leaves, into.gather(1, 1 + 2 * partner), into[:, ::2])
    return kept, into.clamp_max(left - 1)  # padding weighs nothing, wherever it goes


def merged(tokens: Tensor, token_map: TokenMap) -> Tensor:
    """Averages tokens ``(B, N, C)`` to ``(B, K, C)``, with the average of their norms.

    The average of vectors of different directions is shorter than they are; merged tokens would shrink from layer to
    layer.
    """
    assert token_map.totals is not None
    dtype = torch.promote_types(tokens.dtype, torch.float32)  # norms of half-precision tokens overflow
    norms = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True, dtype=dtype)
    sums, norms = token_map.sums(torch.cat((tokens.to(dtype), norms), dim=-1)).split((tokens.shape[-1], 1), dim=-1)
    lengths = torch.linalg.vector_norm(sums, dim=-1, keepdim=True)
    # Opposite tokens average to nothing, and no factor gives that a length.
    lengths = lengths.maximum(norms / _LONGEST) * token_map.totals.unsqueeze(-1)
    return (sums * (norms / lengths.clamp_min(torch.finfo(dtype).tiny))).to(tokens.dtype)


def least_costs(
    tokens: Tensor, sizes: Tensor | None = None, rows: Tensor | None = None, present: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Finds the odd token that each even one merges into at the least cost; see :func:`match`.

    Args:
        tokens: ``(B, N, C)``, all of which may merge; in full precision (:func:`full_precision`).
        sizes: ``(B, N)``; None where all are one.
        rows: of these tokens in the mask's key factor, ``(1 | B, N, R)``; None without a mask.
        present: bool ``(B, N)``, False for padding; None without padding.

    Returns:
        The cost, infinite where one of the two is padding, and the number of the odd token, each ``(B, Ne)``.
    """
    pairs = None if present is None else present[:, ::2, None] & present[:, None, 1::2]
    tokens = tokens.detach().float()
    cost, squares = _distances(tokens)
    if rows is not None:
        seen, their_squares = _distances(rows.detach().float())
        seen = seen / _mean(seen, their_squares, pairs)  # 0 where rows are, as those of fresh masks
        cost = torch.addcmul(cost, seen, _mean(cost, squares, pairs), value=MASK_WEIGHT)
    if sizes is not None:
        inverse = sizes.reciprocal()
        cost = cost / (inverse[:, ::2, None] + inverse[:, None, 1::2])
    if pairs is not None:
        cost = cost.masked_fill(~pairs, torch.inf)
    least, partner = cost.min(dim=-1)
    return least, partner


def without(gone: Tensor, target: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Returns what remains without tokens that merge into others.

    Args:
        gone: places of these tokens, int64 ``(B, G)``.
        target: places of the tokens that they merge into, int64 ``(B, G)``.
        length: number of tokens, N.

    Returns:
        ``kept (B, N - G)`` and ``into (B, N)``, as in a :class:`~lamzoo.lam.token_map.TokenMap`.
    """
    # Those that stay are numbered from the last one to the first, and the largest numbers taken in order.
    numbers = torch.arange(length, 0, -1, device=gone.device).expand(gone.shape[0], -1).scatter(1, gone, 0)
    kept = numbers.topk(length - gone.shape[1], dim=1).indices
    into = (numbers > 0).cumsum(dim=1) - 1
    return kept, into.scatter(1, gone, into.gather(1, target))


def _distances(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the squared distances of even to odd tokens, ``(B, Ne, No)`` of ``(B, N, C)``, and the squared norms."""
    squares = tokens.square().sum(-1)
    sums = squares[:, ::2, None] + squares[:, None, 1::2]
    return torch.baddbmm(sums, tokens[:, ::2], tokens[:, 1::2].transpose(1, 2), alpha=-2), squares


def _mean(distances: Tensor, squares: Tensor, pairs: Tensor | None) -> Tensor:
    """Returns the mean distance in each sample, of bool ``pairs (B, Ne, No)`` or of all, ``(B, 1, 1)``; never 0."""
    if pairs is None:
        mean = distances.mean(dim=(1, 2), keepdim=True)
    else:
        mean = (distances * pairs).sum(dim=(1, 2), keepdim=True) / pairs.sum(dim=(1, 2), keepdim=True).clamp_min(1)
    # Where all tokens are equal, their distances are rounding errors, which the mean would make large.
    mean = torch.add(mean, squares.mean(dim=1)[:, None, None], alpha=2 * _ROUNDING)
    return mean.clamp_min(torch.finfo(distances.dtype).tiny)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Leaves ``torch.autocast``, if it is on: half precision is too coarse to compare distances and to rank by them."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
