"""Vision transformers: timm's backbones with learnable masks, and a small ViT with a convolutional stem."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import timm
from timm.layers import Attention, AttentionRope, RelPosBias, RotaryEmbeddingCat
from timm.models import PretrainedCfg, build_model_with_cfg
from timm.models._features_fx import FeatureGraphNet
from timm.models.twins import PosConv
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem, HybridEmbed
from torch import Tensor, nn

from lamzoo.adapters import add_lam
from lamzoo.errors import ConfigError
from lamzoo.lam import LamConfig

PositionEncoding = Literal["rotary", "conv"]

_CFG = PretrainedCfg(fixed_input_size=True, first_conv="patch_embed.backbone.0.conv", classifier="head")  # of micro_vit


def lam_vit(config: dict[str, Any], *, lam: LamConfig | None, **overrides: Any) -> nn.Module:
    """Builds a timm transformer with masks, without weights.

    Args:
        config: ``timm``: the name of a timm architecture; ``kwargs``: its arguments.
        lam: configuration of the masks; ``None`` for the plain backbone.
        **overrides: timm model arguments (``num_classes``, ``img_size``, ``drop_path_rate``, ...) that override
            ``config``.

    Returns:
        The timm model.
    """
    model = timm.create_model(config["timm"], pretrained=False, **{**config.get("kwargs", {}), **overrides})
    return _with_masks(model, lam)


def micro_vit(
    config: dict[str, Any],
    *,
    lam: LamConfig | None,
    rel_pos_bias: bool = False,
    position_encoding: PositionEncoding | None = None,
    lam_blocks: Sequence[int] | None = None,
    **overrides: Any,
) -> nn.Module:
    """Builds a small vision transformer for small images, with timm's convolutional stem.

    Args:
        config: arguments of timm's ``VisionTransformer``; ``patch_size`` must be 4, the stride of the stem.
        lam: configuration of the masks; ``None`` for the plain backbone.
        rel_pos_bias: add a learned relative position bias (timm's ``RelPosBias``) to the scores of each layer: the
            ablation's control for masks with position keys.
        position_encoding: further positions for the ablation, besides the learned embedding: ``"rotary"`` turns queries
            and keys of each layer (timm's ``AttentionRope``); ``"conv"`` adds a depthwise convolution of the patches
            after the first block (CPVT, arXiv 2102.10882, timm's ``PosConv``).
        lam_blocks: numbers of the blocks with masks, which must have ``layers="multi"``; None for all. Without masks it
            is ignored.
        **overrides: arguments of the transformer that override ``config``, and those of timm's ``features_only``.

    Returns:
        A ``VisionTransformer`` whose ``patch_embed`` is a four-layer ``ConvStem``; with ``features_only``, wrapped as
        in timm.

    Raises:
        ConfigError: ``rel_pos_bias`` is combined with masks, or another of these arguments is invalid.
    """
    if rel_pos_bias and lam is not None:
        raise ConfigError("rel_pos_bias is a control without masks; leave it out or pass lam=None.")
    if position_encoding not in (None, *get_args(PositionEncoding)):
        known = ", ".join(map(repr, get_args(PositionEncoding)))
        raise ConfigError(f"position_encoding is {position_encoding!r}; it must be one of {known}, or None.")
    model: nn.Module = build_model_with_cfg(
        _vit,
        "vit_micro",
        pretrained=False,
        pretrained_cfg=_CFG.to_dict(),
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},  # the defaults of timm's VisionTransformer
        **{**config, "rel_pos_bias": rel_pos_bias, "position_encoding": position_encoding, **overrides},
    )
    model = _with_masks(model, lam)
    if lam_blocks is not None and lam is not None:
        _keep_masks(model, lam, lam_blocks)
    return model


def _vit(rel_pos_bias: bool, position_encoding: PositionEncoding | None, **arguments: Any) -> VisionTransformer:
    if position_encoding == "rotary":
        arguments["attn_layer"] = AttentionRope
    model = VisionTransformer(embed_layer=_stem, **arguments)
    if rel_pos_bias:
        _add_rel_pos_bias(model)
    if position_encoding is not None and model.num_prefix_tokens:
        raise ConfigError(
            "position_encoding is for patches alone; create the model with class_token=False, reg_tokens=0."
        )
    if position_encoding == "rotary":
        _add_rotary_positions(model)
    elif position_encoding == "conv":
        model.blocks[0].pos_conv = PosConv(model.embed_dim, model.embed_dim)
        model.blocks[0].register_forward_hook(partial(_add_conv_positions, size=model.patch_embed.grid_size))
    return model


def _with_masks(model: nn.Module, lam: LamConfig | None) -> nn.Module:
    if lam is None:
        return model
    if isinstance(model, FeatureGraphNet):
        raise ConfigError(
            "feature_cls='fx' traces a model before it has masks; use feature_cls='getter', or create the whole model "
            "and call create_feature_extractor of torchvision.models.feature_extraction."
        )
    return add_lam(model, lam)


def _keep_masks(model: Any, lam: LamConfig, blocks: Sequence[int]) -> None:
    """Removes the masks of all other blocks."""
    if lam.layers != "multi":
        raise ConfigError("lam_blocks selects among masks of each layer; use it with masks that have layers='multi'.")
    if not blocks or not set(blocks) <= set(range(len(model.blocks))):
        raise ConfigError(
            f"lam_blocks is {tuple(blocks)}; it must name some of the blocks 0 to {len(model.blocks) - 1}."
        )
    for number, block in enumerate(model.blocks):
        if number not in blocks:
            block.attn = block.attn.unwrap()
    model.lam_blocks = tuple(blocks)


def _add_rotary_positions(model: VisionTransformer) -> None:
    for attention in (module for module in model.modules() if isinstance(module, AttentionRope)):
        attention.num_prefix_tokens = 0
        attention.rope = RotaryEmbeddingCat(
            attention.head_dim, in_pixels=False, feat_shape=list(model.patch_embed.grid_size)
        )
        attention.register_forward_pre_hook(_pass_rotary_positions, with_kwargs=True)


def _pass_rotary_positions(attention: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "rope": attention.rope.get_embed()}


def _add_conv_positions(block: Any, args: Any, tokens: Tensor, *, size: tuple[int, int]) -> Tensor:
    if tokens.shape[1] != size[0] * size[1]:
        raise ConfigError("position_encoding='conv' needs all patches; leave tokens unmerged and unpruned.")
    added: Tensor = block.pos_conv(tokens, size)
    return added


def _add_rel_pos_bias(model: VisionTransformer) -> None:
    for attention in (module for module in model.modules() if isinstance(module, Attention)):
        attention.rel_pos = RelPosBias(model.patch_embed.grid_size, attention.num_heads, model.num_prefix_tokens)
        attention.register_forward_pre_hook(_pass_rel_pos_bias, with_kwargs=True)


def _pass_rel_pos_bias(attention: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "attn_mask": attention.rel_pos.get_bias()}


def _stem(*, patch_size: int, in_chans: int, embed_dim: int, **kwargs: Any) -> HybridEmbed:
    channels = (embed_dim // 4, embed_dim // 2, embed_dim, embed_dim)
    place = {key: kwargs[key] for key in ("device", "dtype") if key in kwargs}
    stem = ConvStem(in_chans=in_chans, depth=4, channels=channels, kernel_size=3, stride=(1, 2, 2, 1), **place)
    return HybridEmbed(stem, patch_size=1, in_chans=in_chans, embed_dim=embed_dim, proj=False, **kwargs)
