"""Peers that select tokens: by class attention, by chance, and evenly spread."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from benchmarks.peers import Seen
from lamzoo.errors import ConfigError
from lamzoo.lam.token_map import TokenMap
from lamzoo.reduction.selection import num_kept, select


@dataclass(frozen=True)
class EViT:
    """Keeps what the class token attends to, and fuses the rest (EViT, arXiv 2202.07800, section 3).

    Attributes:
        keep: share of a layer's tokens, the class token apart, that stays.
        at: layers, from 0.
    """

    keep: float
    at: tuple[int, ...]

    def __call__(self, seen: Seen) -> tuple[TokenMap, None] | None:
        """The class token's attention, averaged over the heads, chooses; the rest is averaged by it (equation 3)."""
        if seen.index not in self.at:
            return None
        if not seen.num_prefix_tokens:
            raise ConfigError("EViT asks the class token, and this model has none.")
        scores = (seen.query[:, :, :1] * seen.scale) @ seen.key.mT
        attention = scores.softmax(dim=-1).mean(dim=1).squeeze(1)
        return select(attention.log(), self.keep, "merge", seen.num_prefix_tokens), None


@dataclass(frozen=True)
class Random:
    """Keeps tokens drawn by chance, others for each sample.

    Attributes:
        keep: share of a layer's tokens, class and register tokens apart, that stays.
        at: layers, from 0.
        generator: what draws.
    """

    keep: float
    at: tuple[int, ...]
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __call__(self, seen: Seen) -> tuple[TokenMap, None] | None:
        """Scores by uniform noise."""
        if seen.index not in self.at:
            return None
        noise = torch.rand(seen.key.shape[0], seen.key.shape[2], generator=self.generator)
        return select(noise.to(seen.key.device), self.keep, "drop", seen.num_prefix_tokens), None


@dataclass(frozen=True)
class Stride:
    """Keeps tokens evenly spread over the sequence, the same for each sample.

    Attributes:
        keep: share of a layer's tokens, class and register tokens apart, that stays.
        at: layers, from 0.
    """

    keep: float
    at: tuple[int, ...]

    def __call__(self, seen: Seen) -> tuple[TokenMap, None] | None:
        """Takes every n-th token, ``n`` a fraction."""
        if seen.index not in self.at:
            return None
        batch, _, length, _ = seen.key.shape
        patches = length - seen.num_prefix_tokens
        size = num_kept(patches, self.keep)
        chosen = torch.arange(size) * patches // size + seen.num_prefix_tokens
        kept = torch.cat([torch.arange(seen.num_prefix_tokens), chosen]).to(seen.key.device)
        return TokenMap(length, kept.expand(batch, -1)), None
