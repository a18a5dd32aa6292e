"""The stack of blocks whose tokens are reduced, and the hooks that every reduction has in common."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
import torch.fx
from torch import nn

from lamzoo.adapters.hosts import (
    AttentionSite,
    EnterBlock,
    HostAdapter,
    LeaveBlock,
    NoteGrid,
    Pooling,
    SharedStateHook,
    TokenLayout,
    adapters_of,
    check_restorable,
    remove_hooks,
    watch_grid,
)
from lamzoo.adapters.state import masks_of
from lamzoo.adapters.wrappers import check_model, is_sharded, unwrap
from lamzoo.errors import UnsupportedHostError, class_name
from lamzoo.lam import Lam, SharedState
from lamzoo.lam.unmasked import Unmasked
from lamzoo.reduction.config import TokenReduction

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Stack:
    """A stack of blocks, each with one attention layer.

    Attributes:
        layout: of its tokens.
        pooling: how the model pools its tokens.
        blocks: path and module of each block.
        sites: attention layers without masks, by the adapter that can take them over; empty in a masked stack.
    """

    layout: TokenLayout
    pooling: Pooling
    blocks: dict[str, Any]
    sites: dict[AttentionSite, HostAdapter]

    @property
    def lams(self) -> list[Lam]:
        """The masks of its layers; empty in a stack without masks."""
        return [lam for block in self.blocks.values() for lam in block.modules() if isinstance(lam, Lam)]

    @property
    def num_patches(self) -> int | None:
        """Number of tokens after the prefix at the input size that the model was built for, if it is known."""
        return None if self.layout.length is None else self.layout.length - self.layout.num_prefix_tokens


def find_stack(model: nn.Module, *, masked: bool, verb: Literal["merged", "pruned"]) -> Stack:
    """Finds the one stack of a model whose tokens can be reduced.

    Args:
        model: has masks or not, and may be wrapped. Of several stacks, those with masks come first.
        masked: whether the stack must have masks.
        verb: what happens to the tokens.

    Raises:
        UnsupportedHostError: the model has no masks and needs them, or has no such stack, or several; or the tokens of
            its stack can't be reduced in this way.
    """
    model = unwrap(model)
    if masked and not _has(model, Lam):
        raise UnsupportedHostError(
            f"The model ({class_name(model)}) has no learnable masks, which say what to prune; merge its tokens with "
            "lamzoo.merge_tokens, or call lamzoo.add_lam(model) first."
        )
    masks = masks_of(model) if masked else {}
    found: dict[str, tuple[TokenLayout, Pooling, HostAdapter]] = {}
    for adapter in adapters_of(model).values():
        for layout in adapter.stacks(model):
            assert layout.pooling is not None
            found[layout.pooling.blocks] = (layout, layout.pooling, adapter)
    with_masks = {blocks: each for blocks, each in found.items() if _has(model.get_submodule(blocks), Lam)}
    if masked or with_masks:
        found = with_masks
    reasons = {
        blocks: pooling.no_merging if verb == "merged" else pooling.no_pruning
        for blocks, (_, pooling, _) in found.items()
    }
    possible = [blocks for blocks, reason in reasons.items() if reason is None]
    if not possible and len(found) == 1:
        ((path, (_, pooling, _)),) = found.items()
        host = class_name(model.get_submodule(pooling.root))
        raise UnsupportedHostError(f"Tokens can't be {verb} in {path}: {host} {reasons[path]}.")
    if len(possible) != 1:
        owners = found or dict.fromkeys(path.removesuffix(".lam").rsplit(".", 2)[0] for path in masks)
        where = ", ".join(f"{path} of {class_name(model.get_submodule(path.rpartition('.')[0]))}" for path in owners)
        what = "the masks are" if masked else "such blocks are"
        where = where or f"no part of {class_name(model)}"
        raise UnsupportedHostError(
            f"Tokens can be {verb} in {_SUPPORTED[verb]}, and {what} in {where}; give such a part of the model, with "
            "one of them."
        )
    layout, pooling, adapter = found[possible[0]]
    children = model.get_submodule(pooling.blocks)
    sites: list[AttentionSite] = []
    if not _has(children, (Lam, Unmasked)):
        prefix = pooling.root + "." if pooling.root else ""
        for site in adapter.sites(model.get_submodule(pooling.root)):
            others = tuple(prefix + path for path in site.other_paths)
            sites.append(replace(site, path=prefix + site.path, other_paths=others))
    inside = pooling.blocks + "."
    return Stack(
        layout,
        pooling,
        {inside + name: block for name, block in children.named_children()},
        {site: adapter for site in sites if site.path.startswith(inside)},
    )


# For messages.
_SUPPORTED = {
    "merged": "one VisionTransformer, Eva, NaFlexVit, Qwen3VitEncoder or DeepseekVitEncoder of timm, one image tower "
    "of open_clip, one ViT, DeiT, DINOv2 or DINOv3, I-JEPA, ViT-MSN, CLIP or SigLIP vision tower, VideoMAE or ViViT "
    "of transformers or a describer",
    "pruned": "one VisionTransformer or Eva of timm or one image tower of open_clip",
}


def _has(module: nn.Module, kinds: type[nn.Module] | tuple[type[nn.Module], ...]) -> bool:
    return any(isinstance(each, kinds) for each in module.modules())


class ReductionHook(SharedStateHook):
    """A hook that :func:`remove_reduction` removes."""


class EndPass(ReductionHook):
    """Forward hook of the module that runs the blocks: ends the pass, also when the module raised."""

    def __call__(self, root: nn.Module, args: tuple[Any, ...], output: object) -> None:
        self.shared.end()


class _Enter(EnterBlock, ReductionHook):
    """An :class:`EnterBlock` that is removed with the reduction."""


class _Leave(LeaveBlock, ReductionHook):
    """A :class:`LeaveBlock` that is removed with the reduction."""


class _NoteGrid(NoteGrid, ReductionHook):
    """A :class:`NoteGrid` that is removed with the reduction."""


def watch_image(layout: TokenLayout, shared: SharedState) -> None:
    """Begins each pass with the patch grid of its image, where the grid may change."""
    if layout.patch_embed is not None:
        watch_grid(layout.patch_embed, _NoteGrid(shared, layout.grid_at), _Leave(shared))


def watch_passes(blocks: Iterable[nn.Module], shared: SharedState) -> None:
    """Lets gradient checkpointing find the pass of every block.

    Call it between the registration of the forward hooks that change the tokens of a block, whose output is noted with
    the pass, and that of the pre-hooks that do, whose pass has to be known.
    """
    for index, block in enumerate(blocks):
        if not any(isinstance(hook, EnterBlock) for hook in block._forward_pre_hooks.values()):  # of the masks
            block.register_forward_pre_hook(_Enter(shared, needs_pass=index > 0), with_kwargs=True)
        block.register_forward_hook(_Leave(shared), always_call=True)


def watch_layers(layers: Iterable[nn.Module], shared: SharedState) -> None:
    """Lets gradient checkpointing find the pass in the attention layers, where it leaves out the hooks of a block."""
    for layer in layers:
        if not any(isinstance(hook, EnterBlock) for hook in layer._forward_pre_hooks.values()):  # of the masks
            layer.register_forward_pre_hook(_Enter(shared, needs_pass=True, inside=True), with_kwargs=True)


def check_unsharded(model: nn.Module) -> None:
    """Raises :class:`UnsupportedHostError` for a model sharded by FSDP, whose attention layers can't be replaced."""
    if is_sharded(model):
        raise UnsupportedHostError(
            f"The model ({class_name(model)}) is sharded by FSDP, and merging replaces its attention layers; merge "
            "tokens before that."
        )


def check_not_traced(tokens: object) -> None:
    """Raises :class:`UnsupportedHostError` in a symbolic trace, which can't follow tokens that leave."""
    if isinstance(tokens, torch.fx.Proxy):
        raise UnsupportedHostError(
            "Symbolic tracing (torch.fx, create_feature_extractor) can't follow token reduction; trace the model "
            "after lamzoo.remove_reduction(model), or export it with torch.export."
        )


def reduction_of(model: nn.Module) -> TokenReduction | None:
    """Returns the token reduction of a model, or of a part of it; None if it has none."""
    found = (vars(module).get("token_reduction") for module in model.modules())
    return next((reduction for reduction in found if reduction is not None), None)


def remove_reduction(model: Model) -> Model:
    """Removes merging or pruning of tokens from a model, in place.

    Args:
        model: with or without token reduction.

    Returns:
        The same model.

    Raises:
        UnsupportedHostError: it is not a ``torch.nn.Module``, or has an attention layer that can't be replaced (named).
            The model is left unchanged.
    """
    check_model(model)
    check_restorable(model, Unmasked)
    for module in model.modules():
        if isinstance(module, Lam):
            module.attention_hook = None
            module.shared.end_all()  # of which one may have been left halfway
        remove_hooks(module, (ReductionHook,))
        for name in ("token_reduction", "prune_config"):
            vars(module).pop(name, None)
    if any(isinstance(module, Unmasked) for module in model.modules()):
        inner = unwrap(model)
        for adapter in adapters_of(inner).values():
            adapter.unwrap(inner, Unmasked)
    return model
