"""Token maps: which tokens of a layer each token of the next one is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenMap:
    """Maps the tokens of a layer to the fewer tokens of a later one; applies to any per-token tensor.

    Attributes:
        length: number of tokens before.
        kept: int64 ``(B, K)``, the token whose place each remaining token takes.
        into: int64 ``(B, length)``, the remaining token that each token is averaged into; None where tokens are only
            selected: the others leave.
        weights: float ``(B, length)``, of each token in that average; None where all are one.
        totals: float ``(B, K)``, sums of these weights, none of them 0; None where all are one, as of a new order.
    """

    length: int
    kept: Tensor
    into: Tensor | None = None
    weights: Tensor | None = None
    totals: Tensor | None = None

    @classmethod
    def averaging(cls, kept: Tensor, into: Tensor, weights: Tensor) -> TokenMap:
        """Returns the map that averages tokens by weights.

        Args:
            kept: int64 ``(B, K)``.
            into: int64 ``(B, length)``.
            weights: float ``(B, length)``, at least 0; a remaining token whose weights are all 0 becomes zero.
        """
        totals = weights.new_zeros(kept.shape).scatter_add(1, into, weights)
        return cls(into.shape[1], kept, into, weights, totals.clamp_min(torch.finfo(weights.dtype).tiny))

    def __call__(self, tokens: Tensor) -> Tensor:
        """Maps ``(B, length, C)`` to ``(B, K, C)``, in the same dtype; averages are taken in float32 at least."""
        if self.into is None:
            return take(tokens, self.kept)
        sums = self.sums(tokens.to(torch.promote_types(tokens.dtype, torch.float32)))
        return (sums if self.totals is None else sums / self.totals.unsqueeze(-1)).to(tokens.dtype)

    def sums(self, tokens: Tensor) -> Tensor:
        """Returns the sums of which an averaging map takes the averages, ``(B, K, C)`` of ``(B, length, C)``."""
        assert self.into is not None
        if self.weights is not None:
            tokens = tokens * self.weights.unsqueeze(-1)
        few = tokens.new_zeros(self.kept.numel(), tokens.shape[-1])
        few = few.index_add(0, _rows(self.into, self.kept.shape[1]), tokens.flatten(0, 1))
        return few.unflatten(0, self.kept.shape)

    def factor(self, factor: Tensor) -> Tensor:
        """Maps a mask factor ``(1 | B, Hm, length, R)`` to ``(B, Hm, K, R)``, averaging the rows of averaged tokens."""
        heads = factor.shape[1]
        rows = factor.transpose(1, 2).flatten(2).expand(self.kept.shape[0], -1, -1)
        return self(rows).unflatten(-1, (heads, -1)).transpose(1, 2)

    def then(self, later: TokenMap) -> TokenMap:
        """Returns the map from the tokens before this one to those after ``later``."""
        kept = self.kept.gather(1, later.kept)
        if self.into is None and later.into is None:
            return TokenMap(self.length, kept)
        before, after = self._averaging(), later._averaging()
        assert before.into is not None
        assert after.into is not None
        weights = before.weights
        if after.weights is not before.totals:  # where tokens weigh as many as they are made of, they stay
            share = _or_ones(after.weights, after.into) / _or_ones(before.totals, before.kept)
            weights = _or_ones(weights, before.into) * share.gather(1, before.into)
        return TokenMap(self.length, kept, after.into.gather(1, before.into), weights, after.totals)

    def spread(self, tokens: Tensor) -> Tensor:
        """Gives each token before an averaging map the remaining one that it is part of, ``(B, length, C)``."""
        assert self.into is not None
        return take(tokens, self.into)

    def places(self) -> Tensor:
        """Returns the remaining token that each token is part of, int64 ``(B, length)``; -1 for those that leave."""
        averaging = self._averaging()
        assert averaging.into is not None
        return averaging.into if averaging.weights is None else averaging.into.masked_fill(averaging.weights == 0, -1)

    def _averaging(self) -> TokenMap:
        """Returns the same map with ``into``: a token that leaves has weight 0 in the first remaining one."""
        if self.into is not None:
            return self
        places = torch.arange(self.kept.shape[1], device=self.kept.device).expand_as(self.kept)
        into = places.new_zeros(self.kept.shape[0], self.length).scatter(1, self.kept, places)
        weights = torch.zeros(into.shape, dtype=torch.float32, device=into.device).scatter(1, self.kept, 1.0)
        return TokenMap(self.length, self.kept, into, weights)


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Returns the tokens ``(B, K, C)`` of ``(B, N, C)`` at int64 ``index (B, K)``."""
    # Of whole rows: on a CPU this is ten times as fast as torch.gather with an expanded index.
    few = tokens.flatten(0, 1).index_select(0, _rows(index, tokens.shape[1]))
    return few.unflatten(0, index.shape)


def _rows(index: Tensor, length: int) -> Tensor:
    """Returns the rows of a batch of ``length`` tokens a sample that ``index (B, K)`` names, ``(B K,)``."""
    if index.shape[0] > 1:
        index = index + torch.arange(0, index.shape[0] * length, length, device=index.device).unsqueeze(1)
    return index.flatten()


def _or_ones(weights: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones(like.shape, dtype=torch.float32, device=like.device) if weights is None else weights
