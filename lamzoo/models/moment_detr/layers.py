"""The layers of Moment-DETR and QD-DETR; their attention is ``nn.MultiheadAttention``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lamzoo.layers.attention import attend


class InputProjection(nn.Sequential):
    """Projects features to tokens: twice norm, dropout and linear, with a ReLU in between (``n_input_proj = 2``)."""

    def __init__(self, features: int, width: int, dropout: float) -> None:
        super().__init__(
            nn.LayerNorm(features), nn.Dropout(dropout), nn.Linear(features, width), nn.ReLU(),
            nn.LayerNorm(width), nn.Dropout(dropout), nn.Linear(width, width),
        )  # fmt: skip


class Mlp(nn.Sequential):
    """Linear layers with ReLU in between."""

    def __init__(self, width: int, hidden: int, out: int, layers: int) -> None:
        widths = [width, *[hidden] * (layers - 1), out]
        parts: list[nn.Module] = []
        for number in range(layers):
            parts += [nn.Linear(widths[number], widths[number + 1]), nn.ReLU()]
        super().__init__(*parts[:-1])


def sine_positions(mask: Tensor, width: int, turns: float = 1.0) -> Tensor:
    """Returns DETR's sine position embeddings of a padded sequence, scaled to the length of each sample.

    Args:
        mask: bool ``(B, N)``, True where there is a token.
        width: width of the embeddings.
        turns: periods of the fastest sinusoid over that length.

    Returns:
        ``(B, N, width)``, float32.
    """
    index = mask.cumsum(dim=1, dtype=torch.float32)
    return sine_features(index / (index[:, -1:] + 1e-6), width, turns)


def sine_features(values: Tensor, width: int, turns: float = 1.0, temperature: float = 10_000.0) -> Tensor:
    """Returns alternating sines and cosines of values ``(...)`` from 0 to 1, with growing periods: ``(..., width)``."""
    step = torch.arange(width, dtype=torch.float32, device=values.device)
    angles = 2 * math.pi * turns * values.unsqueeze(-1) / temperature ** (2 * (step // 2) / width)
    return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1).flatten(-2)


class FeedForward(nn.Module):
    """Linear, ReLU, dropout, linear, followed by dropout, residual and norm."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, width), nn.Dropout(dropout)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns ``(B, N, C)`` for tokens ``(B, N, C)``."""
        return self.norm(tokens + self.layers(tokens))


class Attention(nn.Module):
    """``nn.MultiheadAttention`` followed by dropout, residual and norm; positions are added to queries and keys.

    Args:
        width: width of the tokens.
        heads: attention heads.
        dropout: dropout of the attention weights and of the output.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        context: Tensor | None = None,
        context_positions: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> Tensor:
        """Applies self-attention, or cross-attention to a context.

        Args:
            tokens: ``(B, N, C)``.
            positions: ``(B, N, C)``.
            context: ``(B, M, C)``; None for self-attention.
            context_positions: ``(B, M, C)``.
            allowed: bool ``(B, M)``, True where there is a key.

        Returns:
            ``(B, N, C)``.
        """
        query = tokens + positions
        if context is None:
            key, value = query, tokens
        else:
            key, value = context if context_positions is None else context + context_positions, context
        return self.norm(tokens + self.dropout(attend(self.attn, query, key, value, allowed)))


class EncoderLayer(nn.Module):
    """Self-attention, or attention to another modality, and a feed-forward network, each followed by a norm."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.feed_forward = FeedForward(width, hidden, dropout)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Arguments as for :class:`Attention`; returns ``(B, N, C)``."""
        out: Tensor = self.feed_forward(self.attention(*args, **kwargs))
        return out


class DecoderLayer(nn.Module):
    """Moment queries attend to each other and to the memory (Moment-DETR)."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = Attention(width, heads, dropout)
        self.cross_attention = Attention(width, heads, dropout)
        self.feed_forward = FeedForward(width, hidden, dropout)

    def forward(
        self, queries: Tensor, positions: Tensor, memory: Tensor, memory_positions: Tensor, allowed: Tensor
    ) -> Tensor:
        """Returns queries ``(B, Q, C)``, given their positions and a memory ``(B, N, C)`` with its positions."""
        queries = self.self_attention(queries, positions)
        queries = self.cross_attention(queries, positions, memory, memory_positions, allowed)
        return self.feed_forward(queries)


def initialise(model: nn.Module) -> None:
    """Initialises every matrix of a transformer as DETR (Glorot, uniform), except those of masks."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and ".lam." not in name:
            nn.init.xavier_uniform_(parameter)
