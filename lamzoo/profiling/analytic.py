"""Closed formulas for multiply-accumulates, one per family; ``profile`` is checked against them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import Any

from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem, HybridEmbed
from torch import nn

from lamzoo.adapters.state import has_masks
from lamzoo.adapters.wrappers import unwrap
from lamzoo.errors import UnsupportedHostError, class_name
from lamzoo.lam import LamConfig
from lamzoo.lam.fused import FusedAttention, takes_fused_form


@dataclass(frozen=True)
class Stack:
    """The transformer blocks of one tower.

    Attributes:
        tokens: number of tokens, including class and register tokens.
        width: token dimension.
        depth: number of blocks.
        heads: number of attention heads.
        hidden: hidden dimension of the MLP.
        copies: token sequences per sample, such as the frames of a video.
        masked: whether the blocks have masks if the model has any.
        keys: number of tokens attended to; the blocks' own by default.
        fused_macs: MACs that the mask of a layer in its fused form adds to one sequence; None in other layers.
    """

    tokens: int
    width: int
    depth: int
    heads: int
    hidden: int
    copies: int = 1
    masked: bool = True
    keys: int | None = None
    fused_macs: int | None = None

    @property
    def seen(self) -> int:
        """Number of tokens that each token attends to."""
        return self.tokens if self.keys is None else self.keys

    @property
    def macs(self) -> int:
        """MACs of the blocks: four projections, two attention products and a two-layer MLP in each."""
        projections = 2 * (self.tokens + self.seen) * self.width**2
        attention = 2 * self.tokens * self.seen * self.width
        mlp = 2 * self.tokens * self.width * self.hidden
        return self.copies * self.depth * (projections + attention + mlp)

    def lam_macs(self, config: LamConfig) -> int:
        """MACs added by masks: their networks, and the dense ``left @ right.T`` of every block."""
        if not self.masked:
            return 0
        if self.fused_macs is not None:
            return self.copies * self.depth * self.fused_macs
        heads = self.heads if config.heads == "per-head" else 1
        network = _mlp_macs(self.tokens, (self.width, *config.hidden, heads * config.rank))
        if not config.has_positions:
            network += _mlp_macs(self.seen, (self.width, *config.hidden, heads * (config.rank + 1)))
        networks = self.depth if config.layers == "multi" else 1
        return self.copies * (networks * network + self.depth * heads * self.tokens * self.seen * config.columns)


@dataclass(frozen=True)
class AnalyticMacs:
    """MACs of one forward pass of one sample, by closed formulas.

    Attributes:
        ends: MACs before and after the blocks: patch embedding or convolutional stem, classifier, projections.
        blocks: MACs of the plain transformer blocks.
        lam: MACs added by the masks.
    """

    ends: int
    blocks: int
    lam: int

    @property
    def gmacs(self) -> float:
        """Total number of MACs in 10^9."""
        return (self.ends + self.blocks + self.lam) / 1e9

    @property
    def lam_gmacs(self) -> float:
        """MACs of the masks in 10^9."""
        return self.lam / 1e9


def analytic_macs(model: nn.Module) -> AnalyticMacs:
    """Computes the MACs of a model from its dimensions, without running it.

    Supports timm's ``VisionTransformer`` with a patch embedding or a convolutional stem, open_clip's ``CLIP`` with two
    transformers (for one image and one text), CLIP4Clip on such towers (one video of ``max_frames`` frames and one
    text), Moment-DETR and QD-DETR (one video of ``max_clips`` clips and one sentence of ``max_words`` words), and the
    describer (one clip of ``seconds`` seconds and one sentence of maximum length), each with or without masks of any
    configuration.

    Args:
        model: a model at the input size that it was built for; wrappers of ``torch.compile`` and data parallelism are
            ignored.

    Returns:
        The MACs by origin.

    Raises:
        UnsupportedHostError: the model's family or one of its parts is not supported; names it.
    """
    model = unwrap(model)
    formula = _FORMULAS.get(class_name(model))
    if formula is None:
        raise _unknown(model)
    ends, stacks = formula(model)
    if formula is not _vision_transformer:
        for module in model.modules():
            if isinstance(module, FusedAttention):
                raise _unknown(module)
    config: LamConfig | None = getattr(model, "lam_config", None)
    lam = 0 if config is None else sum(stack.lam_macs(config) for stack in stacks)
    return AnalyticMacs(ends=ends, blocks=sum(stack.macs for stack in stacks), lam=lam)


def _vision_transformer(model: Any) -> tuple[int, list[Stack]]:
    if any(type(block) is not Block for block in model.blocks):
        raise _unknown(next(block for block in model.blocks if type(block) is not Block))
    if model.attn_pool is not None:
        raise _unknown(model.attn_pool)
    masked = [block for block in model.blocks if has_masks(block)] or list(model.blocks)
    block = masked[0]
    stack = Stack(
        tokens=model.num_prefix_tokens + prod(model.patch_embed.grid_size),
        width=model.embed_dim,
        depth=len(masked),
        heads=block.attn.num_heads,
        hidden=block.mlp.fc1.out_features,
    )
    rest = replace(stack, depth=len(model.blocks) - len(masked), masked=False)
    fused = block.attn._modules.get("fused")
    if fused is not None and takes_fused_form(fused, fused.weight.new_empty(1, stack.tokens, stack.width)):
        stack = replace(stack, fused_macs=fused.mask_macs(stack.tokens, stack.tokens))
    return _embedding_macs(model.patch_embed) + model.embed_dim * model.num_classes, [stack, rest]


def _embedding_macs(embed: Any) -> int:
    if type(embed) is PatchEmbed:
        return _conv_macs(embed.proj, embed.grid_size)
    if type(embed) is not HybridEmbed or type(embed.backbone) is not ConvStem:
        raise _unknown(embed)
    macs, size = 0, embed.img_size
    for conv in (module for module in embed.backbone.modules() if isinstance(module, nn.Conv2d)):
        size = tuple(-(-side // stride) for side, stride in zip(size, conv.stride, strict=True))
        macs += _conv_macs(conv, size)
    return macs + (_conv_macs(embed.proj, embed.grid_size) if isinstance(embed.proj, nn.Conv2d) else 0)


def _clip(model: Any) -> tuple[int, list[Stack]]:
    from open_clip.transformer import VisionTransformer as ClipVision

    vision = model.visual
    if type(vision) is not ClipVision or vision.attn_pool is not None:
        raise _unknown(vision)
    width = vision.conv1.out_channels
    image = _clip_stack(vision.transformer, 1 + prod(vision.grid_size), width)
    text = _clip_stack(model.transformer, model.context_length, model.ln_final.normalized_shape[0])
    ends = _conv_macs(vision.conv1, vision.grid_size) + width * vision.output_dim
    return ends + text.width * vision.output_dim, [image, text]


def _clip4clip(model: Any) -> tuple[int, list[Stack]]:
    if class_name(model.clip) != "open_clip.model.CLIP":
        raise _unknown(model.clip)
    frames, width = model.max_frames, model.num_features
    ends, (image, text) = _clip(model.clip)
    text_end = text.width * width
    ends = frames * (ends - text_end) + text_end
    image = replace(image, copies=frames, masked=has_masks(model.clip.visual))
    text = replace(text, masked=has_masks(model.clip.transformer))
    if model.similarity_type == "mean":
        return ends + width, [image, text]  # and one cosine similarity
    tight = model.similarity_type == "tight"
    tokens = model.head.length if tight else frames
    head = replace(_clip_stack(model.head.transformer, tokens, width), masked=has_masks(model.head))
    words, patches = model.words * model.context_length, frames * model.patch_grid**2
    ends += words * text.width * width + patches * image.width * width
    if not tight:
        return ends + width, [image, text, head]
    ends += width**2 + width
    last = model.head.transformer.resblocks[-1]
    if class_name(last) != "lamzoo.models.clip4clip.heads.FirstTokenBlock" or last.shares_mask:
        return ends, [image, text, head]
    earlier = [replace(head, depth=head.depth - 1)] if head.depth > 1 else []
    return ends, [image, text, *earlier, replace(head, depth=1, tokens=1, keys=tokens)]


def _moments(model: Any) -> tuple[int, list[Stack]]:
    clips, words, width = model.max_clips, model.max_words, model.width
    layer = model.encoder[0]
    heads, hidden = layer.attention.attn.num_heads, layer.feed_forward.layers[0].out_features
    encoder = Stack(clips + words, width, len(model.encoder), heads, hidden, masked=has_masks(model.encoder))
    ends = _mlp_macs(clips, (model.video_dim, width, width)) + _mlp_macs(words, (model.text_dim, width, width))
    if hasattr(model, "cross"):
        crossing = Stack(clips, width, len(model.cross), heads, hidden, masked=has_masks(model.cross), keys=words)
        encoder = replace(encoder, tokens=1 + clips)
        queries, depth = model.decoder.num_queries, len(model.decoder.layers)
        ends += (clips + 1) * width**2  # saliency: clips and the global token
        ends += 0 if model.proposal_head is None else _mlp_macs(clips, (width, width, width, 2))
        # The decoder derives positions from spans, projects them separately and concatenates them with the content.
        own, across = 2 * queries, clips + queries
        ends += depth * ((own + across) * width**2 + queries * clips * width) + queries * width**2
        ends += depth * _mlp_macs(queries, (width, width, width)) + (depth - 1) * _mlp_macs(queries, (width,) * 3)
        ends += depth * (_mlp_macs(queries, (width, width, 1)) + _mlp_macs(queries, (width, width, width, 2)))
        stacks, memory = [crossing, encoder], clips
    else:
        queries, depth = model.query_embedding.num_embeddings, len(model.decoder)
        ends += clips * width
        stacks, memory = [encoder], clips + words
    ends += depth * (_mlp_macs(queries, (width, width, width, 2)) + 2 * queries * width)
    looks = Stack(queries, width, depth, heads, 0, masked=has_masks(model.decoder))
    return ends, [*stacks, looks, replace(looks, keys=memory, hidden=hidden)]


def _describer(model: Any) -> tuple[int, list[Stack]]:
    streams, text = model.example_inputs()
    counts = {name: stream.mask.shape[1] for name, stream in streams.items()}
    tokens, width, words, decoder = 1 + sum(counts.values()), model.width, text.shape[1], model.decoder
    ends = sum(count * model.features[name] * width for name, count in counts.items())
    if model.word_head is not None:
        ends += tokens * width * decoder.vocab_size
    layers = model.encoder.layers
    hidden = layers[0].feed_forward[0].out_features
    encoder = Stack(tokens, width, len(layers), layers[0].attn.num_heads, hidden, masked=has_masks(model.encoder))
    if class_name(decoder) == "lamzoo.models.describer.gpt2.Gpt2Decoder":
        inside, stacks = _gpt2(decoder, tokens, width, words)
        return ends + inside, [encoder, *stacks]
    ends += words * width * decoder.vocab_size
    itself = Stack(words, width, len(decoder.transformer.resblocks), decoder.num_heads, 4 * width, masked=False)
    across = replace(itself, depth=len(decoder.text_decoder.resblocks))
    return ends, [encoder, itself, across, replace(across, keys=tokens)]


def _gpt2(decoder: Any, tokens: int, width: int, words: int) -> tuple[int, list[Stack]]:
    settings = decoder.settings
    ends = tokens * width * settings.width + words * settings.width * settings.vocab_size
    itself = Stack(words, settings.width, settings.layers, settings.heads, 4 * settings.width, masked=False)
    if settings.reads == "prefix":
        return ends, [replace(itself, tokens=tokens + words)]
    return ends, [itself, replace(itself, hidden=0, keys=tokens)]


# Keyed by class name, because open_clip is optional and the zoo's models are slow to import.
_FORMULAS: dict[str, Callable[[Any], tuple[int, list[Stack]]]] = {
    class_name(VisionTransformer): _vision_transformer,
    "open_clip.model.CLIP": _clip,
    "lamzoo.models.clip4clip.model.Clip4Clip": _clip4clip,
    "lamzoo.models.moment_detr.model.MomentDetr": _moments,
    "lamzoo.models.moment_detr.qd_detr.QdDetr": _moments,
    "lamzoo.models.describer.model.Describer": _describer,
}


def _clip_stack(transformer: Any, tokens: int, width: int) -> Stack:
    block = transformer.resblocks[0]
    return Stack(tokens, width, len(transformer.resblocks), block.attn.num_heads, block.mlp.c_fc.out_features)


def _conv_macs(conv: nn.Conv2d, output_size: Sequence[int]) -> int:
    return prod(conv.kernel_size) * conv.in_channels // conv.groups * conv.out_channels * prod(output_size)


def _mlp_macs(tokens: int, widths: Sequence[int]) -> int:
    return tokens * sum(inputs * outputs for inputs, outputs in pairwise(widths))


def _unknown(part: nn.Module) -> UnsupportedHostError:
    return UnsupportedHostError(
        f"There is no formula for the MACs of {class_name(part)}; lamzoo.profile counts a forward pass instead."
    )
