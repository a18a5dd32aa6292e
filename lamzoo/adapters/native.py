"""Learnable masks in attention without projections, which models of the zoo have where no host library has a layer.

Modifications to the host: each :class:`HeadAttention` is replaced by a subclass that takes over its parameters and
calls :func:`lamzoo.lam.lam_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamzoo.adapters.hosts import HostTakeover, Slot, replace_module


class HeadAttention(nn.Module):
    """Attention of queries, keys and values that are projected already, and a projection of its output.

    Args:
        width: of the values and of the output.
        heads: attention heads.
        token_dim: of the tokens that a mask network may read.
        context_dim: likewise, of those that are attended to.
        dropout: of the attention weights.
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
            tokens: ``(B, Nq, token_dim)``, what a mask network reads.
            context: ``(B, Nk, context_dim)``, likewise.
            allowed: bool ``(B, Nk)``, True where there is a key; None for all.

        Returns:
            ``(B, Nq, width)``.
        """
        query, key, value = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value))
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
        """Attends head by head: ``(B, H, Nq, d)``, ``(B, H, Nk, d)`` and ``(B, H, Nk, dv)`` to ``(B, H, Nq, dv)``.

        ``allowed`` is ``(B, 1, 1, Nk)``.
        """
        return plain_attention(query, key, value, allowed, dropout_p, self.training)


class LamHeadAttention(HostTakeover, HeadAttention):
    """:class:`HeadAttention` under a learnable mask."""

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
        """As the host's, under the mask of ``tokens`` and ``context``."""
        attend = self.lam.attend_with_weights if is_written_out(query, key, self.training) else self.lam.attend
        present = None if allowed is None else allowed[:, 0, 0]
        out = attend(tokens, context, query, key, value, allowed=allowed, dropout_p=dropout_p, present=present)
        return out[0] if isinstance(out, tuple) else out


#: Tokens up to which evaluation writes attention out, so that a fresh mask changes no bit: fused, sums round otherwise.
DENSE_TOKENS = 512


def is_written_out(query: Tensor, key: Tensor, training: bool) -> bool:
    """Says whether attention of ``(..., N, d)`` is: where it is short, except in training, which is faster fused."""
    return not training and max(query.shape[-2], key.shape[-2]) <= DENSE_TOKENS


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, dropout_p: float, training: bool
) -> Tensor:
    """Attention without a mask: where it is written out, by the operations of masked attention, in their order.

    Args:
        query: ``(B, H, Nq, d)``.
        key: ``(B, H, Nk, d)``.
        value: ``(B, H, Nk, dv)``.
        allowed: bool, broadcastable to ``(B, H, Nq, Nk)``; None for all.
        dropout_p: of the weights, in training.
        training: whether the module is.
    """
    if not is_written_out(query, key, training):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, dropout_p=dropout_p)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1) @ value


def slots(model: nn.Module) -> Iterator[Slot]:
    """Yields every :class:`HeadAttention` of a model, stack by stack: layers whose paths differ in one number alone."""
    stacks: dict[str, list[Slot]] = {}
    for path, module in model.named_modules():
        if isinstance(module, HeadAttention):
            stack = ".".join("*" if part.isdigit() else part for part in path.split("."))
            stacks.setdefault(stack, []).append(_slot(model, path, stack, module))
    for stack_slots in stacks.values():
        yield from stack_slots


def _slot(model: nn.Module, path: str, stack: str, module: HeadAttention) -> Slot:
    return Slot(
        path=path,
        stack=stack,
        query_dim=module.token_dim,
        key_dim=module.context_dim,
        num_heads=module.num_heads,
        like=module.out_proj.weight,
        attach=lambda lam: replace_module(model, path, LamHeadAttention.take_over(module, lam)),
    )
