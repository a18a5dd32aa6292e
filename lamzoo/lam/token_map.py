"""Token maps: which tokens of a layer each token of the next one is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenMap:
    """Maps the tokens of a layer to the fewer tokens of the next one; applies to any per-token tensor.

    Attributes:
        length: number of tokens before.
        kept: int64 ``(B, K)``, indices of the kept tokens, ascending.
        merged: float ``(B, length)``, weights of the tokens averaged into one more token at the end, rows sum to one;
            None without such a token.
        shares: float ``(B, K, length)``, weights of the tokens averaged into each kept token, rows sum to one; None
            where kept tokens stay as they are.
    """

    length: int
    kept: Tensor
    merged: Tensor | None = None
    shares: Tensor | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        """Maps ``(B, length, C)`` to ``(B, K, C)``, or to ``(B, K + 1, C)`` with a merged token at the end."""
        if self.shares is not None:
            return self.shares.to(tokens.dtype) @ tokens
        return self._kept_rows(tokens)

    def factor(self, factor: Tensor) -> Tensor:
        """Maps a mask factor ``(1 | B, Hm, length, R)`` to ``(B, Hm, K | K + 1, R)``.

        A kept token that others are averaged into keeps its own row, which may encode its position.
        """
        heads = factor.shape[1]
        rows = factor.transpose(1, 2).flatten(2).expand(self.kept.shape[0], -1, -1)
        return self._kept_rows(rows).unflatten(-1, (heads, -1)).transpose(1, 2)

    def _kept_rows(self, tokens: Tensor) -> Tensor:
        few = tokens.gather(1, self.kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        if self.merged is None:
            return few
        return torch.cat([few, self.merged.unsqueeze(1).to(tokens.dtype) @ tokens], dim=1)
