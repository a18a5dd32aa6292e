"""Peers that select tokens: by class attention, at random, and evenly spaced."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from benchmarks.peers import Seen
from lamzoo.errors import ConfigError
from lamzoo.lam.token_map import TokenMap
from lamzoo.reduction.decisions import num_kept, select


@dataclass(frozen=True)
class EViT:
    """Keeps the tokens with the highest class attention, and fuses the rest (EViT, arXiv 2202.07800, section 3).

    Attributes:
        keep: share of a layer's tokens to keep, excluding the class token.
        at: layer indices, from 0.
    """

    keep: float
    at: tuple[int, ...]

    def __call__(self, seen: Seen) -> tuple[TokenMap, None] | None:
        """Selects by the class token's attention, averaged over heads; fuses the rest weighted by it (equation 3)."""
        if seen.index not in self.at:
            return None
        if not seen.num_prefix_tokens:
            raise ConfigError("EViT needs a class token, which this model lacks.")
        scores = (seen.query[:, :, :1] * seen.scale) @ seen.key.mT
        attention = scores.softmax(dim=-1).mean(dim=1).squeeze(1)
        return select(attention.log(), self.keep, "merge", seen.num_prefix_tokens), None


@dataclass(frozen=True)
class Random:
    """Keeps random tokens, drawn separately for each sample.

    Attributes:
        keep: share of a layer's tokens to keep, excluding class and register tokens.
        at: layer indices, from 0.
        generator: random generator.
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
    """Keeps tokens evenly spaced over the sequence, the same for each sample.

    Attributes:
        keep: share of a layer's tokens to keep, excluding class and register tokens.
        at: layer indices, from 0.
    """

    keep: float
    at: tuple[int, ...]

    def __call__(self, seen: Seen) -> tuple[TokenMap, None] | None:
        """Takes every n-th token, with fractional ``n``."""
        if seen.index not in self.at:
            return None
        batch, _, length, _ = seen.key.shape
        patches = length - seen.num_prefix_tokens
        size = num_kept(patches, self.keep)
        chosen = torch.arange(size) * patches // size + seen.num_prefix_tokens
        kept = torch.cat([torch.arange(seen.num_prefix_tokens), chosen]).to(seen.key.device)
        return TokenMap(length, kept.expand(batch, -1)), None
