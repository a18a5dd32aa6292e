"""Token reduction by other people's methods, training-free, behind one interface: what pruning by the mask must beat.

A peer says, layer by layer, which :class:`TokenMap` the tokens go through behind the layer's block, the place where
:func:`lamzoo.prune_tokens` lets tokens go, too: equal counts cost equal GMACs. Each is written from its paper. They run
on plain timm ``VisionTransformer`` models and on those with masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lamzoo.lam import Lam, SharedState
from lamzoo.lam.token_map import TokenMap

__all__ = ["Peer", "Seen", "applied"]


@dataclass(frozen=True)
class Seen:
    """What a peer knows of a layer.

    Attributes:
        index: of the layer, from 0.
        query: ``(B, H, N, d)``.
        key: ``(B, H, N, d)``.
        scale: of the attention scores.
        num_prefix_tokens: class and register tokens, at the start.
        bias: what was added to the scores of the layer's keys, ``(B, N)``, if anything.
    """

    index: int
    query: Tensor
    key: Tensor
    scale: float
    num_prefix_tokens: int
    bias: Tensor | None


class Peer(Protocol):
    """A method of reduction."""

    def __call__(self, seen: Seen) -> tuple[TokenMap, Tensor | None] | None:
        """Returns what the layer's tokens go through and what is then added to the scores of the next layers' keys.

        Args:
            seen: the layer.

        Returns:
            The reduction and the bias, ``(B, K)`` or None; None where all tokens stay.
        """
        ...


@contextmanager
def applied(model: Any, peer: Peer) -> Iterator[Any]:
    """Reduces the tokens of a timm ``VisionTransformer`` by a peer while the context is open; yields the model."""
    run = _Run(model, peer)
    handles = [model.register_forward_pre_hook(run.begin)]
    for index, block in enumerate(model.blocks):
        handles += [
            block.register_forward_pre_hook(run.weigh, with_kwargs=True),
            block.attn.qkv.register_forward_hook(run.note),
            block.register_forward_hook(partial(run.reduce, index)),
        ]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


class _Run:
    """The hooks, and what they know of the pass that runs."""

    def __init__(self, model: Any, peer: Peer) -> None:
        self.peer = peer
        self.num_prefix_tokens: int = model.num_prefix_tokens
        self.shared: SharedState | None = next((m.shared for m in model.modules() if isinstance(m, Lam)), None)
        self.qkv = torch.empty(0)
        self.bias: Tensor | None = None

    def begin(self, model: nn.Module, args: Any) -> None:
        self.bias = None
        if self.shared is not None:
            self.shared.end()

    def weigh(self, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        return None if self.bias is None else (args, {**kwargs, "attn_mask": self.bias[:, None, None, :]})

    def note(self, qkv: nn.Module, args: Any, output: Tensor) -> None:
        self.qkv = output

    def reduce(self, index: int, block: Any, args: Any, tokens: Tensor) -> Tensor:
        attn = block.attn
        query, key, _ = self.qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        seen = Seen(index, attn.q_norm(query), attn.k_norm(key), attn.scale, self.num_prefix_tokens, self.bias)
        answer = self.peer(seen)
        if answer is None:
            return tokens
        reduction, self.bias = answer
        if self.shared is not None:
            self.shared.reduce(reduction)
        return reduction(tokens)
