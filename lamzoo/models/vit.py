"""Vision transformers: timm's backbones with learnable masks, and a small ViT with a convolutional stem."""

from __future__ import annotations

from typing import Any

import timm
from timm.layers import Attention, RelPosBias
from timm.models._features import FeatureGetterNet
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem, HybridEmbed
from torch import nn

from lamzoo.adapters import add_lam
from lamzoo.errors import ConfigError
from lamzoo.lam import LamConfig


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
    return model if lam is None else add_lam(model, lam)


def micro_vit(
    config: dict[str, Any],
    *,
    lam: LamConfig | None,
    rel_pos_bias: bool = False,
    features_only: bool = False,
    out_indices: int | tuple[int, ...] = 3,
    **overrides: Any,
) -> nn.Module:
    """Builds a small vision transformer for small images, with timm's convolutional stem.

    Args:
        config: arguments of timm's ``VisionTransformer``; ``patch_size`` must be 4, the stride of the stem.
        lam: configuration of the masks; ``None`` for the plain backbone.
        rel_pos_bias: add a learned relative position bias (timm's ``RelPosBias``) to the scores of each layer: the
            ablation's control for masks with position keys.
        features_only: return the feature maps of blocks instead of logits, as in timm.
        out_indices: the blocks of ``features_only``: their indices, or the number of last blocks.
        **overrides: arguments of the transformer that override ``config``.

    Returns:
        A ``VisionTransformer`` whose ``patch_embed`` is a four-layer ``ConvStem``; with ``features_only``, wrapped in a
        ``FeatureGetterNet``.

    Raises:
        ConfigError: ``rel_pos_bias`` is combined with masks.
    """
    model = VisionTransformer(embed_layer=_stem, **{**config, **overrides})
    if rel_pos_bias and lam is not None:
        raise ConfigError("rel_pos_bias is a control without masks; leave it out or pass lam=None.")
    if rel_pos_bias:
        _add_rel_pos_bias(model)
    built = FeatureGetterNet(model, out_indices=out_indices) if features_only else model
    return built if lam is None else add_lam(built, lam)


def _add_rel_pos_bias(model: VisionTransformer) -> None:
    for attention in (module for module in model.modules() if isinstance(module, Attention)):
        attention.rel_pos = RelPosBias(model.patch_embed.grid_size, attention.num_heads, model.num_prefix_tokens)
        attention.register_forward_pre_hook(_pass_rel_pos_bias, with_kwargs=True)


def _pass_rel_pos_bias(attention: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "attn_mask": attention.rel_pos.get_bias()}


def _stem(*, patch_size: int, in_chans: int, embed_dim: int, **kwargs: Any) -> HybridEmbed:
    channels = (embed_dim // 4, embed_dim // 2, embed_dim, embed_dim)
    stem = ConvStem(in_chans=in_chans, depth=4, channels=channels, kernel_size=3, stride=(1, 2, 2, 1))
    return HybridEmbed(stem, patch_size=1, in_chans=in_chans, embed_dim=embed_dim, proj=False, **kwargs)
