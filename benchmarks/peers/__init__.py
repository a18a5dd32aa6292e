"""Published training-free token-reduction methods behind one interface, as baselines for pruning by the mask.

For each layer, a peer returns a :class:`TokenMap` for the tokens after the layer's block, where
:func:`lamzoo.prune_tokens` also prunes: equal token counts cost equal GMACs. Each method is implemented from its paper.
They run on timm ``VisionTransformer`` models, plain or with masks.
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
    """The information about a layer that a peer receives.

    Attributes:
        index: index of the layer, from 0.
        query: queries ``(B, H, N, d)``.
        key: keys ``(B, H, N, d)``.
        scale: scale of the attention scores.
        num_prefix_tokens: number of class and register tokens, which come first.
        bias: bias added to the scores of the layer's keys, ``(B, N)``, if any.
    """

    index: int
    query: Tensor
    key: Tensor
    scale: float
    num_prefix_tokens: int
    bias: Tensor | None


class Peer(Protocol):
    """A token-reduction method."""

    def __call__(self, seen: Seen) -> tuple[TokenMap, Tensor | None] | None:
        """Returns the reduction after a layer, and the bias on the scores of the following layers' keys.

        Args:
            seen: the layer.

        Returns:
            The reduction and the bias, ``(B, K)`` or None; None if all tokens are kept.
        """
        ...


@contextmanager
def applied(model: Any, peer: Peer) -> Iterator[Any]:
    """Reduces the tokens of a timm ``VisionTransformer`` with a peer inside the context; yields the model."""
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
    """The hooks and their state during a forward pass."""

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
