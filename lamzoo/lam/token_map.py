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
        shares: float ``(B, length)``, weight of each token in that average; those of a remaining token sum to one.
            None exactly where ``into`` is.
    """

    length: int
    kept: Tensor
    into: Tensor | None = None
    shares: Tensor | None = None

    @classmethod
    def averaging(cls, kept: Tensor, into: Tensor, weights: Tensor) -> TokenMap:
        """Returns the map that averages tokens, by weights that need not sum to one.

        Args:
            kept: int64 ``(B, K)``.
            into: int64 ``(B, length)``.
            weights: float ``(B, length)``, at least 0; a remaining token whose weights are all 0 becomes zero.
        """
        total = weights.new_zeros(kept.shape).scatter_add(1, into, weights)
        total = total.clamp_min(torch.finfo(weights.dtype).tiny)
        return cls(into.shape[1], kept, into, weights / total.gather(1, into))

    def __call__(self, tokens: Tensor) -> Tensor:
        """Maps ``(B, length, C)`` to ``(B, K, C)``, in the same dtype."""
        if self.into is None:
            return take(tokens, self.kept)
        assert self.shares is not None
        weighted = tokens * self.shares.unsqueeze(-1).to(tokens.dtype)
        few = tokens.new_zeros(self.kept.numel(), tokens.shape[-1])
        few = few.index_add(0, _rows(self.into, self.kept.shape[1]), weighted.flatten(0, 1))
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
        (into, shares), (later_into, later_shares) = self._averages(), later._averages()
        return TokenMap(
            self.length, kept, later_into.gather(1, into), shares * later_shares.to(shares.dtype).gather(1, into)
        )

    def spread(self, tokens: Tensor) -> Tensor:
        """Gives each token before an averaging map the remaining one that it is part of, ``(B, length, C)``."""
        assert self.into is not None
        return take(tokens, self.into)

    def places(self) -> Tensor:
        """Returns the remaining token that each token is part of, int64 ``(B, length)``; -1 for those that leave."""
        into, shares = self._averages()
        return into.masked_fill(shares == 0, -1)

    def _averages(self) -> tuple[Tensor, Tensor]:
        """Returns ``into`` and ``shares``; a token that leaves has share 0 in the first remaining one."""
        if self.into is not None:
            assert self.shares is not None
            return self.into, self.shares
        places = torch.arange(self.kept.shape[1], device=self.kept.device).expand_as(self.kept)
        into = places.new_zeros(self.kept.shape[0], self.length).scatter(1, self.kept, places)
        shares = torch.zeros(into.shape, device=into.device).scatter(1, self.kept, 1.0)
        return into, shares


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Returns the tokens ``(B, K, C)`` of ``(B, N, C)`` at int64 ``index (B, K)``."""
    # Of whole rows: on a CPU this is ten times as fast as torch.gather with an expanded index.
    few = tokens.flatten(0, 1).index_select(0, _rows(index, tokens.shape[1]))
    return few.unflatten(0, index.shape)


def _rows(index: Tensor, length: int) -> Tensor:
    """Returns the rows of a batch of ``length`` tokens a sample that ``index (B, K)`` names, ``(B K,)``."""
    first = torch.arange(0, index.shape[0] * length, length, device=index.device)
    return (index + first.unsqueeze(1)).flatten()
