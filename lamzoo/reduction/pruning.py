"""Token pruning as hooks in a model with masks.

Modifications to the host: an attention hook in each mask scores the tokens, and a forward hook on each block of
``PruneConfig.at`` prunes those with the lowest scores; a forward pre-hook on the first block begins each pass with all
tokens, and one on each block lets gradient checkpointing find its pass. Straight-through training leaves all tokens in
place: the attention hooks hide pruned tokens from later layers, and a forward hook before the pooling weights the
tokens so that their mean is that of the kept ones. ``forward_intermediates`` refuses to make grids.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamzoo.adapters.hosts import Pooling
from lamzoo.adapters.wrappers import unwrap
from lamzoo.errors import ConfigError, UnsupportedHostError
from lamzoo.lam import FactoredMask, Lam, SharedState
from lamzoo.lam.layer import AttentionOptions
from lamzoo.lam.ops import Op
from lamzoo.lam.passes import StackPass
from lamzoo.reduction.config import PruneConfig
from lamzoo.reduction.decisions import attend_to_kept, decide, select
from lamzoo.reduction.scores import SCORERS, AttentionInputs
from lamzoo.reduction.stacks import ReductionHook, check_not_traced, find_stack, remove_reduction, watch_passes

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class ScoredAttention:
    """Attention hook of a layer: scores its tokens, and hides those that straight-through training has pruned.

    The mask, the last positional argument of the attention, is that of the scores.
    """

    shared: SharedState
    score: Callable[[AttentionInputs], Tensor] | None = None  # None where no tokens leave after the layer

    @property
    def fusible(self) -> bool:
        """Whether it changes nothing."""
        return self.score is None and self.shared.current.kept is None

    def __call__(
        self,
        attention: Callable[..., Tensor],
        begun: StackPass,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: FactoredMask,
        *,
        op: Op,
        **options: Unpack[AttentionOptions],
    ) -> Tensor:
        if self.score is not None:
            scale = options.get("scale")
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            present = None if begun.kept is None else begun.kept.detach() > 0
            self.shared.update(scores=self.score(AttentionInputs(query, key, value, mask, op, scale, present)))
        if begun.kept is None:
            return attention(query, key, value, mask, op=op, **options)
        return attend_to_kept(attention, begun.kept, query, key, value, mask, op=op, **options)


class _Prune(ReductionHook):
    """Forward hook of a block: prunes the tokens with the lowest scores."""

    def __init__(self, lam: Lam, config: PruneConfig, num_prefix_tokens: int, share: float) -> None:
        super().__init__(lam.shared)
        self.lam = lam
        self.config = config
        self.num_prefix_tokens = num_prefix_tokens
        self.share = share  # of the model's tokens that remain after this block in evaluation
        self.kept: Tensor | None = None  # the share that remained of each sample in the last training pass, (B,)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"kept": None}  # a copy or pickle has no graph

    def __call__(self, block: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        check_not_traced(output)
        here = self.shared.current
        assert here.scores is not None  # of the attention hook
        if not self.lam.training or self.config.training == "top-k":
            token_map = select(here.scores, self.config.keep, self.config.rest, self.num_prefix_tokens, output)
            self.shared.reduce(token_map)
            return token_map(output)
        kept = decide(here.scores, self.config.keep, self.num_prefix_tokens, here.kept)
        # The pooling reads the decisions; nothing after a rerun by gradient checkpointing does.
        self.shared.update(kept=kept, scores=None, held=here.rerun is None)
        if here.rerun is None:  # not again when gradient checkpointing reruns the block
            self.kept = kept[:, self.num_prefix_tokens :].mean(dim=1)
        return None


class _PoolKept(ReductionHook):
    """Forward hook before the pooling: makes the mean over all tokens that over the kept ones, and ends the pass."""

    def __init__(self, shared: SharedState, pooling: Pooling) -> None:
        super().__init__(shared)
        self.pool = pooling.kind
        self.num_unpooled = pooling.num_unpooled

    def __call__(self, last: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        kept = self.shared.current.kept
        if kept is None:
            return None
        self.shared.end()
        if self.pool not in ("", "token", "avg"):
            raise UnsupportedHostError(
                f"Straight-through pruning supports mean and class-token pooling, and this model pools by "
                f"{self.pool!r}; prune it with training='top-k'."
            )
        weights = kept[:, self.num_unpooled :]
        weights = weights * (weights.shape[1] / weights.sum(dim=1, keepdim=True).clamp_min(1))
        return output * F.pad(weights, (self.num_unpooled, 0), value=1.0).unsqueeze(-1).to(output.dtype)


class _AllTokens(ReductionHook):
    """Forward pre-hook of the first block: drops the state of an earlier pass that was interrupted."""

    def __call__(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        self.shared.begin(self.shared.current.grid)


class _WithoutGrids(ReductionHook):
    """``forward_intermediates`` of a pruned model, which refuses to make grids of tokens that are no longer whole."""

    def __init__(self, shared: SharedState, root: nn.Module) -> None:
        super().__init__(shared)
        self.root: Any = root

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method: Any = type(self.root).forward_intermediates
        given = inspect.signature(method).bind(self.root, *args, **kwargs)
        given.apply_defaults()
        if given.arguments["output_fmt"] == "NCHW":
            raise UnsupportedHostError(
                "Grids of features (output_fmt='NCHW') can't be made of pruned tokens; ask for output_fmt='NLC' (in "
                "get_intermediate_layers, reshape=False), or merge tokens with lamzoo.merge_tokens instead."
            )
        return method(self.root, *args, **kwargs)


def prune(model: nn.Module, config: PruneConfig) -> None:
    """Registers the hooks in a model, in place of those of an earlier pruning.

    Args:
        model: as for :func:`lamzoo.prune_tokens`.
        config: the pruning; ``at`` must not name the last layer.

    Raises:
        UnsupportedHostError: the model has no masks, or has them in another host.
        ConfigError: ``at`` names the last layer, or one that the model doesn't have.
    """
    model = unwrap(model)
    stack = find_stack(model, masked=True, verb="pruned")
    pooling, lams = stack.pooling, stack.lams
    if config.at[-1] >= len(lams) - 1:
        raise ConfigError(
            f"at={config.at}: pruning after layer {len(lams) - 1}, the last of {pooling.blocks}, or beyond saves "
            f"nothing; name layers from 0 to {len(lams) - 2}."
        )
    remove_reduction(model)
    shared = lams[0].shared
    share = 1.0
    for index, (block, lam) in enumerate(zip(stack.blocks.values(), lams, strict=True)):
        hook = lam.attention_hook = ScoredAttention(shared)
        if index in config.at:
            share *= config.keep
            hook.score = partial(SCORERS[config.score], has_class_token=pooling.has_class_token)
            block.register_forward_hook(_Prune(lam, config, stack.layout.num_prefix_tokens, share))
    watch_passes(stack.blocks.values(), shared)
    next(iter(stack.blocks.values())).register_forward_pre_hook(_AllTokens(shared))
    pooling.last.register_forward_hook(_PoolKept(shared, pooling))
    root: Any = model.get_submodule(pooling.root)
    if hasattr(root, "forward_intermediates"):
        root.forward_intermediates = _WithoutGrids(shared, root)
    model.token_reduction = model.prune_config = config  # type: ignore[assignment]


def pruning_loss(model: nn.Module) -> Tensor:
    """Mean squared difference between the share of tokens that each sample kept and the share to keep.

    The ratio loss of DynamicViT (arXiv 2106.02034, section 3.3), averaged over the pruned layers and the samples. With
    ``training="straight-through"``, add it to the training loss (times 2 in that paper): training decides over the
    batch, while evaluation keeps the same number of tokens of each sample.

    Args:
        model: pruned, after a forward pass in training mode, or a wrapper around it (``DistributedDataParallel``).

    Returns:
        A scalar, float32, of the last forward pass in training mode; it can be computed once for each pass.

    Raises:
        ConfigError: the model isn't pruned with ``training="straight-through"``, or there was no such pass.
    """
    reduction = getattr(unwrap(model), "token_reduction", None)
    if reduction is not None and reduction.method == "merge":
        raise ConfigError("The tokens of the model are merged, which has no loss of its own; leave pruning_loss out.")
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values() if isinstance(hook, _Prune)]
    losses = [(hook.kept - hook.share).square().mean() for hook in hooks if hook.kept is not None]
    if not hooks or len(losses) < len(hooks):
        raise ConfigError(
            "pruning_loss needs a forward pass in training mode of a model pruned with training='straight-through'; "
            "there was none since the last call."
        )
    for hook in hooks:
        hook.kept = None
    return torch.stack(losses).mean()


def remove_pruning(model: Model) -> Model:
    """Does the same as :func:`remove_reduction`, under its earlier name."""
    return remove_reduction(model)
