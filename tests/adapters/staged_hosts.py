"""The timm hosts with stages, pooled keys or convolutions that the adapter's tests run over, made small."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg, interleave_blocks
from timm.models.gcvit import GlobalContextVit
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.nest import Nest
from torch import nn

from tests.adapters.timm_hosts import Host


@dataclass(frozen=True)
class StagedHost(Host):
    """A timm model with stages, small.

    Attributes:
        build: makes the model, where its name in timm has arguments that can't be replaced.
        sharing: whether the layers of a stage can share a mask.
        other_sizes: whether it takes images of other sizes than its own.
        checkpoints: whether timm offers gradient checkpointing for it.
        gain: of the weights that queries and keys are made with, large enough for their scores to differ.
        quick: whether building and running it is cheap enough for the default tests.
    """

    positions: bool = False
    build: Callable[..., nn.Module] | None = None
    sharing: bool = True
    other_sizes: bool = False
    checkpoints: bool = True
    gain: float = 1.4
    quick: bool = True

    def create(self, **kwargs: Any) -> nn.Module:
        """Returns the model with weights large enough for every layer's attention to show in the output."""
        build = self.build or partial(timm.create_model, self.name)
        model = build(num_classes=5, **{**self.kwargs, **kwargs})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim >= 2:
                    gain = self.gain if _QUERY_OR_KEY.search(name) else 1.4
                    nn.init.normal_(parameter, std=0.3 if "rel" in name else gain * parameter[0].numel() ** -0.5)
                elif name.endswith("weight") or "gamma" in name or ".ls" in name or "scale" in name:
                    parameter.fill_(0.5)
        return model


def _byobnet(kind: str, **options: Any) -> Callable[..., nn.Module]:
    blocks = (
        ByoBlockCfg(type="bottle", d=1, c=16, s=1, gs=0, br=0.5),
        interleave_blocks(types=("bottle", "self_attn"), d=2, c=16, s=2, gs=0, br=0.5),
        ByoBlockCfg(type="self_attn", d=2, c=32, s=2, gs=0, br=0.5),
    )
    cfg = ByoModelCfg(
        blocks, stem_chs=8, stem_pool="", fixed_input_size=True, self_attn_layer=kind, self_attn_kwargs=options
    )
    return partial(ByobNet, cfg, img_size=32)


def _mobilenet(**kwargs: Any) -> nn.Module:
    return MobileNetV3(decode_arch_def(_MOBILE), stem_size=8, num_features=16, **kwargs)  # which empties the definition


_MOBILE = [["ds_r1_k3_s2_e1_c8"], ["mqa_r1_k3_h2_s1_v2_d4_c8", "mqa_r2_k3_h2_s1_d4_c8"], ["cn_r1_k1_s1_c16"]]
_QUERY_OR_KEY = re.compile(r"\.(q|k|qk|kv|qkv|qkvs|query|key|wq|wk|q_proj|k_proj|pwise)\.")
_PYRAMID = {"depths": (2, 1), "embed_dims": (8, 16), "num_heads": (1, 2), "sr_ratios": (2, 1), "mlp_ratios": (2, 2)}
_LEVIT = {"img_size": 64, "embed_dim": (16, 24), "key_dim": 8, "depth": (2, 1), "num_heads": (2, 3)}
_LOW = {"width_list": [8, 8, 8, 16, 64], "depth_list": [0, 1, 1, 1, 2], "proj_drop_rate": 0.0}
_IFORMER = {"dims": (8, 8, 16, 16), "depths": (1, 1, 4, 3), "attn_groups": (0, 0, 1, 1)}
_MVIT = {"embed_dim": 8, "depths": (1, 2), "num_heads": 1}

_ALL = [
    StagedHost("levit_128s", _LEVIT, size=64, positions=True, gain=6.0),
    StagedHost("levit_conv_128s", _LEVIT, size=64, positions=True, gain=6.0),
    StagedHost(
        "crossvit_9_240",
        {"img_size": 48, "img_scale": (1, 1), "embed_dim": (16, 24), "depth": ((1, 2, 0),) * 2, "num_heads": (2, 2)},
        size=48,
        checkpoints=False,
    ),
    StagedHost(
        "cait_xxs24_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
        positions=True,
    ),
    StagedHost("fastvit_sa12", {"layers": (1, 1, 1, 2), "embed_dims": (8, 8, 16, 32)}, other_sizes=True, size=64),
    StagedHost("cpubone_nano", _LOW, other_sizes=True, size=128),
    StagedHost("cpubone_b0_bfrobust", _LOW, size=128, quick=False),
    StagedHost("iformer_t", _IFORMER, size=64, other_sizes=True, gain=4.0),
    StagedHost("iformer_h", _IFORMER, size=64, quick=False, gain=4.0),
    StagedHost("hiera_tiny_224", {"img_size": 64, "embed_dim": 8, "stages": (1, 2, 2, 1)}, size=64),
    StagedHost("mvitv2_tiny", build=partial(MultiScaleVit, MultiScaleVitCfg(**_MVIT), img_size=32)),
    StagedHost(
        "mvitv2_base_cls", build=partial(MultiScaleVit, MultiScaleVitCfg(**_MVIT, use_cls_token=True), img_size=32)
    ),
    StagedHost("pvt_v2_b0", _PYRAMID, other_sizes=True),
    StagedHost("pvt_v2_b2_li", _PYRAMID, other_sizes=True, quick=False),
    StagedHost("lowformer_b0", _LOW, other_sizes=True, size=128),
    StagedHost("twins_svt_small", {**_PYRAMID, "depths": (2, 2), "wss": [3, 3]}, other_sizes=True, checkpoints=False),
    StagedHost("twins_pcpvt_small", _PYRAMID, other_sizes=True, checkpoints=False),
    StagedHost(
        "efficientvit_m0",
        {
            "img_size": 64,
            "embed_dim": [16, 32],
            "key_dim": [4, 4],
            "depth": [1, 2],
            "num_heads": [2, 2],
            "window_size": [3, 3],
            "down_ops": (("", 1), ("subsample", 2)),
        },
        gain=3.0,
        size=64,
        positions=True,
    ),
    StagedHost(
        "nest_tiny",
        build=partial(Nest, img_size=32, embed_dims=(8, 16, 16), num_heads=(1, 2, 2), depths=(1, 1, 2)),
        positions=True,
    ),
    StagedHost(
        "gcvit_xxtiny",
        build=partial(
            GlobalContextVit,
            img_size=64,
            embed_dim=8,
            depths=(2, 2, 1, 1),
            num_heads=(1, 2, 2, 2),
            window_ratio=(16, 16, 16, 32),
        ),
        size=64,
        positions=True,
    ),
    StagedHost(
        "sam2_hiera_tiny",
        {"embed_dim": 8, "stages": (1, 2, 2, 1), "global_att_blocks": (4,), "window_spec": (4, 4, 4, 4)},
        other_sizes=True,
        size=64,
        sharing=False,
    ),
    StagedHost(
        "tiny_vit_5m_224",
        {"embed_dims": [8, 8, 16, 16], "depths": [1, 2, 1, 1], "num_heads": [1, 2, 2, 2], "window_sizes": [3, 3, 3, 2]},
        other_sizes=True,
        size=64,
        positions=True,
    ),
    StagedHost(
        "caformer_s18",
        other_sizes=True,
        build=partial(
            MetaFormer,
            depths=(1, 2),
            dims=(8, 32),
            token_mixers=[SepConv, Attention],
            norm_layers=[LayerNorm2dNoBias, LayerNormNoBias],
            res_scale_init_values=(None, 1.0),
        ),
    ),
    StagedHost(
        "gemma4_vit_167m",
        {
            "img_size": 48,
            "patch_size": 16,
            "embed_dim": 16,
            "depth": 2,
            "num_heads": 2,
            "head_dim": 8,
            "intermediate_size": 16,
            "position_embedding_size": 16,
            "pooling_kernel_size": 1,
        },
        size=48,
    ),
    StagedHost(
        "shvit_s1",
        {"embed_dim": (16, 24, 32), "partial_dim": (8, 8, 8), "qk_dim": (4, 4, 4), "depth": (1, 1, 2)},
        other_sizes=True,
        size=128,
    ),
    StagedHost(
        "efficientformerv2_s0",
        {"img_size": 64, "depths": (1, 1, 2, 2), "embed_dims": (8, 8, 16, 16), "num_vit": 1, "mlp_ratios": 2},
        size=64,
        positions=True,
    ),
    StagedHost(
        "efficientformer_l1",
        {"depths": (1, 1, 1, 2), "embed_dims": (8, 8, 8, 16), "num_vit": 1},
        size=224,
        positions=True,
        quick=False,
    ),
    StagedHost("nextvit_small", {"stem_chs": (8, 8, 8), "depths": (1, 1, 5, 2)}, size=64, quick=False, gain=2.5),
    StagedHost(
        "convit_tiny",
        {"img_size": 32, "patch_size": 8, "embed_dim": 6, "num_heads": 4, "depth": 3, "local_up_to_layer": 2},
        positions=True,
        checkpoints=False,
    ),
    StagedHost(
        "tnt_s_patch16_224",
        {
            "img_size": 32,
            "embed_dim": 16,
            "inner_dim": 8,
            "depth": 2,
            "num_heads_outer": 2,
            "num_heads_inner": 2,
        },
        positions=True,
    ),
    StagedHost(
        "visformer_tiny",
        {"img_size": 64, "init_channels": 8, "embed_dim": 32, "depth": (1, 1, 2), "num_heads": 2},
        size=64,
    ),
    StagedHost(
        "mobilenetv4_hybrid_medium",
        other_sizes=True,
        build=_mobilenet,
    ),
    StagedHost("botnet26t_256", build=_byobnet("bottleneck"), positions=True, gain=3.0),
    StagedHost("halonet26t", build=_byobnet("halo", block_size=4, halo_size=1), positions=True, gain=3.0),
]

STAGED = {host.name: host for host in _ALL}
