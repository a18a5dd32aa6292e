"""The timm hosts that the adapter's tests run over: real model names, made small by timm's own arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.layers import HybridEmbed
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn


def _small_hybrid(**kwargs: Any) -> HybridEmbed:
    """Returns the convolutional stem of timm's hybrids with two narrow stages, whose modules are named blocks too."""
    return HybridEmbed(ResNetV2((1, 1), channels=(128, 128), stem_chs=32, num_classes=0, global_pool=""), **kwargs)


_TINY = {"depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
_ROPE = {"depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 5}


@dataclass(frozen=True)
class Host:
    """A timm model name with the arguments that make it small.

    Attributes:
        name: as in ``timm.list_models``.
        kwargs: for ``timm.create_model``.
        size: image height and width.
        positions: whether its tokens have fixed positions, for keys="position".
        checkpointing: whether timm offers gradient checkpointing for it.
    """

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    size: int = 32
    positions: bool = True
    checkpointing: bool = True

    def create(self, **kwargs: Any) -> nn.Module:
        """Returns the model with weights large enough for every layer's attention to show in the output."""
        model = timm.create_model(self.name, **{**self.kwargs, **kwargs})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "gamma" in name or ".ls" in name:
                    parameter.fill_(0.5)
                elif parameter.ndim == 2 and ("attn" in name or "head" in name or "rel_pos" in name):
                    nn.init.normal_(parameter, std=0.2)
        return model

    def images(self, batch: int = 2) -> Tensor:
        return torch.randn(batch, 3, self.size, self.size)


_ALL = [
    Host("vit_tiny_patch16_224", {**_TINY, "img_size": 32, "patch_size": 8}),
    Host("deit_tiny_distilled_patch16_224", {**_TINY, "img_size": 32, "patch_size": 8}),
    Host("deit3_small_patch16_224", {**_TINY, "img_size": 32, "patch_size": 8}),  # LayerScale, no_embed_class
    Host("vit_small_patch14_reg4_dinov2", {**_TINY, "img_size": 28, "patch_size": 7}, size=28),
    Host("vit_base_patch16_clip_224", {**_TINY, "img_size": 32, "patch_size": 8}),  # norm_pre
    Host("vit_base_patch16_siglip_224", {**_TINY, "img_size": 32, "patch_size": 8}),  # attention pooling
    Host("vit_wee_patch16_reg1_gap_256", {**_TINY, "img_size": 32, "patch_size": 8}),  # no class token
    Host("vit_base_patch16_18x2_224", {**_TINY, "img_size": 32, "patch_size": 8}),  # two attentions a block
    Host("test_vit4", {"depth": 2, "num_classes": 5, "img_size": 48}, size=48),
    Host(
        "vit_tiny_patch16_224",
        {**_TINY, "img_size": 32, "patch_size": 8, "qk_norm": True, "scale_attn_norm": True, "qkv_bias": False},
    ),
    Host("vit_tiny_r_s16_p8_224", {**_TINY, "img_size": 32, "patch_size": 1, "embed_layer": _small_hybrid}),
    Host("vit_small_patch16_rope_224", {**_ROPE, "img_size": 32, "patch_size": 8}),
    Host("vit_small_patch16_rope_mixed_224", {**_ROPE, "img_size": 32, "patch_size": 8}),
    Host("vit_small_patch16_dinov3", {**_ROPE, "img_size": 32, "patch_size": 8}),
    Host("vit_pe_core_tiny_patch16_384", {**_ROPE, "img_size": 32, "patch_size": 8, "attn_pool_num_heads": 2}),
    Host(
        "vit_5b_patch16_sapiens2",  # grouped-query attention, separate projections, qk norm
        {**_ROPE, "num_heads": 4, "embed_dim": 32, "num_kv_heads": 2, "img_size": 32, "patch_size": 8},
    ),
    Host("eva02_tiny_patch14_224", {**_ROPE, "img_size": 28, "patch_size": 7}, size=28),  # separate projections
    Host("eva_giant_patch14_224", {**_ROPE, "img_size": 28, "patch_size": 7}, size=28),  # q and v biases
    Host("vit_base_patch16_rope_reg1_gap_256", {**_ROPE, "img_size": 32, "patch_size": 8}),
    Host("qwen3_vit_88m", {**_ROPE, "img_size": 32, "patch_size": 8, "pos_embed_grid_size": 4}),
    Host("deepseek_vit_412m", {**_ROPE, "img_size": 32, "patch_size": 8}),
    Host("beit_base_patch16_224", {**_TINY, "img_size": 32, "patch_size": 8}),  # a relative position bias a block
    Host("vit_srelpos_small_patch16_224", {**_TINY, "img_size": 32, "patch_size": 8}),  # one for all blocks
    Host("naflexvit_base_patch16_gap", {**_TINY, "patch_size": 8}, positions=False),
    Host("naflexvit_base_patch16_siglip", {**_TINY, "patch_size": 8}, positions=False),
    Host(
        "pit_ti_224",
        {"img_size": 32, "patch_size": 8, "stride": 4, "base_dims": (8, 8, 8), "depth": (1, 1, 2), "num_classes": 5},
        positions=False,
        checkpointing=False,
    ),
    Host("mobilevit_xxs", {"num_classes": 5}, size=96, positions=False),
]

HOSTS = {f"{host.name}{'-qk_norm' if 'qk_norm' in host.kwargs else ''}": host for host in _ALL}
# One of each attention class and layout, where going through all of them would only take time.
FEW = [
    "vit_tiny_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_rope_224",
    "eva_giant_patch14_224",
    "naflexvit_base_patch16_gap",
]
