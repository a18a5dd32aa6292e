"""Peers that select tokens: by class attention, at random, and evenly spaced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from benchmarks.peers import Peer, Placement, Reduction, Seen
from lamzoo.errors import ConfigError
from lamzoo.lam.token_map import TokenMap
from lamzoo.reduction.decisions import num_kept, select


@dataclass(frozen=True)
class Selection(Peer):
    """Keeps a share of the tokens at some layers.

    Attributes:
        keep: share of a layer's tokens to keep, excluding class and register tokens.
        at: layer indices, from 0.
    """

    keep: float
    at: tuple[int, ...]

    @classmethod
    def settings(cls, model: Any, **options: Any) -> Sequence[Self]:
        depth = len(model.blocks)
        at = options.pop("at", tuple(sorted({depth * i // 4 for i in (1, 2, 3)})))
        return [cls(thousandths / 1000, at, **options) for thousandths in range(1, 1001)]


@dataclass(frozen=True)
class EViT(Selection):
    """Keeps the tokens with the highest class attention, and fuses the rest (EViT, arXiv 2202.07800, section 3).

    Between attention and MLP, as in the paper. The rest becomes one token, weighted by class attention (equation 3).
    """

    def __call__(self, seen: Seen) -> Reduction | None:
        if seen.index not in self.at:
            return None
        if not seen.has_class_token:
            raise ConfigError("EViT needs a class token, which this model lacks; take another peer.")
        return Reduction(select(seen.importance().log(), self.keep, "merge", seen.num_prefix_tokens))


@dataclass(frozen=True)
class Random(Selection):
    """Keeps random tokens, drawn separately for each sample.

    Attributes:
        generator: random generator.
    """

    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    placement: Placement = field(default="after", kw_only=True)

    def __call__(self, seen: Seen) -> Reduction | None:
        if seen.index not in self.at:
            return None
        noise = torch.rand(seen.key.shape[0], seen.key.shape[2], generator=self.generator)
        return Reduction(select(noise.to(seen.key.device), self.keep, "drop", seen.num_prefix_tokens))


@dataclass(frozen=True)
class Stride(Selection):
    """Keeps tokens evenly spaced over the sequence, the same for each sample."""

    placement: Placement = field(default="after", kw_only=True)

    def __call__(self, seen: Seen) -> Reduction | None:
        if seen.index not in self.at:
            return None
        batch, _, length, _ = seen.key.shape
        patches = length - seen.num_prefix_tokens
        size = num_kept(patches, self.keep)
        chosen = torch.arange(size) * patches // size + seen.num_prefix_tokens
        kept = torch.cat([torch.arange(seen.num_prefix_tokens), chosen]).to(seen.key.device)
        return Reduction(TokenMap(length, kept.expand(batch, -1)))
