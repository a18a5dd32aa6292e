"""Adaptive token merging (ATM; Lee and Choi, arXiv 2505.15160)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from benchmarks.peers import Matching, Peer, Reduction, Seen, match, match_alternating, merged


@dataclass(frozen=True)
class ATM(Peer):
    """Merges all pairs of tokens that are more similar than a threshold, which falls with the depth of the layer.

    Layer-dependent thresholding: in layer ``l``, counted from 1, pairs merge whose similarity is above
    ``max(alpha - (exp(beta (l - 1)) - 1), least)``, because merges in early layers lose more. Size-distinctive
    matching: the error of a merge is proportional to ``n_i n_j / (n_i + n_j)`` times the cosine distance (theorem 1),
    so that in the last layers, from ``split`` on, the smaller half of the tokens is matched to the larger half and no
    two large tokens merge. Batch-adaptive merging: the samples of a batch merge the same number of pairs.

    Implemented from reviews that quote these formulae; the full text was not available. They leave open the number of
    pairs in a batch (taken: the mean over its samples, rounded, which for one sample is the threshold itself), the
    similarity (taken: as in ToMe, on which the method builds, like its matching in the earlier layers, proportional
    attention, and the place between attention and MLP), and the published values of the hyperparameters: the defaults
    of ``beta`` and ``split`` are the best of a few on a few hundred images of the zoo's tiny and micro models, and
    ``least`` bounds nothing.

    Attributes:
        alpha: threshold of the first layer, a cosine similarity; above 1, none of its pairs merges.
        beta: rate at which the threshold falls.
        least: lower bound of the threshold.
        split: share of the depth from which on matching is size-distinctive.
    """

    alpha: float
    beta: float = 0.02
    least: float = -1.0
    split: float = 0.5
    is_adaptive: ClassVar[bool] = True

    def threshold(self, index: int) -> float:
        """Returns the threshold of a layer, counted from 0."""
        return max(self.alpha - math.expm1(self.beta * index), self.least)

    def matching(self, seen: Seen) -> Matching:
        """Returns the pairs of a layer."""
        if seen.index < self.split * seen.depth:
            return match_alternating(seen)
        by_size = seen.known_sizes()[:, seen.num_prefix_tokens :].argsort(dim=1, stable=True) + seen.num_prefix_tokens
        half = by_size.shape[1] // 2
        return match(seen, by_size[:, :half], by_size[:, half:])

    def __call__(self, seen: Seen) -> Reduction | None:
        if seen.key.shape[2] - seen.num_prefix_tokens < 2:
            return None
        matching = self.matching(seen)
        above = (matching.similarity > self.threshold(seen.index)).sum(dim=1)
        count = round(above.float().mean().item())
        return merged(seen, *matching.best(count)) if count else None

    @classmethod
    def settings(cls, model: Any, **options: Any) -> Sequence[Self]:
        # Above 1, no pair of the first layers is similar enough; at the highest value, none of the last layer either.
        highest = math.ceil(10_000 * math.exp(options.get("beta", cls.beta) * (len(model.blocks) - 1))) + 10
        return [cls(alpha / 10_000, **options) for alpha in range(-10_000, highest + 1)]
