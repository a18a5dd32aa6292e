"""Token Merging (ToMe, arXiv 2210.09461), implemented from the paper."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers import Seen
from lamzoo.lam.token_map import TokenMap


@dataclass(frozen=True)
class ToMe:
    """Merges the most similar pairs of tokens in each layer, weighted by the number of patches in each token.

    Attributes:
        r: tokens to merge in each layer, at most half of those that are not class or register tokens.
    """

    r: int

    def __call__(self, seen: Seen) -> tuple[TokenMap, Tensor] | None:
        """Bipartite soft matching by the cosine similarity of the keys (section 3); the bias is that of equation 1."""
        batch, _, length, _ = seen.key.shape
        prefix = seen.num_prefix_tokens
        leave = min(self.r, (length - prefix) // 2)
        if leave <= 0:
            return None
        metric = F.normalize(seen.key.mean(dim=1)[:, prefix:], dim=-1)
        ours, theirs = metric[:, ::2], metric[:, 1::2]  # two alternating sets of patches
        similarity, partner = (ours @ theirs.mT).max(dim=-1)
        closest = similarity.argsort(dim=-1, descending=True, stable=True)[:, :leave]
        leaves = torch.zeros(batch, length, dtype=torch.bool, device=metric.device)
        leaves.scatter_(1, prefix + 2 * closest, True)
        into = (~leaves).cumsum(dim=1) - 1  # new indices of the remaining tokens
        into[:, prefix::2] = torch.where(
            leaves[:, prefix::2], into.gather(1, prefix + 2 * partner + 1), into[:, prefix::2]
        )
        kept = leaves.to(torch.int8).argsort(dim=1, stable=True)[:, : length - leave]
        sizes = metric.new_ones(batch, length) if seen.bias is None else seen.bias.exp()
        few = sizes.new_zeros(kept.shape).scatter_add(1, into, sizes)
        return TokenMap.averaging(kept, into, sizes), few.log()
