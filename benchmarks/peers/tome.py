"""Token Merging (ToMe; Bolya et al., ICLR 2023, arXiv 2210.09461)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from benchmarks.peers import Peer, Reduction, Seen, match_alternating, merged, num_patches


@dataclass(frozen=True)
class ToMe(Peer):
    """Merges the most similar pairs of tokens in each layer, between attention and MLP (section 3).

    Bipartite soft matching: tokens alternate between two sets, each of the first finds the one of the second whose key
    has the highest cosine similarity, and the ``r`` most similar pairs merge into their mean, weighted by sizes. Keys
    are averaged over heads (table 1). Attention is proportional to the sizes (equation 1).

    The paper leaves open how many tokens merge where a constant ``r`` doesn't fill a budget; ``extra`` does. Sets
    alternate over the patches alone and remaining tokens keep their order; in the appendix they alternate over the
    whole sequence, whose two sets are put one behind the other. Accuracies of the two differ by some 0.1 points, in
    both directions.

    Attributes:
        r: tokens to merge in each layer, at most half of those that are not class or register tokens.
        extra: number of layers, from the first on, in which one more token merges.
    """

    r: int
    extra: int = 0

    def __call__(self, seen: Seen) -> Reduction | None:
        most = (seen.key.shape[2] - seen.num_prefix_tokens) // 2
        count = min(self.r + (seen.index < self.extra), most)
        if count <= 0:
            return None
        match = match_alternating(seen)
        return merged(seen, *match.best(count))

    @classmethod
    def settings(cls, model: Any, **options: Any) -> Sequence[Self]:
        depth = len(model.blocks)
        totals = range(depth * (num_patches(model) // 2), -1, -1)
        return [cls(*divmod(total, depth), **options) for total in totals]
