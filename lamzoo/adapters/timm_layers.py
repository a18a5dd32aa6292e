"""Masked versions of the attention layers of timm's vision transformers, except for those within windows.

Each takes over the submodules and parameter names of timm's layer and calls :func:`lamzoo.lam.lam_attention` where timm
calls ``F.scaled_dot_product_attention``. A relative position bias is added to the scores after the mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import Attention, AttentionRope, DiffAttention, apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn
from torch.nn import functional as F

from lamzoo.adapters.hosts import HostTakeover
from lamzoo.adapters.mha import project_apart
from lamzoo.errors import MaskShapeError, UnsupportedHostError, class_name
from lamzoo.lam import Lam
from lamzoo.lam.fused import Projection, is_bare
from lamzoo.lam.resize import Grid
from lamzoo.lam.token_map import take
from lamzoo.lam.unmasked import Unmasked
from lamzoo.layers.attention import split_heads, split_parts


class LamAttention(HostTakeover):
    """timm's ``Attention`` under a learnable mask."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Masked self-attention of ``x (B, N, C)``; arguments and result as timm's ``Attention``."""
        return _self_attention(self, x, None, attn_mask, is_causal)

    def projection(self) -> Projection | None:
        return _projection(self)


class LamAttentionRope(HostTakeover):
    """timm's ``AttentionRope`` under a learnable mask."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Masked self-attention of ``x (B, N, C)``; arguments and result as timm's ``AttentionRope``."""
        return _self_attention(self, x, rope, attn_mask, is_causal)

    def projection(self) -> Projection | None:
        return _projection(self)


class LamEvaAttention(LamAttentionRope):
    """timm's ``EvaAttention`` under a learnable mask."""

    def reset_parameters(self) -> None:
        """Sets the biases to zero, as timm's ``EvaAttention`` does; called when weights are reinitialised."""
        if self.q_bias is not None:
            nn.init.zeros_(self.q_bias)
            nn.init.zeros_(self.v_bias)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Fills the buffer that is not in checkpoints; timm calls it after materialising a model from ``meta``."""
        if self.k_bias is not None:
            self.k_bias.zero_()


class LamBeitAttention(HostTakeover, BeitAttention):
    """BEiT's ``Attention`` under a learnable mask."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Masked self-attention of ``x (B, N, C)``; arguments and result as BEiT's ``Attention``."""
        query, key, value = _project(self, x, x)
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own = self._get_rel_pos_bias()
            bias = own if bias is None else own + bias
        return self.proj_drop(self.proj(attend_heads(self, x, x, query, key, value, bias=bias)))


class LamRelPosAttention(HostTakeover):
    """timm's ``RelPosAttention`` under a learnable mask."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """Masked self-attention of ``x (B, N, C)``; arguments and result as timm's ``RelPosAttention``."""
        query, key, value = _project(self, x, x)
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        out = attend_heads(self, x, x, self.q_norm(query), self.k_norm(key), value, bias=bias)
        return self.proj_drop(self.proj(out))


class LamDiffAttention(HostTakeover, DiffAttention):
    """timm's ``DiffAttention`` (arXiv 2410.05258) under a learnable mask.

    The mask acts on the scores of both softmaxes, before one is subtracted from the other. Each of the two counts as a
    head: with ``heads="per-head"`` they have masks of their own, ``2 H`` in all.
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Masked self-attention of ``x (B, N, C)``; arguments and result as timm's ``DiffAttention``."""
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        heads = _attend_differentially(self, x, query, key, value, attn_mask, is_causal)
        return self.proj_drop(self.proj(self.norm(heads)))


class LamParallelScalingBlock(HostTakeover, ParallelScalingBlock):
    """timm's ``ParallelScalingBlock`` (arXiv 2302.05442), whose attention a learnable mask acts on.

    The block projects the tokens for its MLP and its attention at once, and is taken over as a whole.
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """The block on ``x (B, N, C)``; arguments and result as timm's ``ParallelScalingBlock``."""
        tokens = self.in_norm(x)
        hidden, *parts = self.in_proj(tokens).split(self.in_split, dim=-1)
        query, key, value = (split_heads(part, self.num_heads) for part in parts)
        heads = _attend(self, tokens, tokens, self.q_norm(query), self.k_norm(key), value, attn_mask, is_causal)
        return _parallel_output(self, x, heads, hidden)


class LamDiffParallelScalingBlock(HostTakeover, DiffParallelScalingBlock):
    """timm's ``DiffParallelScalingBlock``, masked as :class:`LamDiffAttention`."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """The block on ``x (B, N, C)``; arguments and result as timm's ``DiffParallelScalingBlock``."""
        tokens = self.in_norm(x)
        hidden, query, key, value = self.in_proj(tokens).split(self.in_split, dim=-1)
        heads = _attend_differentially(self, tokens, query, key, value, attn_mask, is_causal)
        return _parallel_output(self, x, heads, hidden)


#: Class of timm's attention layer, or of a block that can't be parted from its attention, to its masked version.
VIT_TAKEOVERS: Mapping[type[nn.Module], type[HostTakeover]] = {
    Attention: LamAttention,
    AttentionRope: LamAttentionRope,
    EvaAttention: LamEvaAttention,
    BeitAttention: LamBeitAttention,
    RelPosAttention: LamRelPosAttention,
    DiffAttention: LamDiffAttention,
    ParallelScalingBlock: LamParallelScalingBlock,
    DiffParallelScalingBlock: LamDiffParallelScalingBlock,
}


def _self_attention(attn: Any, x: Tensor, rope: Tensor | None, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """Attends in a layer with ``qkv`` or three projections, and projects the heads."""
    if attn_mask is None and not is_causal and (heads := _attend_fused(attn, x, rope)) is not None:
        return _output(attn, x, heads)
    keys = attn.lam.key_tokens(x)
    query, key, value = _project(attn, x, keys)
    query, key = _rotate(attn, attn.q_norm(query), attn.k_norm(key), rope, value)
    groups = getattr(attn, "num_kv_groups", 1)
    if groups > 1:  # grouped-query attention: head h uses key head h // groups
        key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    return _output(attn, x, _attend(attn, x, keys, query, key, value, attn_mask, is_causal))


def _attend_differentially(
    attn: Any, x: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool
) -> Tensor:
    """Attends by the difference of two softmaxes; queries, keys, values and result are ``(B, N, E)``."""
    query, key = (split_heads(each, 2 * attn.num_heads) for each in (query, key))
    value = split_heads(value, attn.num_heads).repeat_interleave(2, dim=1)
    if attn_mask is not None and attn_mask.ndim == 4 and attn_mask.shape[1] > 1:
        attn_mask = attn_mask.repeat_interleave(2, dim=1)
    both = _attend(attn, x, x, attn.q_norm(query), attn.k_norm(key), value, attn_mask, is_causal)
    plus, minus = both.unflatten(-1, (attn.num_heads, 2, -1)).unbind(-2)
    heads = attn.sub_norm(plus - attn._compute_lambda().type_as(plus) * minus)
    return (heads * (1 - attn.lambda_init)).flatten(2)


def _parallel_output(block: Any, x: Tensor, heads: Tensor, hidden: Tensor) -> Tensor:
    """Returns the output of a block whose attention gave ``heads`` and whose MLP has the ``hidden`` activations."""
    if block.mlp_bias is not None:
        hidden = hidden + block.mlp_bias
    hidden = block.mlp_drop(block.mlp_act(hidden))
    if block.out_proj is None:
        out = block.attn_out_proj(heads) + block.mlp_out_proj(hidden)
    else:
        out = block.out_proj(torch.cat((heads, hidden), dim=-1))
    return x + block.drop_path(block.ls(out))


def _attend(
    attn: Any,
    x: Tensor,
    keys: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """Attends under the mask of a layer and timm's ``attn_mask``; returns the heads, ``(B, N, E)``."""
    if attn_mask is not None and attn_mask.ndim == 3:
        raise MaskShapeError(
            f"attn_mask has shape {tuple(attn_mask.shape)}, which timm reads as one mask per head; "
            "pass (B, 1, N, N) for one per sample or (1, H, N, N) for one per head."
        )
    if attn_mask is not None and attn.lam.shared.current.has_reduced:
        raise UnsupportedHostError(
            f"{class_name(attn.host_class)} got an attention mask of all tokens after some were merged or pruned; call "
            "lamzoo.remove_reduction(model) first, or leave the mask out."
        )
    boolean = attn_mask is not None and attn_mask.dtype == torch.bool
    allowed, bias = (attn_mask, None) if boolean else (None, attn_mask)
    return attend_heads(attn, x, keys, query, key, value, allowed=allowed, bias=bias, is_causal=is_causal)


def _output(attn: Any, x: Tensor, heads: Tensor) -> Tensor:
    """Returns the output of the layer of its heads, ``(B, N, E)``."""
    out = attn.norm(heads)
    if attn.gate is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out))


def attend_heads(
    attn: Any,
    x: Tensor,
    keys: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    grid: Grid | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attends under the mask of a timm layer; arguments as in :meth:`lamzoo.lam.Lam.attend`.

    Args:
        attn: the layer, which gives the mask, the dropout and, by default, the scale.
        x: tokens of the queries, ``(B, Nq, C)``.
        keys: tokens of the keys, ``(B, Nk, C)``.
        query: ``(B, H, Nq, d)``.
        key: ``(B, H, Nk, d)``.
        value: ``(B, H, Nk, dv)``.
        allowed: bool, broadcastable to ``(B, H, Nq, Nk)``.
        bias: float, likewise, added to the scores after the mask.
        is_causal: whether the queries attend to earlier keys only.
        grid: ``(rows, columns)`` of the keys, where the layer itself knows them.
        scale: of the scores before the mask.

    Returns:
        ``(B, Nq, H dv)``, before the output projection.
    """
    lam: Lam | Unmasked = attn.lam
    dropout_p = attn.attn_drop.p if attn.training and hasattr(attn, "attn_drop") else 0.0
    out = lam.attend(
        x, keys, query, key, value, grid=grid, allowed=allowed, bias=bias, is_causal=is_causal, dropout_p=dropout_p,
        scale=attn.scale if scale is None else scale,
    )  # fmt: skip
    return out.transpose(1, 2).flatten(2)


def _project(attn: Any, x: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
    """Returns the queries of some tokens, and the keys and values of others, each ``(B, H, N, d)``."""
    if attn.qkv is None:
        projections = zip((attn.q_proj, attn.k_proj, attn.v_proj), (x, keys, keys), strict=True)
        # Split by head dim, not by number of heads: grouped-query attention has fewer heads for keys and values.
        return tuple(each(tokens).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for each, tokens in projections)
    if keys is x:
        return split_parts(biased_qkv(attn, x), 3, attn.num_heads)
    qkv = attn.qkv
    if not is_bare(qkv):
        of_queries, of_keys = (split_parts(biased_qkv(attn, tokens), 3, attn.num_heads) for tokens in (x, keys))
        return (of_queries[0], *of_keys[1:])
    bias = _qkv_bias(attn)
    apart = project_apart(x, keys, qkv.weight, qkv.bias if bias is None else bias)
    return tuple(split_heads(each, attn.num_heads) for each in apart)


def _projection(attn: Any) -> Projection | None:
    qkv = attn.qkv
    if qkv is None or not is_bare(qkv) or getattr(attn, "num_kv_groups", 1) > 1:
        return None
    bias = _qkv_bias(attn)
    return Projection(qkv.weight, qkv.bias if bias is None else bias, attn.num_heads, attn.scale, (attn, qkv))


def _attend_fused(attn: Any, x: Tensor, rope: Tensor | None = None) -> Tensor | None:
    if rope is None and type(attn.q_norm) is type(attn.k_norm) is nn.Identity:
        return attn.attend_fused(x)
    return attn.attend_fused(
        x, lambda query, key: _rotate(attn, attn.q_norm(query), attn.k_norm(key), rope, like=query)
    )


def _qkv_bias(attn: Any) -> Tensor | None:
    """Returns the bias that the layer adds outside of ``qkv``, whose part for the keys is a buffer of zeros."""
    if getattr(attn, "q_bias", None) is None:
        return None
    return torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))


def biased_qkv(attn: Any, x: Tensor) -> Any:
    """Projects tokens ``(B, N, C)`` to ``(B, N, 3 E)`` with the biases that a layer may keep outside of ``qkv``."""
    bias = _qkv_bias(attn)
    if bias is None:
        return attn.qkv(x)
    return attn.qkv(x) + bias if attn.qkv_bias_separate else F.linear(x, attn.qkv.weight, bias)


def _rotate(attn: Any, query: Tensor, key: Tensor, rope: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys; a merged token has the rotation of the token whose place it takes."""
    if rope is None:
        return query, key
    prefix = attn.num_prefix_tokens
    rotated = []
    for x, places in zip((query, key), attn.lam.shared.places(), strict=True):
        rows = rope if places is None else _rows(rope, places[:, prefix:] - prefix)
        patches = apply_rot_embed_cat(x[:, :, prefix:], rows, half=attn.rotate_half)
        rotated.append(torch.cat([x[:, :, :prefix], patches], dim=2).type_as(like))
    return rotated[0], rotated[1]


def _rows(rope: Tensor, index: Tensor) -> Tensor:
    """Returns the rows ``(B, 1 | H, K, D)`` of rotations ``(N, D)``, ``(H, N, D)`` or ``(B, 1 | H, N, D)``."""
    while rope.ndim < 4:
        rope = rope.unsqueeze(0)
    flat = rope.transpose(1, 2).flatten(2).expand(index.shape[0], -1, -1)
    return take(flat, index).unflatten(-1, (rope.shape[1], -1)).transpose(1, 2)
