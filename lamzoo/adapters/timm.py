"""Learnable masks in timm's vision transformers.

Modifications to the host: each attention layer of a class in :attr:`TimmAdapter.takeovers` is replaced by a layer that
takes over its submodules and parameter names and calls :func:`lamzoo.lam.lam_attention` where the host calls
``F.scaled_dot_product_attention``; with position keys, ``patch_embed`` gets a hook that records the patch grid, unless
the layers know the grid of their tokens. A relative position bias is added to the scores after the mask.

Position tables keep their initial length: under ``dynamic_img_size`` and after ``set_input_size`` they are resized in
each forward pass, as timm resizes position embeddings under ``dynamic_img_size``.

Supported models: VisionTransformer (DeiT, DINOv2, CLIP, SigLIP, ViTamin, ...), its hybrids with a convolutional stem,
Eva (EVA-02, RoPE-ViT, PE, DINOv3), BEiT, VisionTransformerRelPos, NaFlexVit, PiT, MobileViT, the DeepSeek and Qwen3
encoders; those of :mod:`lamzoo.adapters.windows`, :mod:`lamzoo.adapters.pooled` and :mod:`lamzoo.adapters.hybrids`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

from timm.layers import (
    Attention,
    AttentionPool2d,
    AttentionPoolLatent,
    AttentionPoolPrr,
    AttentionRope,
    DiffAttention,
    HybridEmbed,
    Mlp,
    RelPosBiasTf,
    RelPosMlp,
    RotaryEmbeddingMixed,
    RotAttentionPool2d,
)
from timm.models.beit import Beit
from timm.models.deepseek_vit import DeepseekVitBlock, DeepseekVitEncoder
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.maxxvit import ConvNeXtBlock, MbConvBlock
from timm.models.naflexvit import NaFlexVit
from timm.models.qwen3_vit import Qwen3VitEncoder
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.vision_transformer import Block, DiffParallelScalingBlock, VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

from lamzoo.adapters.hosts import (
    POSITION_BIAS,
    AttentionSite,
    HostTakeover,
    Pooling,
    TakeoverAdapter,
    TokenLayout,
    input_width,
    named,
)
from lamzoo.adapters.hybrids import HYBRID_TAKEOVERS, NO_TOKEN_SOFTMAX
from lamzoo.adapters.pooled import POOLED_TAKEOVERS
from lamzoo.adapters.staged import StagedTakeover
from lamzoo.adapters.timm_layers import VIT_TAKEOVERS
from lamzoo.adapters.windows import WINDOW_TAKEOVERS, window_layout
from lamzoo.errors import UnsupportedHostError, class_name
from lamzoo.lam.resize import Grid

# Attention by the difference of two softmaxes.
_DIFFERENTIAL = (DiffAttention, DiffParallelScalingBlock)

# Blocks without attention in a stack where other blocks have it.
_CONVOLUTIONS = (MbConvBlock, ConvNeXtBlock)

# Modules with heads that aren't self-attention of tokens: pooling in front of the classifier, positions, and a block
# that holds the attention.
_NO_SELF_ATTENTION = (
    AttentionPoolLatent,
    AttentionPoolPrr,
    AttentionPool2d,
    RotAttentionPool2d,
    RotaryEmbeddingMixed,
    RelPosMlp,
    RelPosBiasTf,
    SwinTransformerV2Block,
)

# The block of a stack that has an attention layer, and the layer's place in the block: a block may have several, and
# some can't be parted from their attention.
_LAYER = re.compile(r"(?P<stack>.+?)\.\d+(\.(?P<name>(attns\.\d+\.)?[a-z]\w*(\.[a-z]\w*)*))?")


class TimmAdapter(TakeoverAdapter):
    """Masks timm's vision transformers."""

    takeovers: ClassVar[Mapping[type[nn.Module], type[HostTakeover]]] = {
        **POOLED_TAKEOVERS,
        **HYBRID_TAKEOVERS,
        **VIT_TAKEOVERS,
        **WINDOW_TAKEOVERS,
    }

    def sites(self, model: nn.Module) -> Iterator[AttentionSite]:
        """Yields the timm attention layers of a model, in order of the forward pass.

        Pooling heads get no mask, since their queries are learned parameters and not tokens.

        Raises:
            UnsupportedHostError: a timm model has attention that can't carry a mask, or a block without the attention
                of the other blocks; names it.
        """
        roots: list[str] = []
        for path, module in model.named_modules():
            if _is_timm(module) and not any(path.startswith(f"{root}.") or not root for root in roots):
                roots.append(path)
                yield from self._sites_of(path, module)

    def token_layout(self, model: nn.Module, path: str) -> TokenLayout | None:
        """Returns the layout of class token, registers and patches, where the layer is in a list of timm's blocks."""
        if (takeover := self._staged(model.get_submodule(path))) is not None:
            return takeover.layout(model, path)
        match = _LAYER.fullmatch(path)
        if match is None or not self._serves(model.get_submodule(path)):
            return None
        if (layout := window_layout(model, path)) is not None:
            return layout
        host: Any = model.get_submodule(match["stack"].rpartition(".")[0])
        pooling = _pooling(host, match["stack"]) if match["name"] == "attn" else None
        return _layout(host, pooling)

    def stacks(self, model: nn.Module) -> Iterator[TokenLayout]:
        """Yields the layout of the blocks of each vision transformer of a known class."""
        for path, host in model.named_modules():
            if isinstance(host, _POOLING_HOSTS):
                blocks = f"{path}.blocks" if path else "blocks"
                yield _layout(host, _pooling(host, blocks))

    def _sites_of(self, root_path: str, root: nn.Module) -> list[AttentionSite]:
        _check_softmax(root_path, root)
        found = []
        staged = False
        for path, module in root.named_modules(prefix=root_path):
            if type(module) in self.takeovers:
                takeover = self._staged(module)
                match = (_LAYER if takeover is None else takeover.place).fullmatch(path)
                if match is None:
                    raise UnsupportedHostError(
                        f"{named(path, module)} is an attention layer outside of any list of blocks; put it into a "
                        "model of timm's, or call add_lam on that model."
                    )
                staged = staged or takeover is not None
                found.append(
                    takeover.site(path, module) if takeover else _site(path, match["stack"], match["name"], module)
                )
            elif _attends(module) and not any(type(part) in self.takeovers for part in module.modules()):
                raise UnsupportedHostError(f"{named(path, module)} can't carry a learnable mask; {_SERVED}")
        if found and not staged:  # in models with stages, other blocks are convolutions
            _check_complete(root_path, root, found)
        return found

    def _staged(self, module: nn.Module) -> type[StagedTakeover] | None:
        takeover = self.takeovers.get(getattr(module, "host_class", type(module)))
        return takeover if takeover is not None and issubclass(takeover, StagedTakeover) else None


_SERVED = "timm's models that can are listed in lamzoo's documentation, reference/timm-hosts.md."


def _is_timm(module: nn.Module) -> bool:
    return any(cls.__module__.startswith("timm.") for cls in type(module).__mro__)


def _attends(module: nn.Module) -> bool:
    return _is_timm(module) and hasattr(module, "num_heads") and not isinstance(module, _NO_SELF_ATTENTION)


def _check_softmax(root_path: str, root: nn.Module) -> None:
    """Checks that no layer has another kind of attention, for which the model is refused whatever else it has."""
    for path, module in root.named_modules(prefix=root_path):
        if (reason := NO_TOKEN_SOFTMAX.get(type(module))) is not None:
            raise UnsupportedHostError(
                f"{named(path, module)} can't carry a learnable mask, which acts on a softmax over tokens: {reason}; "
                "choose a model whose layers all have one."
            )


def _check_complete(root_path: str, root: nn.Module, found: list[AttentionSite]) -> None:
    """Checks that every block has a mask, except for the blocks of a convolutional stem."""
    layers = [f"{site.path}." for site in found]
    stacks = {site.stack for site in found}
    stems = tuple(
        f"{path}." for path, module in root.named_modules(prefix=root_path) if isinstance(module, HybridEmbed)
    )
    for path, module in root.named_modules(prefix=root_path):
        if path.startswith(stems):
            continue
        named_blocks = path.rpartition(".")[2] == "blocks" and isinstance(module, (nn.Sequential, nn.ModuleList))
        if path in stacks or named_blocks:
            for name, block in module.named_children():
                if not isinstance(block, _CONVOLUTIONS) and not any(
                    layer.startswith(f"{path}.{name}.") for layer in layers
                ):
                    attn = getattr(block, "attn", None)
                    what = "no `attn`" if attn is None else f"an `attn` of {class_name(attn)}"
                    raise UnsupportedHostError(
                        f"{named(f'{path}.{name}', block)} has {what} and can't carry a learnable mask; {_SERVED}"
                    )


def _site(path: str, stack: str, name: str | None, attn: Any) -> AttentionSite:
    places = (getattr(attn, each, None) for each in ("qkv", "q_proj", "in_proj"))
    dim = input_width(next(each for each in places if each is not None))
    return AttentionSite(
        path=path,
        stack=stack,
        query_dim=dim,
        key_dim=dim,
        num_heads=attn.num_heads * (2 if isinstance(attn, _DIFFERENTIAL) else 1),
        watched=path if name is None else None,
    )


# Hosts whose pooling is known, and those of them that tokens can't be reduced in. The distilled DeiT comes before its
# base class.
_BIASED_HOSTS = (Beit, VisionTransformerRelPos)
_GRID_HOSTS = (Qwen3VitEncoder, DeepseekVitEncoder)
_ROTARY_HOSTS = (Eva, NaFlexVit, *_GRID_HOSTS)
_POOLING_HOSTS = (VisionTransformerDistilled, VisionTransformer, *_ROTARY_HOSTS, *_BIASED_HOSTS)
_MERGING_BLOCKS = (Block, EvaBlock, DeepseekVitBlock)  # whose attention reads the output of `norm1`
_MERGING_LAYERS = (Attention, AttentionRope, EvaAttention)


def _pooling(host: Any, blocks: str) -> Pooling | None:
    if not isinstance(host, _POOLING_HOSTS):
        return None
    no_merging, no_pruning = _no_reduction(host)
    return Pooling(
        blocks=blocks,
        root=blocks.rpartition(".")[0],
        kind="attention" if getattr(host, "attn_pool", None) is not None else host.global_pool,
        has_class_token=getattr(host, "has_class_token", getattr(host, "cls_token", None) is not None),
        num_unpooled=0 if getattr(host, "pool_include_prefix", False) else host.num_prefix_tokens,
        last=getattr(host, "norm", host.blocks),
        reads_prefix_only=partial(_reads_prefix_only, host),
        last_linear=getattr(getattr(host.blocks[-1], "mlp", None), "fc2", None),
        reads_mean_only=partial(_reads_mean_only, host),
        arguments=frozenset({"rope"}) if isinstance(host, _ROTARY_HOSTS) else frozenset(),
        padding="attn_mask" if isinstance(host, NaFlexVit) else None,
        no_merging=no_merging,
        no_pruning=no_pruning,
    )


def _no_reduction(host: Any) -> tuple[str | None, str | None]:
    """Returns the reasons why the tokens of a host can't be merged, and why they can't be pruned."""
    if isinstance(host, _BIASED_HOSTS):
        return POSITION_BIAS, POSITION_BIAS
    single = all(hasattr(block, "attn") for block in host.blocks)
    no_pruning = None if single else "has blocks with several attention layers, or one beside the MLP; use timm's Block"
    if isinstance(host, NaFlexVit):
        no_pruning = "may have padding, which is pruned like any token; merge tokens with lamzoo.merge_tokens"
    if isinstance(host, _GRID_HOSTS):
        no_pruning = "makes its tokens a grid again, for which none may leave; merge tokens with lamzoo.merge_tokens"
    # By their forward pass, because FSDP puts classes of its own above those of the blocks.
    own = {kind.forward for kind in _MERGING_BLOCKS}
    others = {getattr(block, "host_class", type(block)) for block in host.blocks if type(block).forward not in own}
    if others:
        no_merging = (
            f"has blocks of {_names(others)}, and merging supports {_names(_MERGING_BLOCKS)}, whose attention reads "
            "the normalised tokens alone"
        )
        way_out = "; add masks and call lamzoo.prune_tokens" if no_pruning is None else "; build it with one of these"
        return no_merging + way_out, no_pruning
    layers = {getattr(block.attn, "host_class", type(block.attn)) for block in host.blocks} - set(_MERGING_LAYERS)
    if layers:
        reason = f"has attention layers of {_names(layers)}; use {_names(_MERGING_LAYERS)}"
        return reason, reason
    return None, no_pruning


def _names(classes: Iterable[type]) -> str:
    return ", ".join(sorted(map(class_name, classes)))


def _reads_prefix_only(host: Any) -> bool:
    """Returns whether a host pools its class token, in timm's own way."""
    return _pools_as_timm(host) and host.global_pool == "token"


def _reads_mean_only(host: Any) -> bool:
    """Returns whether a host takes the mean of its last block's output, from a linear layer on."""
    block = host.blocks[-1]
    if not (_pools_as_timm(host) and host.global_pool == "avg" and type(getattr(host, "norm", None)) is nn.Identity):
        return False
    linear = type(block) is Block and type(block.mlp) is Mlp and type(block.mlp.fc2) is nn.Linear
    return linear and not (block.training and block.mlp.drop2.p > 0)


def _pools_as_timm(host: Any) -> bool:
    known = next(kind for kind in _POOLING_HOSTS if isinstance(host, kind))
    own = all(
        getattr(type(host), name, None) is getattr(known, name, None) for name in ("forward", "forward_head", "pool")
    )
    return own and getattr(host, "attn_pool", None) is None


def _layout(host: Any, pooling: Pooling | None) -> TokenLayout:
    patch_embed: Any = getattr(host, "patch_embed", None)
    prefix: int = getattr(host, "num_prefix_tokens", 0)
    if isinstance(host, NaFlexVit) or not hasattr(patch_embed, "dynamic_feat_size"):
        per_sample = isinstance(host, NaFlexVit)
        reason = f"{class_name(host)} has {'a patch grid for each sample' if per_sample else 'no known patch grid'}"
        return TokenLayout(num_prefix_tokens=prefix, no_positions=reason, pooling=pooling)
    grid: Grid = tuple(patch_embed.grid_size)
    drops = getattr(getattr(host, "patch_drop", None), "prob", 0.0) > 0
    reason = "patch_drop_rate > 0 removes patches in training, and their positions with them"
    return TokenLayout(
        length=prefix + grid[0] * grid[1],
        num_prefix_tokens=prefix,
        grid=grid,
        grid_at=partial(_grid_at, patch_embed),
        patch_embed=patch_embed,
        no_positions=reason if drops else None,
        pooling=pooling,
    )


def _grid_at(patch_embed: Any, size: tuple[int, int]) -> Grid:
    """Returns the grid of the patches of an image."""
    if isinstance(patch_embed, HybridEmbed):  # which rounds down where the padded convolutions of a stem round up
        height, width = (math.ceil(n / by) * by for n, by in zip(size, patch_embed.feature_ratio, strict=True))
        size = height, width
    grid: Grid = patch_embed.dynamic_feat_size(size)
    return grid
