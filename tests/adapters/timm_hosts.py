"""The timm hosts that the adapter's tests run over: real model names, made small by timm's own arguments."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
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


_DIFF = {"depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 5, "img_size": 32, "patch_size": 8}
_SWIN = {
    "img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 2),
    "num_classes": 5,
}  # fmt: skip
_MAXVIT = {
    "img_size": 64, "depths": (1,), "embed_dim": (32,), "stem_width": 8, "transformer_dim_head": 16, "num_classes": 5,
}  # fmt: skip
_COATNET = {
    "img_size": 32, "depths": (3,), "embed_dim": (32,), "block_type": (("T", "C", "T"),), "stem_width": 16,
    "transformer_dim_head": 8, "num_classes": 5,
}  # fmt: skip
_LENIENT = {"strict_img_size": False}
_WINDOWS: dict[str, Any] = {"sharing": False, "fuses": False}
_MAXVIT_WINDOWS: dict[str, Any] = {**_WINDOWS, "bitwise": False, "attn_drop": "transformer_attn_drop"}


@dataclass(frozen=True)
class Host:
    """A timm model name with the arguments that make it small.

    Attributes:
        name: as in ``timm.list_models``.
        kwargs: for ``timm.create_model``.
        size: image height and width.
        positions: whether its tokens have fixed positions, for keys="position".
        checkpointing: whether timm offers gradient checkpointing for it.
        sharing: whether the layers of a stack can share a mask, for layers="single".
        any_size: the arguments with which it takes images of any size; None if it doesn't.
        resizes: whether it has timm's ``set_input_size``.
        bitwise: whether timm's eager attention computes in the order of lamzoo's.
        attn_drop: the argument for the dropout of attention weights; None without one.
        fuses: whether its layers have a fused form.
        slow: whether its tests are slow ones, since another host is close to it.
    """

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    size: int = 32
    positions: bool = True
    checkpointing: bool = True
    sharing: bool = True
    any_size: dict[str, Any] | None = field(default_factory=lambda: {"dynamic_img_size": True})
    resizes: bool = True
    bitwise: bool = True
    attn_drop: str | None = "attn_drop_rate"
    fuses: bool = True
    slow: bool = False

    def kinds_of_layers(self) -> tuple[str, ...]:
        return ("multi", "single") if self.sharing else ("multi",)

    def create(self, **kwargs: Any) -> nn.Module:
        """Returns the model with weights large enough for every layer's attention to show in the output."""
        model = timm.create_model(self.name, **{**self.kwargs, **kwargs})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if (
                    "gamma" in name
                    or ".ls" in name
                    or ("norm" in name and name.endswith(".weight") and not parameter.any())
                ):
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
    Host(
        "vit_tiny_r_s16_p8_224", {**_TINY, "img_size": 32, "patch_size": 1, "embed_layer": _small_hybrid}, any_size=None
    ),
    Host("vit_small_patch16_rope_224", {**_ROPE, "img_size": 32, "patch_size": 8}),
    Host("vit_small_patch16_rope_mixed_224", {**_ROPE, "img_size": 32, "patch_size": 8}),
    Host("vit_small_patch16_dinov3", {**_ROPE, "img_size": 32, "patch_size": 8}),
    Host(
        "vit_pe_core_tiny_patch16_384",
        {**_ROPE, "img_size": 32, "patch_size": 8, "attn_pool_num_heads": 2},
        any_size=None,
    ),
    Host(
        "vit_5b_patch16_sapiens2",  # grouped-query attention, separate projections, qk norm
        {**_ROPE, "num_heads": 4, "embed_dim": 32, "num_kv_heads": 2, "img_size": 32, "patch_size": 8},
        fuses=False,
    ),
    Host("eva02_tiny_patch14_224", {**_ROPE, "img_size": 28, "patch_size": 7}, size=28),  # separate projections
    Host("eva_giant_patch14_224", {**_ROPE, "img_size": 28, "patch_size": 7}, size=28),  # q and v biases
    Host("vit_base_patch16_rope_reg1_gap_256", {**_ROPE, "img_size": 32, "patch_size": 8}),
    Host(
        "qwen3_vit_88m",
        {**_ROPE, "img_size": 32, "patch_size": 8, "pos_embed_grid_size": 4},
        any_size={},
        resizes=False,
    ),
    Host("deepseek_vit_412m", {**_ROPE, "img_size": 32, "patch_size": 8}, any_size={}, resizes=False),
    Host(  # a relative position bias a block
        "beit_base_patch16_224", {**_TINY, "img_size": 32, "patch_size": 8}, any_size=None, fuses=False
    ),
    Host(  # one for all blocks
        "vit_srelpos_small_patch16_224", {**_TINY, "img_size": 32, "patch_size": 8}, any_size=None, fuses=False
    ),
    Host("naflexvit_base_patch16_gap", {**_TINY, "patch_size": 8}, positions=False),
    Host("naflexvit_base_patch16_siglip", {**_TINY, "patch_size": 8}, positions=False),
    Host(
        "pit_ti_224",
        {"img_size": 32, "patch_size": 8, "stride": 4, "base_dims": (8, 8, 8), "depth": (1, 1, 2), "num_classes": 5},
        positions=False,
        checkpointing=False,
    ),
    Host("mobilevit_xxs", {"num_classes": 5}, size=96, positions=False, attn_drop=None),
    Host("vit_base_patch16_xp_224", {**_TINY, "img_size": 32, "patch_size": 8}, fuses=False),  # MLP beside attention
    Host("vit_dwee_patch16_reg1_gap_256", _DIFF, bitwise=False, fuses=False),
    Host("vit_dpwee_patch16_reg1_gap_256", _DIFF, bitwise=False, fuses=False, slow=True),
    Host("swin_tiny_patch4_window7_224", {**_SWIN, "patch_size": 2}, any_size=_LENIENT, **_WINDOWS),
    Host("swinv2_tiny_window8_256", _SWIN, any_size=_LENIENT, bitwise=False, slow=True, **_WINDOWS),
    Host("swinv2_cr_tiny_224", {**_SWIN, "init_values": 1.0}, any_size=_LENIENT, bitwise=False, slow=True, **_WINDOWS),
    Host(
        "samvit_base_patch16",
        {**_TINY, "img_size": 32, "patch_size": 4, "window_size": 3, "neck_chans": 8, "global_attn_indexes": (1,)},
        any_size={},
        resizes=False,
        bitwise=False,  # equal on some CPUs, one rounding apart on others
        **_WINDOWS,
    ),
    Host("maxvit_tiny_tf_224", {**_MAXVIT, "block_type": ("M",)}, 64, any_size={}, **_MAXVIT_WINDOWS),
    Host(  # the channels last
        "maxvit_rmlp_pico_rw_256", {**_MAXVIT, "block_type": ("M",)}, 64, any_size={}, slow=True, **_MAXVIT_WINDOWS
    ),
    Host("maxvit_tiny_pm_256", {**_MAXVIT, "block_type": ("PM",)}, 64, any_size={}, slow=True, **_MAXVIT_WINDOWS),
    Host(
        "coatnet_0_224",
        _COATNET,
        any_size=None,
        bitwise=False,
        attn_drop="transformer_attn_drop",
        fuses=False,
        slow=True,
    ),
    Host(  # the queries of the first block are half as wide
        "coatnet_rmlp_nano_rw_224", _COATNET, any_size=None, slow=True, **_MAXVIT_WINDOWS
    ),
]

HOSTS = {f"{host.name}{'-qk_norm' if 'qk_norm' in host.kwargs else ''}": host for host in _ALL}


def params(chosen: Iterable[Host] = _ALL) -> list[Any]:
    """Returns the hosts as parameters of a test, named as in HOSTS."""
    return [
        pytest.param(h, id=id_, marks=pytest.mark.slow if h.slow else ()) for id_, h in HOSTS.items() if h in chosen
    ]


def layer_params(chosen: Iterable[Host] = _ALL) -> list[Any]:
    """Returns the hosts with each kind of layers that they take, as parameters of a test.

    By default a test runs with both kinds for the hosts of FEW, and with one of them, in turns, for the others.
    """
    turns = itertools.cycle((0, 1))
    found = []
    for param in params(chosen):
        kinds = param.values[0].kinds_of_layers()
        quick = kinds if param.id in FEW else (kinds[next(turns) % len(kinds)],)
        for layers in kinds:
            marks = param.marks if layers in quick else [*param.marks, pytest.mark.slow]
            found.append(pytest.param(param.values[0], layers, id=f"{param.id}-{layers}", marks=marks))
    return found


# One of each attention class and layout, where going through all of them would only take time.
FEW = [
    "vit_tiny_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_rope_224",
    "eva_giant_patch14_224",
    "naflexvit_base_patch16_gap",
]
