"""Masked versions of timm's attention layers beside convolutions, and of those that mix or bias what the softmax reads.

Hosts: LeViT, EfficientFormer v1 and v2, EfficientViT (MSRA), TinyViT, FastViT, CAFormer, LowFormer, CPUBone, iFormer,
SHViT, Visformer, GC ViT, NesT, TNT, ConViT, CaiT, BoTNet, HaloNet and Gemma 4's encoder. A bias of the host is added to
the scores after the mask. Talking heads mix the scores before the softmax and the weights after it; the mask modulates
the mixed scores, those that the softmax reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.halo_attn import HaloAttn
from timm.layers.lambda_layer import LambdaLayer
from timm.models.cait import TalkingHeadAttn
from timm.models.coat import FactorAttnConvRelPosEnc
from timm.models.convit import GPSA, MHSA
from timm.models.cpubone import ConvAttention as CpuBoneAttention
from timm.models.csatv2 import SpatialTransformerBlock
from timm.models.davit import ChannelAttention, ChannelAttentionV2
from timm.models.edgenext import CrossCovarianceAttn
from timm.models.efficientformer import Attention as EfficientFormerAttention
from timm.models.efficientformer_v2 import Attention2d, Attention2dDownsample
from timm.models.efficientvim import HSMSSD
from timm.models.efficientvit_mit import LiteMLA
from timm.models.efficientvit_msra import CascadedGroupAttention
from timm.models.fastvit import Attention as FastVitAttention
from timm.models.gcvit import WindowAttentionGlobal
from timm.models.gemma4_vit import Gemma4Attention, apply_multidimensional_rope
from timm.models.iformer import SHMA
from timm.models.levit import Attention as LevitAttention
from timm.models.levit import AttentionDownsample as LevitDownsample
from timm.models.lowformer import ConvAttention as LowFormerAttention
from timm.models.metaformer import Attention as MetaFormerAttention
from timm.models.mobilevit import LinearSelfAttention
from timm.models.nest import Attention as NestAttention
from timm.models.shvit import SHSA
from timm.models.swiftformer import EfficientAdditiveAttention
from timm.models.tiny_vit import Attention as TinyVitAttention
from timm.models.tnt import Attention as TntAttention
from timm.models.visformer import Attention as VisformerAttention
from timm.models.volo import OutlookAttention
from timm.models.xcit import XCA
from torch import Tensor, nn
from torch.nn import functional as F

from lamzoo.adapters.hosts import input_width
from lamzoo.adapters.staged import StagedTakeover, to_map, to_tokens
from lamzoo.lam import FactoredMask, Lam, lam_attention
from lamzoo.lam.layer import EagerAttention
from lamzoo.layers.attention import split_heads, split_parts


class _BiasedTakeover(StagedTakeover):
    """Base of layers with a table of biases, one for each offset between a query and a key of a fixed number."""

    @classmethod
    def fixed_length(cls, attn: Any, host: Any) -> int | None:
        return int(attn.attention_bias_idxs.shape[1])

    def biases(self, x: Tensor) -> Tensor:
        """Returns the biases of the scores ``(H, Nq, Nk)`` on the device of ``x``.

        While they train, timm's cache is left aside, which would keep the graph of its first pass.
        """
        host: Any = self
        if torch.is_grad_enabled() and host.attention_biases.requires_grad:
            return host.attention_biases[:, host.attention_bias_idxs]
        return host.get_attention_biases(x.device)


class LamLevitAttention(_BiasedTakeover, LevitAttention):
    """LeViT's ``Attention``, of tokens or of a feature map, under a learnable mask."""

    def forward(self, x: Tensor) -> Tensor:
        """Masked self-attention of ``x (B, N, C)``, or ``(B, C, rows, columns)`` with convolutions; result alike."""
        tokens, qkv = x, self.qkv(x)
        if self.use_conv:
            tokens, qkv = to_tokens(x), to_tokens(qkv)
        query, key, value = _split_widths(qkv, self.num_heads, self.key_dim, self.key_dim, self.val_dim)
        out = self.attend_tokens(tokens, tokens, query, key, value, bias=self.biases(x))
        return self.proj(to_map(out, x) if self.use_conv else out)


class LamLevitDownsample(_BiasedTakeover, LevitDownsample):
    """LeViT's ``AttentionDownsample``, whose queries are every second token, under a learnable mask."""

    @classmethod
    def widths(cls, attn: Any) -> tuple[int, int]:
        width = input_width(attn.kv)
        return width, width

    def forward(self, x: Tensor) -> Tensor:
        """Masked attention of fewer tokens to ``x (B, N, C)`` or ``(B, C, rows, columns)``; result as the host's."""
        to_query: Any = self.q
        fewer = to_query.down(x)
        tokens, queries, query, kv = x, fewer, to_query.ln(fewer), self.kv(x)
        if self.use_conv:
            tokens, queries, query, kv = map(to_tokens, (x, fewer, query, kv))
        key, value = _split_widths(kv, self.num_heads, self.key_dim, self.val_dim)
        query = split_heads(query, self.num_heads)
        out = self.attend_tokens(queries, tokens, query, key, value, bias=self.biases(x))
        return self.proj(to_map(out, fewer) if self.use_conv else out)


class LamEfficientFormerAttention(_BiasedTakeover, EfficientFormerAttention):
    """EfficientFormer's ``Attention`` under a learnable mask."""

    def forward(self, x: Tensor) -> Tensor:
        """Masked self-attention of ``x (B, N, C)``."""
        query, key, value = _split_widths(self.qkv(x), self.num_heads, self.key_dim, self.key_dim, self.val_dim)
        return self.proj(self.attend_tokens(x, x, query, key, value, bias=self.biases(x)))


class LamTinyVitAttention(_BiasedTakeover, TinyVitAttention):
    """TinyViT's ``Attention``, within windows, under a learnable mask."""

    def forward(self, x: Tensor) -> Tensor:
        """Masked self-attention of windows ``x (B W, N, C)``; the mask network reads the normalised tokens."""
        x = self.norm(x)
        query, key, value = _split_widths(self.qkv(x), self.num_heads, self.key_dim, self.key_dim, self.val_dim)
        return self.proj(self.attend_tokens(x, x, query, key, value, bias=self.biases(x)))


class LamCascadedGroupAttention(_BiasedTakeover, CascadedGroupAttention):
    """``CascadedGroupAttention`` of EfficientViT (MSRA) under a learnable mask.

    A head reads its own channels and the output of the head before it; the mask of all heads is computed from all
    channels. Records have no scores.
    """

    @classmethod
    def widths(cls, attn: Any) -> tuple[int, int]:
        width = sum(map(input_width, attn.qkvs))
        return width, width

    def forward(self, x: Tensor) -> Tensor:
        """Masked self-attention of windows ``x (B W, C, rows, columns)``."""
        lam = self.lam
        assert isinstance(lam, Lam)
        tokens = to_tokens(x)
        mask = lam(tokens, tokens)
        biases = self.biases(x)
        eager = EagerAttention()
        attend = partial(lam_attention, backend=lam.backend) if lam.recorder is None else eager
        heads: list[Tensor] = []
        for head, (channels, to_qkv, depthwise) in enumerate(
            zip(x.chunk(len(self.qkvs), dim=1), self.qkvs, self.dws, strict=True)
        ):
            qkv = to_qkv(channels + heads[-1] if heads else channels)
            query, key, value = qkv.split([self.key_dim, self.key_dim, self.val_dim], dim=1)
            query, key, value = (to_tokens(each).unsqueeze(1) for each in (depthwise(query), key, value))
            own = FactoredMask(*(each if each.shape[1] == 1 else each[:, head : head + 1] for each in mask))
            out = attend(query, key, value, own, op=lam.config.op, bias=biases[head], scale=self.scale)
            heads.append(to_map(out.squeeze(1), x))
        if eager.calls:
            lam.record(mask, torch.cat([weights for weights, _ in eager.calls], dim=1), None)
        return self.proj(torch.cat(heads, dim=1))


class LamFastVitAttention(StagedTakeover, FastVitAttention):
    """FastViT's ``Attention`` under a learnable mask."""

    def forward(self, x: Tensor) -> Tensor:
        """Masked self-attention of ``x (B, C, rows, columns)``."""
        tokens = to_tokens(x)
        out = self.attend_tokens(tokens, tokens, *split_parts(self.qkv(tokens), 3, self.num_heads))
        return to_map(self.proj_drop(self.proj(out)), x)


class LamMetaFormerAttention(StagedTakeover, MetaFormerAttention):
    """The ``Attention`` of CAFormer under a learnable mask."""

    def forward(self, x: Tensor) -> Tensor:
        """Masked self-attention of ``x (B, N, C)``."""
        out = self.attend_tokens(x, x, *split_parts(self.qkv(x), 3, self.num_heads))
        return self.proj_drop(self.proj(out))


class LamLowFormerAttention(StagedTakeover, LowFormerAttention):
    """LowFormer's ``ConvAttention``, of a downsampled feature map, under a learnable mask."""

    @classmethod
    def widths(cls, attn: Any) -> tuple[int, int]:
        width = input_width(attn.pwise)
        return width, width

    def forward(self, x: Tensor) -> Tensor:
        """Masked self-attention of ``x (B, C, rows, columns)`` at lower resolution."""
        return _attend_low(self, x, x)


class LamCpuBoneAttention(StagedTakeover, CpuBoneAttention):
    """CPUBone's ``ConvAttention``, of a downsampled feature map, under a learnable mask."""

    place = re.compile(r"(?P<stack>.+)\.(?P<index>\d+)(?P<name>\.total\..+)")

    @classmethod
    def widths(cls, attn: Any) -> tuple[int, int]:
        width = input_width(attn.pwise)
        return width, width

    def forward(self, x: Tensor) -> Tensor:
        """Masked self-attention of ``x (B, C, rows, columns)`` at lower resolution."""
        padded = x
        if self.small_kernels and self.att_stride > 1:  # its kernels round odd sizes down
            padded = F.pad(x, (0, -x.shape[-1] % self.att_stride, 0, -x.shape[-2] % self.att_stride))
        return _attend_low(self, x, padded)


class LamSHMA(StagedTakeover, SHMA):
    """iFormer's ``SHMA``, with a single head, within windows or global, under a learnable mask."""

    @classmethod
    def widths(cls, attn: Any) -> tuple[int, int]:
        return input_width(attn.q), input_width(attn.k)

    @classmethod
    def reduction(cls, attn: Any) -> object:
        return attn.window_size

    def forward(self, x: Tensor) -> Tensor:
        """Masked self-attention of ``x (B, C, rows, columns)``, whose output is gated."""
        rows, columns = x.shape[-2:]
        side = self.window_size
        if side:
            padded = F.pad(x, (0, -columns % side, 0, -rows % side))
            x = self._window_partition(padded, side)
        value, gate = self.gate_act(self.v_gate(x)).chunk(2, dim=1)
        tokens = to_tokens(x)
        query, key, value = (to_tokens(each).unsqueeze(1) for each in (self.q(x), self.k(x), value))
        out = self.proj(to_map(self.attend_tokens(tokens, tokens, query, key, value), x) * gate)
        return self._window_reverse(out, side, *padded.shape[-2:])[..., :rows, :columns] if side else out


class LamSHSA(StagedTakeover, SHSA):
    """SHViT's ``SHSA``, with a single head that reads a part of the channels, under a learnable mask."""

    def forward(self, x: Tensor) -> Tensor:
        """Masked self-attention of the first ``pdim`` channels of ``x (B, C, rows, columns)``."""
        part, rest = x.split([self.pdim, self.dim - self.pdim], dim=1)
        part = self.pre_norm(part)
        tokens = to_tokens(part)
        query, key, value = _split_widths(to_tokens(self.qkv(part)), 1, self.qk_dim, self.qk_dim, self.pdim)
        out = to_map(self.attend_tokens(tokens, tokens, query, key, value), x)
        return self.proj(torch.cat([out, rest], dim=1))


class LamVisformerAttention(StagedTakeover, VisformerAttention):
    """Visformer's ``Attention`` under a learnable mask."""

    def forward(self, x: Tensor) -> Tensor:
        """Masked self-attention of ``x (B, C, rows, columns)``."""
        tokens = to_tokens(x)
        out = self.attend_tokens(tokens, tokens, *split_parts(to_tokens(self.qkv(x)), 3, self.num_heads))
        return self.proj_drop(self.proj(to_map(out, x)))


class LamWindowAttentionGlobal(StagedTakeover, WindowAttentionGlobal):
    """GC ViT's ``WindowAttentionGlobal``, of a window to itself or of global queries to a window, under a mask."""

    @classmethod
    def reduction(cls, attn: Any) -> object:
        return attn.use_global

    @classmethod
    def fixed_length(cls, attn: Any, host: Any) -> int | None:
        return int(attn.window_size[0] * attn.window_size[1])

    def forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        """Masked attention of windows ``x (B W, N, C)``; arguments and result as the host's."""
        queries = x
        if self.use_global and q_global is not None:
            queries = q_global.repeat_interleave(x.shape[0] // q_global.shape[0], dim=0).reshape(x.shape)
            query = split_heads(queries, self.num_heads)
            key, value = split_parts(self.qkv(x), 2, self.num_heads)
        else:
            query, key, value = split_parts(self.qkv(x), 3, self.num_heads)
        out = self.attend_tokens(queries, x, query, key, value, bias=self.rel_pos.get_bias())
        return self.proj_drop(self.proj(out))


class LamNestAttention(StagedTakeover, NestAttention):
    """NesT's ``Attention``, within blocks of the image, under a learnable mask."""

    @classmethod
    def fixed_length(cls, attn: Any, host: Any) -> int | None:
        return int(host.pos_embed.shape[2]) if hasattr(host, "pos_embed") else None

    def forward(self, x: Tensor) -> Tensor:
        """Masked self-attention within the ``T`` blocks of ``x (B, T, N, C)``."""
        tokens = x.flatten(0, 1)
        out = self.attend_tokens(tokens, tokens, *split_parts(self.qkv(tokens), 3, self.num_heads))
        out = out.unflatten(-1, (self.num_heads, -1)).transpose(-1, -2).flatten(-2)  # NesT's heads vary fastest
        return self.proj_drop(self.proj(out.unflatten(0, x.shape[:2])))


class LamTntAttention(StagedTakeover, TntAttention):
    """TNT's ``Attention``, of patches or of the pixels of a patch, under a learnable mask."""

    @classmethod
    def widths(cls, attn: Any) -> tuple[int, int]:
        return input_width(attn.qk), input_width(attn.qk)

    @classmethod
    def fixed_length(cls, attn: Any, host: Any) -> int | None:
        if not hasattr(host, "patch_pos"):  # a part of the model
            return None
        is_inner = any(block.attn_in is attn for block in host.blocks)
        return int(host.pixel_pos[0, 0].numel() if is_inner else host.patch_pos.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """Masked self-attention of ``x (B, N, C)``."""
        query, key = split_parts(self.qk(x), 2, self.num_heads)
        out = self.attend_tokens(x, x, query, key, split_heads(self.v(x), self.num_heads))
        return self.proj_drop(self.proj(out))


class LamMHSA(StagedTakeover):
    """ConViT's ``MHSA`` under a learnable mask."""

    @classmethod
    def fixed_length(cls, attn: Any, host: Any) -> int | None:
        return int(host.patch_embed.num_patches) + 1 if hasattr(host, "patch_embed") else None

    def forward(self, x: Tensor) -> Tensor:
        """Masked self-attention of ``x (B, N, C)``."""
        out = self.attend_tokens(x, x, *split_parts(self.qkv(x), 3, self.num_heads))
        return self.proj_drop(self.proj(out))


class LamGPSA(StagedTakeover, GPSA):
    """ConViT's ``GPSA`` under a learnable mask, which modulates the scores of the content and not of the positions."""

    @classmethod
    def widths(cls, attn: Any) -> tuple[int, int]:
        return input_width(attn.qk), input_width(attn.qk)

    @classmethod
    def fixed_length(cls, attn: Any, host: Any) -> int | None:
        return int(host.patch_embed.num_patches) if hasattr(host, "patch_embed") else None

    def get_attention(self, x: Tensor) -> Tensor:
        """Returns the gated sum of the masked weights and those of the positions, ``(B, H, N, N)``."""
        query, key = split_parts(self.qk(x), 2, self.num_heads)
        content = self.masked_weights(x, x, (query @ key.transpose(-2, -1)) * self.scale)
        places = self.pos_proj(self.rel_indices).permute(0, 3, 1, 2).softmax(dim=-1)
        gate = self.gating_param.sigmoid().view(1, -1, 1, 1)
        weights = (1.0 - gate) * content + gate * places
        return self.attn_drop(weights / weights.sum(dim=-1, keepdim=True))


class LamTalkingHeadAttn(StagedTakeover, TalkingHeadAttn):
    """CaiT's ``TalkingHeadAttn`` under a learnable mask, which modulates the mixed scores."""

    @classmethod
    def fixed_length(cls, attn: Any, host: Any) -> int | None:
        return int(host.pos_embed.shape[1]) if hasattr(host, "pos_embed") else None

    def forward(self, x: Tensor) -> Tensor:
        """Masked self-attention of ``x (B, N, C)``."""
        query, key, value = split_parts(self.qkv(x), 3, self.num_heads)
        scores = _mix_heads(self.proj_l, (query * self.scale) @ key.transpose(-2, -1))
        weights = self.attn_drop(_mix_heads(self.proj_w, self.masked_weights(x, x, scores)))
        return self.proj_drop(self.proj((weights @ value).transpose(1, 2).flatten(2)))


class LamEfficientFormerAttention2d(_BiasedTakeover, Attention2d):
    """EfficientFormerV2's ``Attention2d``, with talking heads, under a learnable mask."""

    @classmethod
    def widths(cls, attn: Any) -> tuple[int, int]:
        return input_width(attn.q), input_width(attn.k)

    def forward(self, x: Tensor) -> Tensor:
        """Masked self-attention of ``x (B, C, rows, columns)``, at half the resolution with ``stride_conv``."""
        x = x if self.stride_conv is None else self.stride_conv(x)
        tokens, value = to_tokens(x), self.v(x)
        query, key, heads = (split_heads(to_tokens(each), self.num_heads) for each in (self.q(x), self.k(x), value))
        scores = (query @ key.transpose(-2, -1)) * self.scale + self.biases(x)
        weights = self.talking_head2(self.masked_weights(tokens, tokens, self.talking_head1(scores)))
        out = to_map((weights @ heads).transpose(1, 2).flatten(2), x) + self.v_local(value)
        return self.proj(self.act(out if self.upsample is None else self.upsample(out)))


class LamEfficientFormerDownsample(_BiasedTakeover, Attention2dDownsample):
    """EfficientFormerV2's ``Attention2dDownsample`` under a learnable mask, whose queries are every second token."""

    @classmethod
    def widths(cls, attn: Any) -> tuple[int, int]:
        return input_width(attn.k), input_width(attn.k)

    def forward(self, x: Tensor) -> Tensor:
        """Masked attention of fewer tokens to ``x (B, C, rows, columns)``."""
        value = self.v(x)
        local = self.v_local(value)
        queries = to_tokens(self.q.pool(x))
        query, key, heads = (split_heads(to_tokens(each), self.num_heads) for each in (self.q(x), self.k(x), value))
        biases = self.biases(x)
        out = self.attend_tokens(queries, to_tokens(x), query, key, heads, bias=biases)
        return self.proj(self.act(to_map(out, local) + local))


class LamBottleneckAttn(StagedTakeover, BottleneckAttn):
    """``BottleneckAttn`` of BoTNet, with relative position embeddings, under a learnable mask."""

    @classmethod
    def reduction(cls, attn: Any) -> object:
        return attn.pos_embed.height, attn.pos_embed.width

    @classmethod
    def fixed_length(cls, attn: Any, host: Any) -> int | None:
        return int(attn.pos_embed.height * attn.pos_embed.width)

    def forward(self, x: Tensor) -> Tensor:
        """Masked self-attention of ``x (B, C, rows, columns)``."""
        tokens = to_tokens(x)
        parts = to_tokens(self.qkv(x)).split([self.dim_out_qk, self.dim_out_qk, self.dim_out_v], dim=-1)
        query, key, value = (split_heads(part, self.num_heads) for part in parts)
        bias = self.pos_embed(query.flatten(0, 1)).unflatten(0, query.shape[:2])
        bias = bias * self.scale if self.scale_pos_embed else bias
        return self.pool(to_map(self.attend_tokens(tokens, tokens, query, key, value, bias=bias), x))


class LamHaloAttn(StagedTakeover, HaloAttn):
    """``HaloAttn`` of HaloNet, of blocks to their neighbourhoods, under a learnable mask.

    As for the host, places of a neighbourhood outside of the image are keys, of tokens that are zero.
    """

    @classmethod
    def widths(cls, attn: Any) -> tuple[int, int]:
        return input_width(attn.q), input_width(attn.kv)

    @classmethod
    def reduction(cls, attn: Any) -> object:
        return attn.block_stride

    @classmethod
    def fixed_length(cls, attn: Any, host: Any) -> int | None:
        return int(attn.win_size**2)

    def forward(self, x: Tensor) -> Tensor:
        """Masked attention of the blocks of ``x (B, C, rows, columns)`` to their neighbourhoods."""
        grid = tuple(size // self.block_size for size in x.shape[2:])
        stride = self.block_stride
        queries = self._blocks(x[..., ::stride, ::stride], grid)
        query = split_heads(self._blocks(self.q(x), grid), self.num_heads)
        keys = self._neighbourhoods(self.kv(x))
        key, value = _split_widths(keys, self.num_heads, self.dim_head_qk, self.dim_head_v)
        bias = self.pos_embed(query) * (self.scale if self.scale_pos_embed else 1.0)
        out = self.attend_tokens(queries, self._neighbourhoods(x), query, key, value, bias=bias)
        # (B blocks, places, C) -> (B, C, rows, columns)
        side = self.block_size_ds
        out = out.unflatten(0, (-1, *grid)).unflatten(3, (side, side)).permute(0, 5, 1, 3, 2, 4)
        return self.pool(out.flatten(4, 5).flatten(2, 3))

    def _blocks(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Returns the blocks ``(B blocks, places, C)`` of ``(B, C, rows, columns)``."""
        blocks = x.unflatten(3, (grid[1], -1)).unflatten(2, (grid[0], -1))
        return blocks.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)

    def _neighbourhoods(self, x: Tensor) -> Tensor:
        """Returns the neighbourhoods of the blocks, ``(B blocks, places, C)``, of ``(B, C, rows, columns)``."""
        padded = F.pad(x, [self.halo_size] * 4)
        windows = padded.unfold(2, self.win_size, self.block_size).unfold(3, self.win_size, self.block_size)
        return windows.permute(0, 2, 3, 4, 5, 1).flatten(3, 4).flatten(0, 2)


class LamGemma4Attention(StagedTakeover, Gemma4Attention):
    """``Gemma4Attention`` under a learnable mask."""

    @classmethod
    def widths(cls, attn: Any) -> tuple[int, int]:
        return input_width(attn.q_proj), input_width(attn.k_proj)

    def forward(self, x: Tensor, rope_cos: Tensor, rope_sin: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Masked self-attention of ``x (B, N, C)``; arguments and result as ``Gemma4Attention``."""
        projected = (
            project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        norms = (self.q_norm, self.k_norm, self.v_norm)
        query, key, value = (norm(each) for norm, each in zip(norms, projected, strict=True))
        query, key = (
            apply_multidimensional_rope(each, rope_cos, rope_sin, ndim=2, unsqueeze_dim=2) for each in (query, key)
        )
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        if self.num_kv_groups > 1:
            key, value = (each.repeat_interleave(self.num_kv_groups, dim=1) for each in (key, value))
        out = self.attend_tokens(x, x, query, key, value, bias=attn_mask, scale=1.0)
        return self.proj_drop(self.o_proj(out))


#: Class of timm's attention layer to the class that replaces it.
HYBRID_TAKEOVERS: Mapping[type[nn.Module], type[StagedTakeover]] = {
    LevitAttention: LamLevitAttention,
    LevitDownsample: LamLevitDownsample,
    EfficientFormerAttention: LamEfficientFormerAttention,
    TinyVitAttention: LamTinyVitAttention,
    CascadedGroupAttention: LamCascadedGroupAttention,
    FastVitAttention: LamFastVitAttention,
    MetaFormerAttention: LamMetaFormerAttention,
    LowFormerAttention: LamLowFormerAttention,
    CpuBoneAttention: LamCpuBoneAttention,
    SHMA: LamSHMA,
    SHSA: LamSHSA,
    VisformerAttention: LamVisformerAttention,
    WindowAttentionGlobal: LamWindowAttentionGlobal,
    NestAttention: LamNestAttention,
    TntAttention: LamTntAttention,
    MHSA: LamMHSA,
    GPSA: LamGPSA,
    TalkingHeadAttn: LamTalkingHeadAttn,
    Attention2d: LamEfficientFormerAttention2d,
    Attention2dDownsample: LamEfficientFormerDownsample,
    BottleneckAttn: LamBottleneckAttn,
    HaloAttn: LamHaloAttn,
    Gemma4Attention: LamGemma4Attention,
}


#: Class of timm's layer whose weights are no softmax over tokens to what they are, as a clause.
NO_TOKEN_SOFTMAX: Mapping[type[nn.Module], str] = {
    XCA: "its softmax is over channels",
    CrossCovarianceAttn: "its softmax is over channels",
    ChannelAttention: "its softmax is over channels",
    ChannelAttentionV2: "its softmax is over channels",
    OutlookAttention: "its weights are computed from each token alone, without keys",
    LinearSelfAttention: "it is linear attention",
    FactorAttnConvRelPosEnc: "it is linear attention",
    LiteMLA: "it is linear attention",
    EfficientAdditiveAttention: "it is linear attention",
    LambdaLayer: "it is linear attention",
    HSMSSD: "it is a state space model",
    SpatialTransformerBlock: "its softmax is over the samples of a batch",
}


def _split_widths(x: Tensor, heads: int, *widths: int) -> tuple[Tensor, ...]:
    """Splits ``(B, N, heads sum(widths))`` into parts ``(B, heads, N, width)``."""
    return split_heads(x, heads).split(widths, dim=-1)


def _attend_low(attn: Any, x: Tensor, padded: Tensor) -> Tensor:
    """Attends at low resolution, and returns a feature map of the size of ``x (B, C, rows, columns)``."""
    low = attn.conv_proj(padded)
    tokens = to_tokens(low)
    query, key, value = split_heads(to_tokens(attn.pwise(low)), attn.num_heads).chunk(3, dim=-1)
    out = attn.attend_tokens(tokens, tokens, query, key, value)
    return attn.upsampling(attn.o_proj(to_map(out, low)))[..., : x.shape[-2], : x.shape[-1]]


def _mix_heads(mix: nn.Module, x: Tensor) -> Tensor:
    """Applies a Linear over the heads of ``(B, H, Nq, Nk)``."""
    return mix(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
