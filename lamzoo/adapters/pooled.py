"""Masked versions of timm's attention layers with fewer keys than tokens, or fewer queries.

Hosts: PVTv2, Twins, Next-ViT, MViTv2, Hiera and SAM 2's Hiera, MobileNetV4 and V5, and the attention of a class token
in CaiT and CrossViT. The query factor of a mask is computed from the tokens of the queries, the key factor from the
reduced tokens that keys and values are made of. MViTv2 pools its projections instead, and its mask networks read these:
the pooled queries and keys of all heads side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.layers import to_2tuple
from timm.layers.attention2d import MultiQueryAttention2d
from timm.models.cait import Cait, ClassAttn
from timm.models.crossvit import CrossAttention
from timm.models.hiera import MaskUnitAttention
from timm.models.hieradet_sam2 import MultiScaleAttention as SamMultiScaleAttention
from timm.models.mvitv2 import MultiScaleAttention, cal_rel_pos_type, reshape_post_pool, reshape_pre_pool
from timm.models.nextvit import EfficientAttention
from timm.models.pvt_v2 import Attention as PvtAttention
from timm.models.twins import GlobalSubSampleAttn, LocallyGroupedAttn
from torch import Tensor, nn
from torch.nn import functional as F

from lamzoo.adapters.hosts import input_width
from lamzoo.adapters.staged import StagedTakeover, to_tokens
from lamzoo.layers.attention import split_heads, split_parts


class LamPvtAttention(StagedTakeover, PvtAttention):
    """PVTv2's ``Attention`` under a learnable mask."""

    @classmethod
    def widths(cls, attn: Any) -> tuple[int, int]:
        return attn.dim, attn.dim

    def forward(self, x: Tensor, feat_size: list[int]) -> Tensor:
        """Masked attention of ``x (B, N, C)`` to its spatial reduction; arguments and result as the host's."""
        reduced = x
        if self.sr is not None:
            image = x.transpose(1, 2).unflatten(2, tuple(feat_size))
            reduced = self.norm(to_tokens(self.sr(image if self.pool is None else self.pool(image))))
            reduced = reduced if self.act is None else self.act(reduced)
        return _attend_reduced(self, x, reduced)


class LamGlobalSubSampleAttn(StagedTakeover, GlobalSubSampleAttn):
    """The global attention of Twins under a learnable mask."""

    @classmethod
    def widths(cls, attn: Any) -> tuple[int, int]:
        return attn.dim, attn.dim

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Masked attention of ``x (B, N, C)`` to its spatial reduction; arguments and result as the host's."""
        reduced = x
        if self.sr is not None:
            reduced = self.norm(to_tokens(self.sr(x.transpose(1, 2).unflatten(2, tuple(size)))))
        return _attend_reduced(self, x, reduced)


class LamLocallyGroupedAttn(StagedTakeover, LocallyGroupedAttn):
    """The local attention of Twins, within windows, under a learnable mask."""

    @classmethod
    def fixed_length(cls, attn: Any, host: Any) -> int | None:
        return int(attn.ws) ** 2

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Masked self-attention of the windows of ``x (B, N, C)``; arguments and result as the host's."""
        rows, columns = size
        side = self.ws
        image = x.unflatten(1, (rows, columns))
        image = F.pad(image, (0, 0, 0, -columns % side, 0, -rows % side))
        # (B, rows, columns, C) -> (B W, side side, C)
        windows = image.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
        grid = windows.shape[:3]
        tokens = windows.flatten(0, 2).flatten(1, 2)
        out = self.attend_tokens(tokens, tokens, *split_parts(self.qkv(tokens), 3, self.num_heads))
        out = out.unflatten(0, grid).unflatten(3, (side, side)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return self.proj_drop(self.proj(out[:, :rows, :columns].flatten(1, 2)))


class LamEfficientAttention(StagedTakeover, EfficientAttention):
    """Next-ViT's ``EfficientAttention`` under a learnable mask."""

    @classmethod
    def widths(cls, attn: Any) -> tuple[int, int]:
        return attn.dim, attn.dim

    def forward(self, x: Tensor) -> Tensor:
        """Masked attention of ``x (B, N, C)`` to its averages over neighbours; result as the host's."""
        reduced = x if self.sr is None else self.norm(self.sr(x.transpose(1, 2))).transpose(1, 2)
        query, key, value = _project_apart(self.q, self.k, self.v, x, reduced, self.num_heads)
        return self.proj_drop(self.proj(self.attend_tokens(x, reduced, query, key, value)))


class LamMultiScaleAttention(StagedTakeover, MultiScaleAttention):
    """MViTv2's ``MultiScaleAttention`` under a learnable mask."""

    @classmethod
    def widths(cls, attn: Any) -> tuple[int, int]:
        return attn.dim_out, attn.dim_out

    @classmethod
    def reduction(cls, attn: Any) -> object:
        # The first block of a stage makes its keys of the larger feature map of the stage before.
        return None if attn.pool_q is None else to_2tuple(attn.pool_q.stride)

    def forward(self, x: Tensor, feat_size: list[int]) -> tuple[Tensor, list[int]]:
        """Masked attention of pooled queries to pooled keys, of ``x (B, N, C)``; arguments and result as the host's."""
        query, key, value = split_parts(self.qkv(x), 3, self.num_heads)
        query, query_size = self._pool(query, feat_size, self.pool_q, self.norm_q)
        key, key_size = self._pool(key, feat_size, self.pool_k, self.norm_k)
        value, _ = self._pool(value, feat_size, self.pool_v, self.norm_v)
        bias = None
        if self.rel_pos_type == "spatial":
            zeros = query.new_zeros(*query.shape[:3], key.shape[2])
            bias = cal_rel_pos_type(
                zeros, query, self.has_cls_token, query_size, key_size, self.rel_pos_h, self.rel_pos_w
            )
        queries, keys = (each.transpose(1, 2).flatten(2) for each in (query, key))
        out = self.attend_tokens(queries, keys, query, key, value, bias=bias)
        return self.proj(out + queries if self.residual_pooling else out), query_size

    def _pool(
        self, x: Tensor, feat_size: list[int], pool: nn.Module | None, norm: nn.Module | None
    ) -> tuple[Tensor, list[int]]:
        """Pools the heads ``(B, H, N, d)`` of a feature map; returns its new size as well."""
        if pool is not None:
            image, class_token = reshape_pre_pool(x, feat_size, self.has_cls_token)
            x, feat_size = reshape_post_pool(pool(image), self.num_heads, class_token)
        return x if norm is None else norm(x), feat_size


class LamMaskUnitAttention(StagedTakeover, MaskUnitAttention):
    """Hiera's ``MaskUnitAttention``, within mask units or global, under a learnable mask."""

    @classmethod
    def num_heads_of(cls, attn: Any) -> int:
        return int(attn.heads)

    @classmethod
    def reduction(cls, attn: Any) -> object:
        return attn.q_stride, attn.use_mask_unit_attn

    def forward(self, x: Tensor) -> Tensor:
        """Masked attention of ``x (B, N, C)``, with pooled queries at the start of a stage; result as the host's."""
        units = x.shape[1] // (self.q_stride * self.window_size) if self.use_mask_unit_attn else 1
        # Tokens of one place in all units follow one another: (B, places units, C) -> (B units, places, C)
        tokens = x.unflatten(1, (-1, units)).transpose(1, 2).flatten(0, 1)
        query, key, value = split_parts(self.qkv(tokens), 3, self.heads)
        queries = tokens
        if self.q_stride > 1:
            query = query.unflatten(2, (self.q_stride, -1)).amax(dim=2)
            queries = tokens.unflatten(1, (self.q_stride, -1)).amax(dim=1)
        out = self.attend_tokens(queries, tokens, query, key, value)
        return self.proj(out.unflatten(0, (-1, units)).transpose(1, 2).flatten(1, 2))


class LamSamMultiScaleAttention(StagedTakeover, SamMultiScaleAttention):
    """The attention of SAM 2's Hiera, within windows or global, under a learnable mask."""

    no_sharing = "the blocks of a stage have windows of several sizes"

    @classmethod
    def reduction(cls, attn: Any) -> object:
        return attn.q_pool is not None

    def forward(self, x: Tensor) -> Tensor:
        """Masked attention of windows ``x (B W, rows, columns, C)``, with pooled queries at the start of a stage."""
        tokens = x.flatten(1, 2)
        queries, grid = tokens, x.shape[1:3]
        query, key, value = split_parts(self.qkv(tokens), 3, self.num_heads)
        if self.q_pool is not None:
            image = query.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, grid)
            pooled = self.q_pool(image)
            query, grid = split_heads(to_tokens(pooled), self.num_heads), pooled.shape[2:]
            queries = to_tokens(self.q_pool(x.permute(0, 3, 1, 2)))
        out = self.attend_tokens(queries, tokens, query, key, value)
        return self.proj(out.unflatten(1, grid))


class LamMultiQueryAttention2d(StagedTakeover, MultiQueryAttention2d):
    """``MultiQueryAttention2d`` of MobileNetV4 and V5, whose heads share keys and values, under a learnable mask."""

    @classmethod
    def widths(cls, attn: Any) -> tuple[int, int]:
        return input_width(attn.query.proj), input_width(attn.key.proj)

    @classmethod
    def reduction(cls, attn: Any) -> object:
        return attn.query_strides, attn.kv_stride

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Masked attention of ``x (B, C, rows, columns)``; arguments and result as the host's."""
        to_query: Any = self.query
        to_key: Any = self.key
        queries, keys = _before_projection(to_query, x), _before_projection(to_key, x)
        query = split_heads(to_tokens(to_query.proj(queries)), self.num_heads)
        key = to_tokens(to_key.proj(keys)).unsqueeze(1).expand(-1, self.num_heads, -1, -1)
        value = to_tokens(self.value(x)).unsqueeze(1).expand(-1, self.num_heads, -1, -1)
        out = self.attend_tokens(to_tokens(queries), to_tokens(keys), query, key, value, bias=attn_mask)
        return self.output(out.transpose(1, 2).unflatten(2, queries.shape[-2:]))


class LamClassAttn(StagedTakeover, ClassAttn):
    """CaiT's ``ClassAttn``, of the class token to all tokens, under a learnable mask."""

    @classmethod
    def widths(cls, attn: Any) -> tuple[int, int]:
        return input_width(attn.q), input_width(attn.k)

    @classmethod
    def fixed_length(cls, attn: Any, host: Any) -> int | None:
        return host.pos_embed.shape[1] + 1 if isinstance(host, Cait) else None

    def forward(self, x: Tensor) -> Tensor:
        """Masked attention of the first token of ``x (B, N, C)`` to all; returns ``(B, 1, C)``."""
        query, key, value = _project_apart(self.q, self.k, self.v, x[:, :1], x, self.num_heads)
        return self.proj_drop(self.proj(self.attend_tokens(x[:, :1], x, query, key, value)))


class LamCrossAttention(StagedTakeover, CrossAttention):
    """CrossViT's ``CrossAttention``, of the class token of one branch to the other, under a learnable mask."""

    @classmethod
    def widths(cls, attn: Any) -> tuple[int, int]:
        return input_width(attn.wq), input_width(attn.wk)

    def forward(self, x: Tensor) -> Tensor:
        """Masked attention of the first token of ``x (B, N, C)`` to all; returns ``(B, 1, C)``."""
        query, key, value = _project_apart(self.wq, self.wk, self.wv, x[:, :1], x, self.num_heads)
        return self.proj_drop(self.proj(self.attend_tokens(x[:, :1], x, query, key, value)))


#: Class of timm's attention layer to the class that replaces it.
POOLED_TAKEOVERS: Mapping[type[nn.Module], type[StagedTakeover]] = {
    PvtAttention: LamPvtAttention,
    GlobalSubSampleAttn: LamGlobalSubSampleAttn,
    LocallyGroupedAttn: LamLocallyGroupedAttn,
    EfficientAttention: LamEfficientAttention,
    MultiScaleAttention: LamMultiScaleAttention,
    MaskUnitAttention: LamMaskUnitAttention,
    SamMultiScaleAttention: LamSamMultiScaleAttention,
    MultiQueryAttention2d: LamMultiQueryAttention2d,
    ClassAttn: LamClassAttn,
    CrossAttention: LamCrossAttention,
}


def _attend_reduced(attn: Any, x: Tensor, reduced: Tensor) -> Tensor:
    """Attends from all tokens to the reduced ones, by projections ``q`` and ``kv``."""
    query = split_heads(attn.q(x), attn.num_heads)
    key, value = split_parts(attn.kv(reduced), 2, attn.num_heads)
    return attn.proj_drop(attn.proj(attn.attend_tokens(x, reduced, query, key, value)))


def _project_apart(
    to_query: nn.Module, to_key: nn.Module, to_value: nn.Module, queries: Tensor, keys: Tensor, heads: int
) -> tuple[Tensor, ...]:
    tokens = ((to_query, queries), (to_key, keys), (to_value, keys))
    return tuple(split_heads(project(each), heads) for project, each in tokens)


def _before_projection(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Returns what the last layer of a projection, ``proj``, reads: ``x``, or its downsampled form."""
    for name, layer in layers.named_children():
        x = x if name == "proj" else layer(x)
    return x
