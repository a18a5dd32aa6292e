"""Attention layers of the zoo's own models; a mask at its identity initialisation doesn't change their output bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class HeadAttention(nn.Module):
    """Attention of already projected queries, keys and values, and an output projection.

    Args:
        width: width of the values and of the output.
        heads: attention heads.
        token_dim: width of the query tokens that a mask network reads.
        context_dim: width of the key tokens that a mask network reads.
        dropout: dropout of the attention weights.
    """

    def __init__(self, width: int, heads: int, token_dim: int, context_dim: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = heads, dropout
        self.token_dim, self.context_dim = token_dim, context_dim
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, tokens: Tensor, context: Tensor, allowed: Tensor | None = None
    ) -> Tensor:
        """Attends.

        Args:
            query: ``(B, Nq, D)``.
            key: ``(B, Nk, D)``.
            value: ``(B, Nk, width)``.
            tokens: ``(B, Nq, token_dim)``, the query tokens for a mask network.
            context: ``(B, Nk, context_dim)``, the key tokens for a mask network.
            allowed: bool ``(B, Nk)``, True where there is a key; None for all.

        Returns:
            ``(B, Nq, width)``.
        """
        query, key, value = (split_heads(x, self.num_heads) for x in (query, key, value))
        seen = None if allowed is None else allowed[:, None, None, :]
        heads = self.attend(query, key, value, tokens, context, seen, self.dropout if self.training else 0.0)
        out: Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))
        return out

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tokens: Tensor,
        context: Tensor,
        allowed: Tensor | None,
        dropout_p: float,
    ) -> Tensor:
        """Attends per head: ``(B, H, Nq, d)``, ``(B, H, Nk, d)`` and ``(B, H, Nk, dv)`` to ``(B, H, Nq, dv)``.

        ``allowed`` is ``(B, 1, 1, Nk)``.
        """
        return plain_attention(query, key, value, allowed, dropout_p, self.training)


#: Up to this many tokens, evaluation uses unfused attention, so that a fresh mask doesn't change the output bits: fused
#: kernels round sums differently.
DENSE_TOKENS = 512


def is_written_out(query: Tensor, key: Tensor, training: bool) -> bool:
    """Returns whether attention of ``(..., N, d)`` is unfused: for short sequences, except in training, for speed."""
    return not training and max(query.shape[-2], key.shape[-2]) <= DENSE_TOKENS


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, dropout_p: float, training: bool
) -> Tensor:
    """Attention without a mask; where it is unfused, with the operations of masked attention in the same order.

    Args:
        query: ``(B, H, Nq, d)``.
        key: ``(B, H, Nk, d)``.
        value: ``(B, H, Nk, dv)``.
        allowed: bool, broadcastable to ``(B, H, Nq, Nk)``; None for all.
        dropout_p: dropout probability of the weights, in training.
        training: whether the module is in training mode.
    """
    if not is_written_out(query, key, training):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, dropout_p=dropout_p)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if allowed is None:
        return scores.softmax(dim=-1) @ value
    weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return weights.masked_fill(~allowed, 0.0) @ value  # zeros without any key, as in training


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """Returns ``(B, heads, N, d)`` of ``(B, N, heads d)``."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def split_parts(tokens: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """Splits a joint projection ``(B, N, parts heads d)``, such as ``qkv``, into parts ``(B, heads, N, d)``."""
    return tokens.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def attend(attention: Any, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
    """Calls an ``nn.MultiheadAttention`` with ``batch_first``, with or without a learnable mask.

    Args:
        attention: the module.
        query: ``(B, Nq, C)``.
        key: ``(B, Nk, C)``.
        value: ``(B, Nk, C)``.
        allowed: bool ``(B, Nk)``, True where there is a key; None for all.

    Returns:
        ``(B, Nq, C)``.
    """
    if hasattr(attention, "lam"):
        padding = None if allowed is None else ~allowed
        written_out = is_written_out(query, key, attention.training)
        out: Tensor = attention(query, key, value, key_padding_mask=padding, need_weights=written_out)[0]
        return out
    # torch's own attention arranges the factors of its products differently, and so rounds differently.
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    projected = map(F.linear, (query, key, value), weights, biases)
    q, k, v = (split_heads(x, attention.num_heads) for x in projected)
    seen = None if allowed is None else allowed[:, None, None, :]
    dropout_p = attention.dropout if attention.training else 0.0
    heads = plain_attention(q, k, v, seen, dropout_p, attention.training)
    return attention.out_proj(heads.transpose(1, 2).flatten(2))
