"""The stack of blocks whose tokens are reduced, and the hooks that every reduction has in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.fx
from torch import nn

from lamzoo.adapters.hosts import (
    AttentionSite,
    EnterBlock,
    HostAdapter,
    LeaveBlock,
    Pooling,
    SharedStateHook,
    TokenLayout,
    adapters_of,
    remove_hooks,
    token_layout,
    watch_block,
)
from lamzoo.adapters.state import masks_of
from lamzoo.adapters.wrappers import unwrap
from lamzoo.errors import UnsupportedHostError, class_name
from lamzoo.lam import Lam, SharedState
from lamzoo.lam.unmasked import Unmasked

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


def find_stack(model: nn.Module, *, masked: bool, verb: str) -> Stack:
    """Finds the one stack of a model whose tokens can be reduced.

    Args:
        model: has masks or not, and may be wrapped.
        masked: whether the stack must have masks.
        verb: past participle, such as ``"pruned"``, for the message.

    Raises:
        UnsupportedHostError: the model has no masks and needs them, or has no such stack, or several.
    """
    model = unwrap(model)
    sites: dict[str, tuple[AttentionSite, HostAdapter]] = {}
    if masked or any(isinstance(module, Lam) for module in model.modules()):
        paths = [path.removesuffix(".lam") for path in masks_of(model)]
    else:
        for adapter in adapters_of(model).values():
            sites |= {site.path: (site, adapter) for site in adapter.sites(model)}
        paths = list(sites)
    stacks: dict[str, tuple[TokenLayout, list[str]]] = {}
    parts: dict[str, str] = {}
    for path in paths:
        layout = token_layout(model, path)
        blocks = path.rsplit(".", 2)[0] if layout.pooling is None else layout.pooling.blocks
        parts[blocks] = class_name(model.get_submodule(blocks.rpartition(".")[0]))
        if layout.pooling is not None:
            stacks.setdefault(blocks, (layout, []))[1].append(path)
    if len(stacks) != 1:
        found = ", ".join(f"{blocks} of {owner}" for blocks, owner in parts.items())
        raise UnsupportedHostError(
            f"Tokens can be {verb} in one VisionTransformer of timm or one image tower of open_clip, and "
            f"{'the masks are' if masked else 'the attention is'} in {found or 'no layer that is known'}; give such a "
            "part of the model."
        )
    ((layout, found_paths),) = stacks.values()
    assert layout.pooling is not None
    names = [path.rpartition(".")[0] for path in found_paths]
    return Stack(
        layout,
        layout.pooling,
        {name: model.get_submodule(name) for name in names},
        dict(sites[path] for path in found_paths if path in sites),
    )


class ReductionHook(SharedStateHook):
    """A hook that :func:`remove_reduction` removes."""


class _Enter(EnterBlock, ReductionHook):
    """An :class:`EnterBlock` that is removed with the reduction."""


class _Leave(LeaveBlock, ReductionHook):
    """A :class:`LeaveBlock` that is removed with the reduction."""


def watch_passes(stack: Stack, shared: SharedState) -> None:
    """Lets gradient checkpointing find the pass of every block, unless the masks have seen to it already."""
    for index, block in enumerate(stack.blocks.values()):
        if not any(isinstance(hook, EnterBlock) for hook in block._forward_pre_hooks.values()):
            watch_block(block, _Enter(shared, needs_pass=index > 0), _Leave(shared))


def check_not_traced(tokens: object) -> None:
    """Raises :class:`UnsupportedHostError` in a symbolic trace, which can't follow tokens that leave."""
    if isinstance(tokens, torch.fx.Proxy):
        raise UnsupportedHostError(
            "Symbolic tracing (torch.fx, create_feature_extractor) can't follow token reduction; trace the model "
            "after lamzoo.remove_reduction(model), or export it with torch.export."
        )


def remove_reduction(model: Model) -> Model:
    """Removes merging or pruning of tokens from a model, in place.

    Args:
        model: with or without token reduction.

    Returns:
        The same model.
    """
    for module in model.modules():
        if isinstance(module, Lam):
            module.attention_hook = None
        remove_hooks(module, (ReductionHook,))
        for name in ("token_reduction", "prune_config"):
            vars(module).pop(name, None)
    if any(isinstance(module, Unmasked) for module in model.modules()):
        inner = unwrap(model)
        for adapter in adapters_of(inner).values():
            adapter.unwrap(inner, Unmasked)
    return model
