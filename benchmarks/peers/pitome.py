"""Protect informative tokens before merging (PiToMe; Tran et al., NeurIPS 2024, arXiv 2405.16148)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from benchmarks.peers import Peer, Reduction, Seen, match, merged
from lamzoo.reduction.matching import full_precision


@dataclass(frozen=True)
class PiToMe(Peer):
    """Merges tokens that many others resemble, and protects those that stand alone, between attention and MLP.

    Section 3.2 and algorithm 1: a token's energy (equation 4) is high where many tokens have similar keys. Of the
    ``2k`` tokens with the highest energy, ordered by it, every second one, from the first on, merges into the most
    similar one of the others, as the mean weighted by sizes; all other tokens are protected. Every layer keeps the same
    share of its tokens, so ``k = N - N r``, and attention is proportional to the sizes.

    The paper leaves open: the features of a token (said to be its key, with reference to ToMe, whose average over heads
    is taken here), whether ``l`` in the margin counts from 0 (taken, so that the first margin is 0.9) or from 1, how
    ``N r`` is rounded (to the nearest), and the class token (taken to be outside of the graph, and never merged).

    Attributes:
        r: share of the tokens to keep in each layer, excluding class and register tokens, at least a half.
        alpha: height of the energy's lower bound, -alpha for dissimilar tokens.
        first_margin: cosine similarity above which tokens are neighbours in the first layer; it falls to zero linearly
            over the depth.
    """

    r: float
    alpha: float = 1.0
    first_margin: float = 0.9

    def margin(self, seen: Seen) -> float:
        """Returns the margin of a layer."""
        return self.first_margin * (1 - seen.index / seen.depth)

    def energy(self, seen: Seen) -> Tensor:
        """Computes the energy of the patches, between ``-alpha`` and 1, ``(B, N - prefix)``."""
        patches = seen.features[:, seen.num_prefix_tokens :]
        with full_precision(patches.device):
            similarity = patches @ patches.mT
        margin = self.margin(seen)
        bounded = self.alpha * (similarity.clamp_max(margin) - margin).expm1()
        of_pairs = torch.where(similarity >= margin, similarity, bounded)
        others = of_pairs.sum(dim=2) - of_pairs.diagonal(dim1=1, dim2=2)
        return others / patches.shape[1]

    def __call__(self, seen: Seen) -> Reduction | None:
        patches = seen.key.shape[2] - seen.num_prefix_tokens
        count = min(patches - round(patches * self.r), patches // 2)
        if count <= 0:
            return None
        order = self.energy(seen).argsort(dim=1, descending=True, stable=True) + seen.num_prefix_tokens
        pairs = match(seen, order[:, : 2 * count : 2], order[:, 1 : 2 * count : 2])
        return merged(seen, pairs.sources, pairs.partners)

    @classmethod
    def settings(cls, model: Any, **options: Any) -> Sequence[Self]:
        return [cls(r / 4000, **options) for r in range(2000, 4001)]
