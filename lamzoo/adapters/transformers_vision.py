"""Vision transformers of Hugging Face transformers: attention layers that take over a host's, and token layouts.

In these classes each attention layer is replaced by a subclass that takes over its parameters, as in timm's models, so
that tokens can merge and the layer has a fused form. The outputs that transformers records of a layer stay those of its
class.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from transformers.backbone_utils import BackboneMixin
from transformers.models.beit.modeling_beit import BeitAttention, BeitModel
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPVisionModel
from transformers.models.deit.modeling_deit import DeiTAttention, DeiTForImageClassification, DeiTModel
from transformers.models.dinov2.modeling_dinov2 import Dinov2Attention, Dinov2Backbone, Dinov2Model
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersAttention,
    Dinov2WithRegistersBackbone,
    Dinov2WithRegistersModel,
)
from transformers.models.dinov3_vit.modeling_dinov3_vit import (
    DINOv3ViTAttention,
    DINOv3ViTBackbone,
    DINOv3ViTModel,
    rotate_half,
)
from transformers.models.ijepa.modeling_ijepa import IJepaAttention, IJepaModel
from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipVisionModel
from transformers.models.siglip2.modeling_siglip2 import Siglip2Attention, Siglip2VisionModel
from transformers.models.videomae.modeling_videomae import VideoMAEModel, VideoMAESelfAttention
from transformers.models.vit.modeling_vit import ViTAttention, ViTForImageClassification, ViTModel
from transformers.models.vit_msn.modeling_vit_msn import ViTMSNAttention, ViTMSNForImageClassification, ViTMSNModel
from transformers.models.vivit.modeling_vivit import VivitAttention, VivitForVideoClassification, VivitModel

from lamzoo.adapters.hosts import POSITION_BIAS, HostTakeover, Pooling, TokenLayout
from lamzoo.errors import UnsupportedHostError, class_name
from lamzoo.lam.fused import Between, Projection, is_bare
from lamzoo.lam.layer import lets_attend
from lamzoo.lam.resize import Grid
from lamzoo.lam.token_map import take
from lamzoo.layers.attention import split_heads


class LamVisionAttention(HostTakeover):
    """Self-attention of transformers' vision models under a learnable mask.

    Attributes:
        projections: names of the layers that make queries, keys and values.
        output_projection: name of the layer that the heads go through; None where the block has it.
        scaling_name: of the scale of the scores.
        dropout_name: of the dropout rate of the weights.
    """

    projections: ClassVar[tuple[str, str, str]] = ("q_proj", "k_proj", "v_proj")
    output_projection: ClassVar[str | None] = "o_proj"
    scaling_name: ClassVar[str] = "scaling"
    dropout_name: ClassVar[str] = "attention_dropout"

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Any]:  # transformers' layers say that they return weights where they return None
        """Masked self-attention of ``hidden_states (B, N, C)``; arguments and result as those of the host's layer.

        Raises:
            UnsupportedHostError: ``attention_mask`` was made for another implementation than eager and SDPA, or is
                given although tokens have merged.
        """
        host: Any = self
        is_eager = host.config._attn_implementation in (None, "eager")
        causal = kwargs.get("is_causal", host.is_causal) and attention_mask is None and not is_eager
        causal = bool(causal and hidden_states.shape[1] > 1)  # as transformers' SDPA
        weighs = is_eager or bool(kwargs.get("output_attentions"))
        between = self._between(kwargs)
        if attention_mask is None and not (causal or weighs):
            heads = self.attend_fused(hidden_states, between)
            if heads is not None:
                return self._output(heads), None
        if attention_mask is not None and self.lam.shared.current.has_reduced:
            raise UnsupportedHostError(
                f"{class_name(self.host_class)} got an attention mask of all tokens after some were merged; leave it "
                "out, or call lamzoo.remove_reduction(model) first."
            )
        keys = self.lam.key_tokens(hidden_states)
        query, key, value = (
            split_heads(projection(tokens), self._heads)
            for projection, tokens in zip(self._projections(), (hidden_states, keys, keys), strict=True)
        )
        if between is not None:
            query, key = between(query, key)
        allowed, bias = read_mask(self, attention_mask, key.shape[2])
        options: dict[str, Any] = {
            "allowed": allowed,
            "bias": bias,
            "is_causal": causal,
            "dropout_p": getattr(host, self.dropout_name) if host.training else 0.0,
            "scale": getattr(host, self.scaling_name),
            "present": present_keys(attention_mask) if self.lam.has_positions else None,
        }
        weights = None
        if weighs:
            out, weights = self.lam.attend_with_weights(hidden_states, keys, query, key, value, **options)
        else:
            out = self.lam.attend(hidden_states, keys, query, key, value, **options)
        return self._output(out.transpose(1, 2).flatten(2)), weights

    def _output(self, heads: Tensor) -> Tensor:
        name = self.output_projection
        out: Tensor = heads if name is None else getattr(self, name)(heads)
        return out

    def _between(self, kwargs: Mapping[str, Any]) -> Between | None:
        """Returns what changes queries and keys before they attend, of the keyword arguments of the forward pass."""
        return None

    def _projections(self) -> list[nn.Module]:
        return [getattr(self, name) for name in self.projections]

    def no_fused_form(self) -> str | None:
        host: Any = self
        if host.config._attn_implementation in (None, "eager"):
            return "eager attention returns its weights; the implementation 'sdpa' has a fused form"
        return super().no_fused_form()

    @property
    def _heads(self) -> int:
        host: Any = self
        heads: int = host.num_heads if hasattr(host, "num_heads") else host.num_attention_heads
        return heads

    def projection(self) -> Projection | None:
        layers: list[Any] = self._projections()
        if not all(map(is_bare, layers)):
            return None
        biases = [layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
        weight = torch.cat([layer.weight for layer in layers])
        return Projection(weight, torch.cat(biases), self._heads, getattr(self, self.scaling_name), layers)


class LamViTAttention(LamVisionAttention, ViTAttention):
    """ViT's attention under a learnable mask."""


class LamDeiTAttention(LamVisionAttention, DeiTAttention):
    """DeiT's attention under a learnable mask."""


class LamViTMSNAttention(LamVisionAttention, ViTMSNAttention):
    """ViT-MSN's attention under a learnable mask."""


class LamIJepaAttention(LamVisionAttention, IJepaAttention):
    """I-JEPA's attention under a learnable mask."""


class LamDinov2Attention(LamVisionAttention, Dinov2Attention):
    """DINOv2's attention under a learnable mask."""


class LamDinov2WithRegistersAttention(LamVisionAttention, Dinov2WithRegistersAttention):
    """The attention of DINOv2 with registers under a learnable mask."""


class LamDinov3Attention(LamVisionAttention, DINOv3ViTAttention):
    """DINOv3's attention under a learnable mask; a merged token has the rotation of the token whose place it takes."""

    dropout_name = "dropout"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """As of the other layers; ``position_embeddings`` are cosines and sines of the patches, ``(N, d)`` each."""
        return super().forward(hidden_states, attention_mask, position_embeddings=position_embeddings, **kwargs)

    def _between(self, kwargs: Mapping[str, Any]) -> Between | None:
        rotations = kwargs.get("position_embeddings")
        return None if rotations is None else partial(self._rotate, *rotations)

    def _rotate(self, cos: Tensor, sin: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        prefix = 1 + self.config.num_register_tokens
        rotated = []
        for heads, places in zip((query, key), self.lam.shared.places(), strict=True):
            turns = [cos, sin]
            if places is not None:
                at = places[:, prefix:] - prefix
                turns = [take(each.expand(at.shape[0], -1, -1), at).unsqueeze(1) for each in turns]
            patches = heads[:, :, prefix:]
            patches = patches * turns[0] + rotate_half(patches) * turns[1]
            rotated.append(torch.cat([heads[:, :, :prefix], patches.type_as(heads)], dim=2))
        return rotated[0], rotated[1]


class LamBeitAttention(LamVisionAttention, BeitAttention):
    """BEiT's attention under a learnable mask; its attention mask has the bias of relative positions in it."""

    def no_fused_form(self) -> str | None:
        return "it adds a bias for each pair of positions" if _adds_bias(self.config) else super().no_fused_form()


class LamVivitAttention(LamVisionAttention, VivitAttention):
    """ViViT's attention under a learnable mask."""


class LamVideoMAEAttention(LamVisionAttention, VideoMAESelfAttention):
    """VideoMAE's attention under a learnable mask."""

    projections = ("query", "key", "value")
    output_projection = None
    dropout_name = "dropout_prob"

    def forward(  # type: ignore[override]  # the host's takes no mask
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """As of the other layers.

        Raises:
            UnsupportedHostError: also, tokens were left out, as in pretraining, and the mask has ``keys="position"``.
        """
        config: Any = self.config
        if self.lam.has_positions and not self.lam.shared.current.has_reduced:
            rows, columns = _grid_at(to_2tuple(config.patch_size), to_2tuple(config.image_size))
            if hidden_states.shape[1] != config.num_frames // _tubelet(config) * rows * columns:
                raise UnsupportedHostError(
                    f"{class_name(self.host_class)} got a part of its tokens, as in VideoMAE's pretraining, and their "
                    "places, which masks with keys='position' need, are unknown; use keys='content'."
                )
        return super().forward(hidden_states, attention_mask, **kwargs)


class LamClipAttention(LamVisionAttention, CLIPAttention):
    """The attention of CLIP's image and text towers under a learnable mask."""

    output_projection = "out_proj"
    scaling_name = "scale"
    dropout_name = "dropout"


class LamSiglipAttention(LamVisionAttention, SiglipAttention):
    """The attention of SigLIP's image and text towers under a learnable mask."""

    output_projection = "out_proj"
    scaling_name = "scale"
    dropout_name = "dropout"


class LamSiglip2Attention(LamVisionAttention, Siglip2Attention):
    """The attention of SigLIP 2's image and text towers under a learnable mask."""

    output_projection = "out_proj"
    scaling_name = "scale"
    dropout_name = "dropout"


TAKEOVERS: Mapping[type[nn.Module], type[LamVisionAttention]] = {
    ViTAttention: LamViTAttention,
    DeiTAttention: LamDeiTAttention,
    ViTMSNAttention: LamViTMSNAttention,
    IJepaAttention: LamIJepaAttention,
    Dinov2Attention: LamDinov2Attention,
    Dinov2WithRegistersAttention: LamDinov2WithRegistersAttention,
    DINOv3ViTAttention: LamDinov3Attention,
    BeitAttention: LamBeitAttention,
    VivitAttention: LamVivitAttention,
    VideoMAESelfAttention: LamVideoMAEAttention,
    CLIPAttention: LamClipAttention,
    SiglipAttention: LamSiglipAttention,
    Siglip2Attention: LamSiglip2Attention,
}


@dataclass(frozen=True)
class Tower:
    """A class of vision transformers, and where its parts are.

    Attributes:
        blocks: path of the list of blocks.
        attn: path of the attention layer in a block.
        norm: name of the norm of a block before its attention.
        patch_embed: path of the module that makes patches of the images.
        num_prefix_tokens: number of class and register tokens.
        pooled_by: class of the models that read the class token of such a tower and nothing else.
        padding: name of the attention mask that its blocks are called with where images have grids of their own.
    """

    blocks: str
    attn: str = "attention"
    norm: str = "layernorm_before"
    patch_embed: str = "embeddings.patch_embeddings"
    num_prefix_tokens: int = 1
    pooled_by: type[nn.Module] | None = None
    padding: str | None = None


_DINOV2 = Tower("encoder.layer", norm="norm1")
_DINOV3 = Tower("model.layer", norm="norm1")
_TOWERS: Mapping[type[nn.Module], Tower] = {
    ViTModel: Tower("layers", pooled_by=ViTForImageClassification),
    DeiTModel: Tower("layers", num_prefix_tokens=2, pooled_by=DeiTForImageClassification),
    ViTMSNModel: Tower("layers", pooled_by=ViTMSNForImageClassification),
    IJepaModel: Tower("layers", num_prefix_tokens=0),
    Dinov2Model: _DINOV2,
    Dinov2Backbone: _DINOV2,
    Dinov2WithRegistersModel: _DINOV2,
    Dinov2WithRegistersBackbone: _DINOV2,
    DINOv3ViTModel: _DINOV3,
    DINOv3ViTBackbone: _DINOV3,
    BeitModel: Tower("layers"),
    VivitModel: Tower("layers", pooled_by=VivitForVideoClassification),
    VideoMAEModel: Tower("encoder.layer", attn="attention.attention", num_prefix_tokens=0),
    CLIPVisionModel: Tower("encoder.layers", "self_attn", "layer_norm1", "embeddings.patch_embedding"),
    SiglipVisionModel: Tower("encoder.layers", "self_attn", "layer_norm1", "embeddings.patch_embedding", 0),
    Siglip2VisionModel: Tower(
        "encoder.layers", "self_attn", "layer_norm1", "embeddings.patch_embedding", 0, padding="attention_mask"
    ),
}


def tower_layouts(model: nn.Module) -> Iterator[TokenLayout]:
    """Yields the layout of the blocks of each vision transformer of a known class, with its pooling."""
    for path, host in find_towers(model):
        kind = next(kind for kind in _TOWERS if isinstance(host, kind))
        yield _layout(model, path, host, _TOWERS[kind])


def find_towers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields path and module of each vision transformer of a known class."""
    for path, host in model.named_modules():
        if isinstance(host, tuple(_TOWERS)):
            yield path, host


def _layout(model: nn.Module, path: str, host: Any, tower: Tower) -> TokenLayout:
    config = host.config
    prefix: int = tower.num_prefix_tokens + getattr(config, "num_register_tokens", 0)
    parent = path.rpartition(".")[0]
    irreducible = POSITION_BIAS if _adds_bias(config) else _MAPS if isinstance(host, BackboneMixin) else None
    pooled = bool(path) and tower.pooled_by is not None and type(model.get_submodule(parent)) is tower.pooled_by
    pooling = Pooling(
        blocks=f"{path}.{tower.blocks}" if path else tower.blocks,
        root=parent if pooled else path,
        kind="token" if pooled else "",
        has_class_token=tower.num_prefix_tokens > 0,
        num_unpooled=prefix,
        last=host,
        norm=tower.norm,
        attn=tower.attn,
        checkpoints_forward=True,
        reads_prefix_only=partial(bool, pooled),
        reads_blocks=partial(_reads_blocks, config),
        arguments=frozenset({"output_hidden_states", "output_attentions", "return_dict", "position_embeddings"}),
        padding=tower.padding,
        no_merging=irreducible,
        no_pruning=irreducible or _RETURNS_ALL,
    )
    if tower.padding is not None:
        reason = f"{class_name(host)} has a patch grid for each image"
        return TokenLayout(num_prefix_tokens=prefix, no_positions=reason, pooling=pooling)
    height, width = to_2tuple(config.image_size)
    grid_at = partial(_grid_at, to_2tuple(_patch_size(config)))
    rows, columns = grid_at((height, width))
    if hasattr(config, "num_frames"):
        steps = config.num_frames // _tubelet(config)
        return TokenLayout(length=prefix + steps * rows * columns, num_prefix_tokens=prefix, pooling=pooling)
    return TokenLayout(
        length=prefix + rows * columns,
        num_prefix_tokens=prefix,
        grid=(rows, columns),
        grid_at=grid_at,
        patch_embed=host.get_submodule(tower.patch_embed),
        pooling=pooling,
    )


def _adds_bias(config: Any) -> bool:
    """Returns whether the blocks of a configuration add a bias for each pair of positions, as BEiT's may."""
    names = ("use_relative_position_bias", "use_shared_relative_position_bias")
    return any(getattr(config, name, False) for name in names)


_RETURNS_ALL = "returns every token; merge them with lamzoo.merge_tokens, which gives each the one it is part of"
_MAPS = "returns feature maps, in which every token has its place; use the model of which it is the backbone"


def _reads_blocks(config: Any, kwargs: Mapping[str, Any]) -> bool:
    """Returns whether a forward pass with these arguments returns the outputs of blocks.

    Raises:
        UnsupportedHostError: it returns the input of the first block as well, of which merged tokens are made.
    """
    wanted = kwargs.get("output_hidden_states", getattr(config, "output_hidden_states", False))
    if wanted is None or wanted is False:
        return False
    last = config.num_hidden_layers
    if wanted is True or 0 in (index % (last + 1) for index in ([wanted] if isinstance(wanted, int) else wanted)):
        raise UnsupportedHostError(
            "output_hidden_states asks for the input of the first block, whose tokens merge in it; name the outputs "
            f"that you need, such as output_hidden_states=[{last - 1}, {last}], or call lamzoo.remove_reduction(model) "
            "first."
        )
    return True


def _grid_at(patch: tuple[int, int], size: tuple[int, int]) -> Grid:
    return size[0] // patch[0], size[1] // patch[1]


def _patch_size(config: Any) -> Any:
    tubelet = getattr(config, "tubelet_size", None)  # ViViT's has the patch size in it
    return tuple(tubelet[1:]) if isinstance(tubelet, (list, tuple)) else config.patch_size


def _tubelet(config: Any) -> int:
    size = config.tubelet_size
    frames: int = size[0] if isinstance(size, (list, tuple)) else size
    return frames


def present_keys(mask: Tensor | None) -> Tensor | None:
    """Returns which keys some query may attend to, bool ``(B, Nk)``, of a mask ``(B, 1 | H, Nq, Nk)``."""
    if mask is None:
        return None
    return lets_attend(mask).any(dim=2).any(dim=1)


def read_mask(module: nn.Module, mask: Any, keys: int) -> tuple[Tensor | None, Tensor | None]:
    """Returns the attention mask of a host as ``allowed`` and ``bias`` of :func:`lamzoo.lam.lam_attention`.

    Args:
        module: the attention layer, for messages.
        mask: as transformers makes it for eager and SDPA; None without one.
        keys: number of keys, at most as many as in the mask.

    Raises:
        UnsupportedHostError: the mask was made for another implementation.
    """
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        host = class_name(getattr(module, "host_class", module))
        raise UnsupportedHostError(
            f"{host} was given an attention mask of another implementation than eager and SDPA; call "
            "set_attn_implementation('sdpa') of the model."
        )
    mask = mask[..., :keys]
    return (mask, None) if mask.dtype == torch.bool else (None, mask)
