"""Fewer tokens from layer to layer, in hosts with masks whose adapters say how they pool their tokens.

Modifications to the host: behind each block named, a forward hook leaves the tokens that its attention scored highest;
a forward pre-hook on the first block starts the count anew, and one on each block lets gradient checkpointing find it.
For training with all tokens in place, a forward hook on what is pooled weights them for the mean over those that stay.
"""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from lamzoo.adapters import timm
from lamzoo.adapters.hosts import EnterBlock, LeaveBlock, SharedStateHook, TokenHost, remove_hooks, watch_block
from lamzoo.adapters.state import masks_of
from lamzoo.adapters.wrappers import unwrap
from lamzoo.errors import ConfigError, UnsupportedHostError
from lamzoo.lam import Lam, SharedState
from lamzoo.lam.pruning import SCORERS, PruneConfig, decide, select

Model = TypeVar("Model", bound=nn.Module)


class _Prune(SharedStateHook):
    """Forward hook of a block: lets the tokens go that its attention scored lowest."""

    def __init__(self, lam: Lam, config: PruneConfig, num_prefix_tokens: int, share: float) -> None:
        super().__init__(lam.shared)
        self.lam = lam
        self.config = config
        self.num_prefix_tokens = num_prefix_tokens
        self.share = share  # of the model's tokens that is left behind this block in evaluation
        self.kept: Tensor | None = None  # and that was left of each sample's in the last training pass, (B,)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"kept": None}  # a copy or pickle has no graph

    def __call__(self, block: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if isinstance(output, torch.fx.Proxy):
            raise UnsupportedHostError(
                "Symbolic tracing (torch.fx, create_feature_extractor) can't follow token pruning; trace the model "
                "after lamzoo.remove_pruning(model), or export it with torch.export."
            )
        here = self.shared.current
        assert here.scores is not None  # the block's attention left them
        if not self.lam.training or self.config.training == "top-k":
            reduction = select(here.scores, self.config.keep, self.config.rest, self.num_prefix_tokens, output)
            self.shared.reduce(reduction)
            reduced = reduction(output)
            self.shared.leave(reduced)
            return reduced
        kept = decide(here.scores, self.config.keep, self.num_prefix_tokens, here.kept)
        self.shared.keep(kept)
        self.shared.leave(output)
        if here.rerun is None:  # not again where gradient checkpointing runs the block once more
            self.kept = kept[:, self.num_prefix_tokens :].mean(dim=1)
        return None


class _PoolKept(SharedStateHook):
    """Forward hook of what is pooled: makes the mean over all tokens that over those that stay, and ends the pass."""

    def __init__(self, shared: SharedState, host: TokenHost) -> None:
        super().__init__(shared)
        self.pool = host.pool
        self.num_unpooled = host.num_unpooled

    def __call__(self, last: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        kept = self.shared.current.kept
        if kept is None:
            return None
        self.shared.end()
        if self.pool not in ("", "token", "avg"):
            raise UnsupportedHostError(
                f"Straight-through pruning hides tokens from a mean or a class token, and this model pools by "
                f"{self.pool!r}; prune it with training='top-k'."
            )
        weights = kept[:, self.num_unpooled :]
        weights = weights * (weights.shape[1] / weights.sum(dim=1, keepdim=True).clamp_min(1))
        return output * F.pad(weights, (self.num_unpooled, 0), value=1.0).unsqueeze(-1).to(output.dtype)


class _AllTokens(SharedStateHook):
    """Forward pre-hook of the first block: nothing has left yet, whatever an earlier pass, cut short, left behind."""

    def __call__(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        self.shared.begin(self.shared.current.grid)


def prune(model: nn.Module, config: PruneConfig) -> None:
    """Puts the hooks into a model, in place of those that may be there.

    Args:
        model: with masks, on a timm ``VisionTransformer`` or an image tower of open_clip's, or with one of these in it.
        config: where tokens leave and how many; the last block's can't.

    Raises:
        UnsupportedHostError: there are no masks, or they are on another host.
        ConfigError: a layer that the model has not.
    """
    model = unwrap(model)
    stack, host, lams = _stack(model)
    if config.at[-1] >= len(lams) - 1:
        raise ConfigError(
            f"at={config.at}: behind layer {len(lams) - 1}, the last of {stack}, no tokens are left to spare work on; "
            f"name layers from 0 to {len(lams) - 2}."
        )
    remove_pruning(model)
    blocks, shared = model.get_submodule(stack), lams[0].shared
    share = 1.0
    for index, (block, lam) in enumerate(zip(blocks.children(), lams, strict=True)):
        if not any(isinstance(hook, EnterBlock) for hook in block._forward_pre_hooks.values()):
            watch_block(block, _EnterPruned(shared, needs_pass=index > 0), _LeavePruned(shared))
        if index == 0:
            block.register_forward_pre_hook(_AllTokens(shared))
        if index in config.at:
            share *= config.keep
            lam.scorer = partial(SCORERS[config.score], has_class_token=host.has_class_token)
            block.register_forward_hook(_Prune(lam, config, host.num_prefix_tokens, share))
    host.last.register_forward_hook(_PoolKept(shared, host))
    model.prune_config = config  # type: ignore[assignment]


def pruning_loss(model: nn.Module) -> Tensor:
    """Returns how far each sample was from the share of tokens it is to keep, in the last training pass; squared.

    The ratio loss of DynamicViT (arXiv 2106.02034, section 3.3), a mean over the pruned layers and the samples. With
    ``training="straight-through"``, add it to the training loss, times 2 in that paper: decisions are taken over the
    batch, and in evaluation each sample keeps the same number.

    Args:
        model: pruned, after a forward pass in training mode, or a wrapper around it (``DistributedDataParallel``).

    Returns:
        A scalar, float32. The pass is used up.

    Raises:
        ConfigError: the model isn't pruned with ``training="straight-through"``, or there was no such pass.
    """
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values() if isinstance(hook, _Prune)]
    losses = [(hook.kept - hook.share).square().mean() for hook in hooks if hook.kept is not None]
    if not hooks or len(losses) < len(hooks):
        raise ConfigError(
            "pruning_loss is that of a forward pass in training mode, of a model pruned with "
            "training='straight-through'; there was none since the last call."
        )
    for hook in hooks:
        hook.kept = None
    return torch.stack(losses).mean()


class _EnterPruned(EnterBlock):
    """An :class:`EnterBlock` that goes with the pruning."""


class _LeavePruned(LeaveBlock):
    """A :class:`LeaveBlock` that goes with the pruning."""


def remove_pruning(model: Model) -> Model:
    """Takes pruning out of a model, in place; returns it. One without is left as it is."""
    for module in model.modules():
        if isinstance(module, Lam):
            module.scorer = None
        remove_hooks(module, (_Prune, _PoolKept, _AllTokens, _EnterPruned, _LeavePruned))
        vars(module).pop("prune_config", None)
    return model


def depth(model: nn.Module) -> int:
    """Returns the number of layers that :func:`prune` may name, the last one included.

    Raises:
        UnsupportedHostError: as for :func:`prune`.
    """
    return len(_stack(unwrap(model))[2])


def _stack(model: nn.Module) -> tuple[str, TokenHost, list[Lam]]:
    """Returns the path of the one stack of blocks whose tokens may become fewer, its host, and its masks."""
    stacks: dict[str, list[Lam]] = {}
    for path, lam in masks_of(model).items():
        stacks.setdefault(path.rsplit(".", 3)[0], []).append(lam)
    hosts = {stack: host for stack in stacks if (host := _token_host(model, stack)) is not None}
    if len(hosts) != 1:
        owners = (type(model.get_submodule(stack.rpartition(".")[0])).__name__ for stack in stacks)
        found = ", ".join(f"{stack} of a {owner}" for stack, owner in zip(stacks, owners, strict=True))
        raise UnsupportedHostError(
            "Tokens can be pruned in one timm VisionTransformer or one image tower of open_clip's own, and the masks "
            f"are in {found}; give prune_tokens such a part of the model."
        )
    (stack,) = hosts
    return stack, hosts[stack], stacks[stack]


def _token_host(model: nn.Module, stack: str) -> TokenHost | None:
    if not type(model.get_submodule(stack.rpartition(".")[0])).__module__.startswith("open_clip."):
        return timm.token_host(model, stack)
    from lamzoo.adapters import open_clip

    return open_clip.token_host(model, stack)
