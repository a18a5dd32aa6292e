"""Learnable masks in the attention layers of the zoo's own models.

Modifications to the host: each :class:`~lamzoo.layers.attention.HeadAttention` is replaced by a subclass that takes
over its parameters and calls :func:`lamzoo.lam.lam_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from lamzoo.adapters.hosts import HostTakeover, Slot, replace_module
from lamzoo.layers.attention import HeadAttention, is_written_out


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
