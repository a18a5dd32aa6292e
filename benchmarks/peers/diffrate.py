"""Pruning and merging at rates of their own in each layer (DiffRate; Chen et al., ICCV 2023, arXiv 2305.17997)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

import lamzoo
from benchmarks.peers import Peer, Reduction, Seen, applied, match, merged, num_patches
from lamzoo.errors import ConfigError

Rates = TypeVar("Rates", bound="DiffRate")


@dataclass(frozen=True)
class DiffRate(Peer):
    """Prunes the least important tokens of each layer and merges the next ones, between attention and MLP.

    Token sorting and discrete proxy (figure 3): tokens are sorted by the attention of the class token. The ``prune``
    least important ones leave, and each of the ``merge`` least important of the others merges into the most similar one
    of those that remain, by cosine similarity.

    The authors find the numbers of all layers by gradient descent on relaxed rates, in three epochs of ImageNet. That
    takes more than minutes on a CPU, so :meth:`searched` finds them by a random search on training images instead.
    Taken as in ToMe: the features that are compared (keys), averages weighted by sizes, and proportional attention.
    Without a class token, importance is the mean attention of all tokens. With a mask, attention is that under it.

    Attributes:
        prune: tokens to prune in each layer.
        merge: tokens to merge in each layer. Both are cut to what leaves at least half of the patches, pruning first.
    """

    prune: tuple[int, ...]
    merge: tuple[int, ...]

    def __call__(self, seen: Seen) -> Reduction | None:
        patches = seen.key.shape[2] - seen.num_prefix_tokens
        most = patches // 2
        pruned = min(self.prune[seen.index], most)
        count = min(self.merge[seen.index], most - pruned)
        if pruned + count <= 0:
            return None
        importance = seen.importance()[:, seen.num_prefix_tokens :]
        order = importance.argsort(dim=1, stable=True) + seen.num_prefix_tokens
        dropped, sources, rest = order.split([pruned, count, patches - pruned - count], dim=1)
        pairs = match(seen, sources, rest)
        return merged(seen, pairs.sources, pairs.partners, dropped)

    @classmethod
    def settings(cls, model: Any, **options: Any) -> Sequence[Self]:
        """Returns unsearched settings, which only merge, as many tokens in each layer."""
        depth = len(model.blocks)
        totals = range(depth * (num_patches(model) // 2), -1, -1)
        return [cls((0,) * depth, _even(total, depth), **options) for total in totals]

    @classmethod
    def searched(
        cls, model: Any, images: Tensor, gmacs: float, *, steps: int = 100, seed: int = 0, **options: Any
    ) -> Self:
        """Searches the numbers of all layers that change the model's output least.

        Starts with merges alone, as many in each layer. Each step moves some tokens from one layer or operation to
        another, fills the budget with merges, and keeps the change if the KL divergence to the model with all tokens
        falls.

        Args:
            model: timm ``VisionTransformer`` with a classifier.
            images: training images ``(B, 3, H, W)``, preprocessed.
            gmacs: budget for one image, in GMACs.
            steps: number of changes to try.
            seed: seed of the changes.
            **options: further arguments of the constructor.

        Raises:
            ConfigError: no setting fits the budget.
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.inference_mode():
            whole = model(images).log_softmax(dim=-1)

            def divergence(peer: Self) -> float:
                with applied(model, peer):
                    few = model(images).log_softmax(dim=-1)
                return F.kl_div(few, whole, reduction="batchmean", log_target=True).item()

            start = cls.settings(model, **options)
            fitting = bisect_right(start, gmacs, key=partial(_gmacs, model))
            if fitting == 0:
                raise ConfigError(
                    f"gmacs={gmacs}: merging half of the patches in every layer costs {_gmacs(model, start[0]):.4f}; "
                    "raise the budget."
                )
            best = start[fitting - 1]
            least = divergence(best)
            for _ in range(steps):
                changed = _filled(model, _moved(best, generator), gmacs, generator)
                now = divergence(changed)
                if now < least:
                    best, least = changed, now
        return best


def _gmacs(model: Any, peer: DiffRate) -> float:
    with applied(model, peer):
        return lamzoo.profile(model).gmacs


def _even(total: int, depth: int) -> tuple[int, ...]:
    """Spreads a total over layers, the earlier ones first."""
    each, more = divmod(total, depth)
    return tuple(each + (layer < more) for layer in range(depth))


def _moved(peer: Rates, generator: torch.Generator) -> Rates:
    """Moves up to four tokens from one layer or operation to another."""
    counts = [*peer.prune, *peer.merge]
    source = _draw([place for place, count in enumerate(counts) if count], generator)
    target = _draw([place for place in range(len(counts)) if place != source], generator)
    moved = min(counts[source], _draw([1, 2, 3, 4], generator))
    counts[source] -= moved
    counts[target] += moved
    return _with_counts(peer, counts)


def _filled(model: Any, peer: Rates, gmacs: float, generator: torch.Generator) -> Rates:
    """Adds merges in random layers up to the budget, or removes those that it leaves room for."""
    depth = len(peer.merge)
    while _gmacs(model, peer) > gmacs:
        peer = _changed_merge(peer, _draw(range(depth), generator), 1)
    while merging := [layer for layer in range(depth) if peer.merge[layer]]:
        fewer = _changed_merge(peer, _draw(merging, generator), -1)
        if _gmacs(model, fewer) > gmacs:
            break
        peer = fewer
    return peer


def _changed_merge(peer: Rates, layer: int, by: int) -> Rates:
    merge = list(peer.merge)
    merge[layer] += by
    return replace(peer, merge=tuple(merge))


def _with_counts(peer: Rates, counts: Sequence[int]) -> Rates:
    depth = len(peer.merge)
    return replace(peer, prune=tuple(counts[:depth]), merge=tuple(counts[depth:]))


def _draw(choices: Sequence[int], generator: torch.Generator) -> int:
    return choices[int(torch.randint(len(choices), (), generator=generator))]
