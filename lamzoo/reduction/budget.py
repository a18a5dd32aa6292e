"""Token pruning to a share of the tokens or to a budget of GMACs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from pkgutil import resolve_name
from typing import TypeVar

from torch import nn

from lamzoo.adapters.wrappers import unwrap
from lamzoo.errors import ConfigError
from lamzoo.reduction import pruning
from lamzoo.reduction.config import PruneConfig, Rest, Score, Training

Model = TypeVar("Model", bound=nn.Module)

_PROFILE = "lamzoo.profiling:profile"  # a name, because profiling is built on this package


def prune_tokens(
    model: Model,
    keep: float | None = None,
    at: Sequence[int] | None = None,
    *,
    target_gmacs: float | None = None,
    score: Score = "mask",
    rest: Rest = "drop",
    training: Training = "straight-through",
    count_gmacs: Callable[[nn.Module], float] | None = None,
) -> Model:
    """Prunes tokens of a masked vision transformer, in place.

    Class and register tokens are kept. Of the other tokens each sample keeps the same number, so that shapes are static
    and batching, ``torch.compile`` and export work as before. ``forward_features`` returns the remaining tokens. In a
    CLIP model the image tower is pruned and the text tower is not.

    Args:
        model: has masks, and is or contains one timm ``VisionTransformer`` or image tower of open_clip; may be wrapped
            by ``torch.compile`` or data parallelism.
        keep: share of a layer's tokens to keep at each layer of ``at``; 0.7 by default.
        at: layers, counted from 0, after whose block tokens are pruned; by default three, at a quarter, half and three
            quarters of the depth.
        target_gmacs: instead of ``keep``, an upper limit on the GMACs of one input of the model's own size; the largest
            share within it is taken.
        score: how tokens are scored, as in :class:`lamzoo.PruneConfig`.
        rest: what to do with pruned tokens: ``"drop"`` them, ``"merge"`` them into one token, or average each into the
            ``"nearest"`` kept one.
        training: ``"straight-through"`` hides pruned tokens in training mode by decisions that the scores learn from
            (add :func:`lamzoo.pruning_loss` to the loss); ``"top-k"`` prunes as in evaluation.
        count_gmacs: counts the GMACs of one input for ``target_gmacs``; :func:`lamzoo.profile` by default.

    Returns:
        The same model, with the attribute ``prune_config``. Pruning a model again replaces the earlier pruning.

    Raises:
        UnsupportedHostError: the model has no masks, or has them in another host, or in several; in a forward pass,
            that straight-through training doesn't support the model's pooling.
        ConfigError: an invalid value, a layer that the model doesn't have, both ``keep`` and ``target_gmacs``, or a
            target below the cost of a single token.
    """
    layers = pruning.depth(model)
    where = tuple(at) if at is not None else tuple(sorted({layers * i // 4 for i in (1, 2, 3)} - {layers - 1}))
    if target_gmacs is not None and keep is not None:
        raise ConfigError(f"keep={keep} beside target_gmacs={target_gmacs}: give one of them.")
    config = PruneConfig(0.7 if keep is None else keep, where, score, rest, training)
    if target_gmacs is not None:
        config = _largest(model, config, target_gmacs, count_gmacs or _profiled_gmacs)
    pruning.prune(model, config)
    return model


def _profiled_gmacs(model: nn.Module) -> float:
    gmacs: float = resolve_name(_PROFILE)(model).gmacs
    return gmacs


def _largest(
    model: nn.Module, config: PruneConfig, target: float, count_gmacs: Callable[[nn.Module], float]
) -> PruneConfig:
    """Returns the pruning with the largest share, in steps of a thousandth, that costs at most ``target`` GMACs."""
    before = getattr(unwrap(model), "prune_config", None)

    def gmacs(thousandths: int) -> float:
        pruning.prune(model, replace(config, keep=thousandths / 1000))
        return count_gmacs(model)

    try:
        largest = bisect_right(range(1, 1001), target, key=gmacs)
        if largest == 0:
            raise ConfigError(
                f"target_gmacs={target}: even a single token after layers {config.at} costs {gmacs(1):.3f} GMACs; "
                "prune at earlier layers."
            )
        return replace(config, keep=largest / 1000)
    finally:
        pruning.remove_pruning(model)
        if before is not None:
            pruning.prune(model, before)
