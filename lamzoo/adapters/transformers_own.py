"""Learnable masks in layers of Hugging Face transformers that compute their attention themselves.

Each attention layer of ViLT, FLAVA and TimeSformer is replaced by a subclass that takes over its parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.models.flava.modeling_flava import FlavaSelfAttention
from transformers.models.timesformer.modeling_timesformer import TimesformerSelfAttention
from transformers.models.vilt.modeling_vilt import ViltSelfAttention

from lamzoo.adapters.hosts import AttentionSite, HostTakeover, input_width
from lamzoo.adapters.transformers_vision import present_keys, read_mask
from lamzoo.layers.attention import split_heads, split_parts

Heads = tuple[Tensor] | tuple[Tensor, Tensor]


class LamSeparateAttention(HostTakeover):
    """Self-attention of ViLT and FLAVA, with a layer each for queries, keys and values, under a learnable mask."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> Heads:
        """Masked self-attention of ``hidden_states (B, N, C)``; arguments and result as those of the host's layer."""
        host: Any = self
        parts = [layer(hidden_states) for layer in (host.query, host.key, host.value)]
        query, key, value = (split_heads(each, host.num_attention_heads) for each in parts)
        return _attend(self, hidden_states, query, key, value, host.dropout, attention_mask, output_attentions)


class LamViltAttention(LamSeparateAttention, ViltSelfAttention):
    """ViLT's attention under a learnable mask."""


class LamFlavaAttention(LamSeparateAttention, FlavaSelfAttention):
    """FLAVA's attention under a learnable mask."""


class LamTimesformerAttention(HostTakeover, TimesformerSelfAttention):
    """TimeSformer's attention, over time or over space, under a learnable mask."""

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> Heads:
        """Masked self-attention of ``hidden_states (B, N, C)``; arguments and result as those of the host's layer."""
        query, key, value = split_parts(self.qkv(hidden_states), 3, self.num_heads)
        return _attend(self, hidden_states, query, key, value, self.attn_drop, None, output_attentions)


OWN_TAKEOVERS: Mapping[type[nn.Module], type[HostTakeover]] = {
    ViltSelfAttention: LamViltAttention,
    FlavaSelfAttention: LamFlavaAttention,
    TimesformerSelfAttention: LamTimesformerAttention,
}


def own_site(path: str, stack: str, module: Any) -> AttentionSite:
    """Returns the site of a layer of one of these classes."""
    width = input_width(module.qkv if isinstance(module, TimesformerSelfAttention) else module.query)
    return AttentionSite(
        path=path,
        stack=stack,
        query_dim=width,
        key_dim=width,
        num_heads=module.num_heads if hasattr(module, "num_heads") else module.num_attention_heads,
        watched=path,  # transformers checkpoints the forward pass of a block without its hooks
    )


def _attend(
    module: HostTakeover,
    tokens: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: Any,
    mask: Tensor | None,
    returns_weights: bool,
) -> Heads:
    lam = module.lam
    allowed, bias = read_mask(module, mask, key.shape[2])
    options: dict[str, Any] = {
        "allowed": allowed,
        "bias": bias,
        "dropout_p": dropout.p if module.training else 0.0,
        "present": present_keys(mask) if lam.has_positions else None,
    }
    if returns_weights:
        out, weights = lam.attend_with_weights(tokens, tokens, query, key, value, **options)
        return out.transpose(1, 2).flatten(2), weights
    return (lam.attend(tokens, tokens, query, key, value, **options).transpose(1, 2).flatten(2),)
