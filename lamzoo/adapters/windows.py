"""Masked versions of timm's attention layers within windows: Swin v1 and v2, SAM's ViT, MaxViT and CoAtNet.

A window is a sequence of its own: one mask network a layer reads the tokens of each window, and its table, with
``keys="position"``, is over the places in a window, resized with the window. The host's relative position bias, and its
mask where windows are shifted over the edge of the image, are added to the scores after the learnable mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from timm.layers import apply_rot_embed_cat
from timm.models.maxxvit import Attention2d, AttentionCl, TransformerBlock2d
from timm.models.swin_transformer import WindowAttention
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from timm.models.swin_transformer_v2_cr import WindowMultiHeadAttention
from timm.models.vision_transformer_sam import Attention as SamAttention
from timm.models.vision_transformer_sam import get_decomposed_rel_pos_bias
from torch import Tensor, nn
from torch.nn import functional as F

from lamzoo.adapters.hosts import HostTakeover, TokenLayout
from lamzoo.adapters.timm_layers import attend_heads, biased_qkv
from lamzoo.lam.resize import Grid
from lamzoo.layers.attention import split_heads, split_parts


class LamWindowAttention(HostTakeover, WindowAttention):
    """Swin's ``WindowAttention`` under a learnable mask."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Masked self-attention of windows ``x (B W, N, C)``; arguments and result as Swin's ``WindowAttention``."""
        query, key, value = split_parts(self.qkv(x), 3, self.num_heads)
        return _attend_windows(self, x, query, key, value, self._get_rel_pos_bias(), mask, self.scale)


class LamWindowAttentionV2(HostTakeover, WindowAttentionV2):
    """Swin v2's ``WindowAttention``, of cosines, under a learnable mask."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Masked self-attention of windows ``x (B W, N, C)``; arguments and result as Swin v2's ``WindowAttention``."""
        query, key, value = split_parts(biased_qkv(self, x), 3, self.num_heads)
        query, key = _cosines(query, key, self.logit_scale)
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, 2)
        bias = 16 * table[self.relative_position_index].permute(2, 0, 1).sigmoid()
        return _attend_windows(self, x, query, key, value, bias.unsqueeze(0), mask, scale=1.0)


class LamWindowMultiHeadAttention(HostTakeover, WindowMultiHeadAttention):
    """``WindowMultiHeadAttention`` of timm's ``swinv2_cr`` models, of cosines, under a learnable mask."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Masked self-attention of windows ``x (B W, N, C)``; arguments and result as ``WindowMultiHeadAttention``."""
        query, key, value = split_parts(self.qkv(x), 3, self.num_heads)
        query, key = _cosines(query, key, self.logit_scale.view(-1, 1, 1))
        bias = self._relative_positional_encodings()
        return _attend_windows(self, x, query, key, value, bias, mask, scale=1.0)


class LamSamAttention(HostTakeover):
    """SAM's ``Attention``, within windows or of all patches, under a learnable mask."""

    def forward(self, x: Tensor) -> Tensor:
        """Masked self-attention of windows or images ``x (B, rows, columns, C)``; result as SAM's ``Attention``."""
        grid = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2)
        query, key, value = split_parts(self.qkv(x), 3, self.num_heads)
        query, key = self.q_norm(query), self.k_norm(key)
        bias = None
        if self.use_rel_pos:
            bias = get_decomposed_rel_pos_bias(query.flatten(0, 1), self.rel_pos_h, self.rel_pos_w, grid, grid)
            bias = bias.unflatten(0, query.shape[:2])
        elif self.rope is not None:
            rope = self.rope.get_embed()
            query, key = (apply_rot_embed_cat(each, rope).type_as(value) for each in (query, key))
        heads = attend_heads(self, x, x, query, key, value, bias=bias, grid=grid)
        return self.proj_drop(self.proj(heads)).unflatten(1, grid)


class LamAttention2d(HostTakeover):
    """``Attention2d`` of MaxViT and CoAtNet under a learnable mask."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """Masked self-attention of ``x (B, C, rows, columns)``; arguments and result as ``Attention2d``."""
        grid = (x.shape[2], x.shape[3])
        tokens = x.flatten(2).transpose(1, 2)
        qkv = self.qkv(x).flatten(2).transpose(1, 2)
        heads = _attend_partition(self, tokens, qkv, grid, shared_rel_pos)
        return self.proj_drop(self.proj(heads.transpose(1, 2).unflatten(2, grid)))


class LamAttentionCl(HostTakeover):
    """``AttentionCl`` of MaxViT under a learnable mask."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """Masked self-attention of ``x (B, rows, columns, C)``; arguments and result as ``AttentionCl``."""
        grid = (x.shape[1], x.shape[2])
        heads = _attend_partition(self, x.flatten(1, 2), self.qkv(x).flatten(1, 2), grid, shared_rel_pos)
        return self.proj_drop(self.proj(heads.unflatten(1, grid)))


#: Class of timm's attention layer to the class that replaces it.
WINDOW_TAKEOVERS: Mapping[type[nn.Module], type[HostTakeover]] = {
    WindowAttention: LamWindowAttention,
    WindowAttentionV2: LamWindowAttentionV2,
    WindowMultiHeadAttention: LamWindowMultiHeadAttention,
    SamAttention: LamSamAttention,
    Attention2d: LamAttention2d,
    AttentionCl: LamAttentionCl,
}

_SHIFTED = "its windows shift from layer to layer, and with them its tokens"
_PARTITIONED = "blocks and grids alternate, and with them the tokens of a window"
_MIXED = "some layers attend within windows, others to all patches"
_NARROWER = "its layers differ in their number of heads"


def window_layout(model: nn.Module, path: str) -> TokenLayout | None:
    """Returns the layout of the window that a layer attends within; None if the layer is none of this file."""
    attn: Any = model.get_submodule(path)
    kind = getattr(attn, "host_class", type(attn))
    if kind not in WINDOW_TAKEOVERS:
        return None
    at = path.rpartition(".")[0]
    block: Any = model.get_submodule(at)
    if kind is SamAttention:
        blocks: Any = model.get_submodule(at.rpartition(".")[0])
        host: Any = model.get_submodule(at.rpartition("blocks.")[0].rstrip("."))
        size = block.window_size
        mixed = len({each.window_size for each in blocks}) > 1
        return _layout((size, size) if size > 0 else host.patch_embed.grid_size, _MIXED if mixed else None)
    if kind not in (Attention2d, AttentionCl):
        return _layout(attn.window_size, _SHIFTED)
    if not isinstance(block, TransformerBlock2d):
        return _layout(block.partition_size, _PARTITIONED)
    blocks = model.get_submodule(at.rpartition(".")[0])
    heads = {each.attn.num_heads for each in blocks if isinstance(each, TransformerBlock2d)}
    no_sharing = _NARROWER if len(heads) > 1 else None
    if attn.rel_pos is None:
        return TokenLayout(no_positions="its feature map has no fixed size", no_sharing=no_sharing)
    return _layout(attn.rel_pos.window_size, no_sharing)


def _layout(grid: Grid, no_sharing: str | None) -> TokenLayout:
    rows, columns = grid
    return TokenLayout(length=rows * columns, grid=(rows, columns), no_sharing=no_sharing)


def _attend_windows(
    attn: Any,
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Attends within windows under their bias ``(1, H, N, N)`` and, where they are shifted, a mask ``(W, N, N)``."""
    if mask is not None:
        bias = (bias + mask.unsqueeze(1)).repeat(x.shape[0] // mask.shape[0], 1, 1, 1)
    heads = attend_heads(attn, x, x, query, key, value, bias=bias, grid=attn.window_size, scale=scale)
    return attn.proj_drop(attn.proj(heads))


def _attend_partition(attn: Any, tokens: Tensor, qkv: Tensor, grid: Grid, shared_rel_pos: Tensor | None) -> Tensor:
    """Attends to ``tokens (B, N, C)`` by their joint projection ``(B, N, 3 H d)``, in one of MaxViT's two orders."""
    if attn.head_first:
        query, key, value = split_heads(qkv, attn.num_heads).chunk(3, dim=-1)
    else:
        query, key, value = split_parts(qkv, 3, attn.num_heads)
    bias = shared_rel_pos if attn.rel_pos is None else attn.rel_pos.get_bias()
    return attend_heads(attn, tokens, tokens, query, key, value, bias=bias, grid=grid)


def _cosines(query: Tensor, key: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Normalises queries and keys, and scales the queries by a learned factor a head, at most 100."""
    scale = logit_scale.clamp(max=math.log(100)).exp()
    return F.normalize(query, dim=-1) * scale, F.normalize(key, dim=-1)
