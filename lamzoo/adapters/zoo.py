"""Learnable masks in the attention layers of the zoo's own models.

Modifications to the host: each :class:`~lamzoo.layers.attention.HeadAttention` is replaced by a subclass that takes
over its parameters and calls :func:`lamzoo.lam.lam_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from torch import Tensor, nn

from lamzoo.adapters.hosts import AttentionSite, HostTakeover, TakeoverAdapter, named, without_numbers
from lamzoo.errors import UnsupportedHostError
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
        """Attends as :meth:`HeadAttention.attend`, under the mask of ``tokens`` and ``context``."""
        attend = self.lam.attend_with_weights if is_written_out(query, key, self.training) else self.lam.attend
        present = None if allowed is None else allowed[:, 0, 0]
        out = attend(tokens, context, query, key, value, allowed=allowed, dropout_p=dropout_p, present=present)
        return out[0] if isinstance(out, tuple) else out


class ZooAdapter(TakeoverAdapter):
    """Masks :class:`~lamzoo.layers.attention.HeadAttention`, in any model."""

    takeovers: ClassVar[Mapping[type[nn.Module], type[HostTakeover]]] = {HeadAttention: LamHeadAttention}

    def sites(self, model: nn.Module) -> Iterator[AttentionSite]:
        """Yields every ``HeadAttention``; layers whose paths differ only in their numbers form a stack.

        Raises:
            UnsupportedHostError: a layer is a subclass, which may compute something else; names it.
        """
        for path, module in model.named_modules():
            if isinstance(module, HeadAttention):
                if type(module) is not HeadAttention:
                    raise UnsupportedHostError(
                        f"{named(path, module)} is an unknown subclass of HeadAttention; use HeadAttention itself, or "
                        "call add_lam on the parts of the model without it."
                    )
                yield _site(path, module)


def _site(path: str, module: HeadAttention) -> AttentionSite:
    return AttentionSite(
        path=path,
        stack=without_numbers(path),
        query_dim=module.token_dim,
        key_dim=module.context_dim,
        num_heads=module.num_heads,
    )
