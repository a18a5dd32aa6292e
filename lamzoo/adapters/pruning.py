"""Fewer tokens from layer to layer, in timm's vision transformers with masks.

Modifications to the host: behind each block named, a forward hook leaves the tokens that its attention scored highest;
a forward pre-hook on the first block starts the count anew, and one on each block lets gradient checkpointing find it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lamzoo.adapters.slots import EnterBlock, SharedStateHook
from lamzoo.adapters.state import masks_of
from lamzoo.errors import ConfigError, UnsupportedHostError
from lamzoo.lam import Lam, SharedState
from lamzoo.lam.pruning import SCORERS, PruneConfig, select


class _Prune(SharedStateHook):
    """Forward hook of a block: lets the tokens go that its attention scored lowest."""

    def __init__(self, shared: SharedState, config: PruneConfig, num_prefix_tokens: int) -> None:
        super().__init__(shared)
        self.config = config
        self.num_prefix_tokens = num_prefix_tokens

    def __call__(self, block: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        scores = self.shared.current.scores
        assert scores is not None  # the block's attention left them
        reduction = select(scores, self.config.keep, self.config.rest, self.num_prefix_tokens)
        self.shared.reduce(reduction)
        return reduction(output)


class _AllTokens(SharedStateHook):
    """Forward pre-hook of the first block: nothing has left yet, whatever an earlier pass, cut short, left behind."""

    def __call__(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        self.shared.begin(self.shared.current.grid)


def prune(model: nn.Module, config: PruneConfig) -> None:
    """Puts the hooks into a model, in place of those that may be there.

    Args:
        model: with masks, on a timm ``VisionTransformer``, or a wrapper around one.
        config: where tokens leave and how many; the last block's can't.

    Raises:
        UnsupportedHostError: there are no masks, or they are on another host.
        ConfigError: a layer that the model has not.
    """
    stack, host, lams = _stack(model)
    if config.at[-1] >= len(lams) - 1:
        raise ConfigError(
            f"at={config.at}: behind layer {len(lams) - 1}, the last of {stack}, no tokens are left to spare work on; "
            f"name layers from 0 to {len(lams) - 2}."
        )
    remove_pruning(model)
    blocks, shared = model.get_submodule(stack), lams[0].shared
    for index, (block, lam) in enumerate(zip(blocks.children(), lams, strict=True)):
        if not any(isinstance(hook, EnterBlock) for hook in block._forward_pre_hooks.values()):
            block.register_forward_pre_hook(_EnterPruned(shared))
        if index == 0:
            block.register_forward_pre_hook(_AllTokens(shared))
        if index in config.at:
            lam.scorer = partial(SCORERS[config.score], has_class_token=host.has_class_token)
            block.register_forward_hook(_Prune(shared, config, host.num_prefix_tokens))


class _EnterPruned(EnterBlock):
    """An :class:`EnterBlock` that goes with the pruning."""


def remove_pruning(model: nn.Module) -> None:
    """Takes the hooks out again; a model without any is left as it is."""
    for module in model.modules():
        if isinstance(module, Lam):
            module.scorer = None
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, (_Prune, _AllTokens, _EnterPruned)):
                    del hooks[key]


def depth(model: nn.Module) -> int:
    """Returns the number of layers that :func:`prune` may name, the last one included.

    Raises:
        UnsupportedHostError: as for :func:`prune`.
    """
    return len(_stack(model)[2])


def _stack(model: nn.Module) -> tuple[str, VisionTransformer, list[Lam]]:
    """Returns the path of the one stack of blocks with masks, its host, and the masks."""
    masks = masks_of(model)
    stack, *others = dict.fromkeys(path.rsplit(".", 3)[0] for path in masks)
    host = model.get_submodule(stack.rpartition(".")[0])
    if not isinstance(host, VisionTransformer) or others:
        raise UnsupportedHostError(
            f"Tokens can be pruned in one timm VisionTransformer, and {stack} belongs to a {type(host).__name__}"
            f"{f', beside {len(others)} more stacks' if others else ''}."
        )
    return stack, host, list(masks.values())
