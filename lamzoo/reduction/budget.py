"""Pruning tokens by the mask: a share that stays, or a budget of GMACs; composes the adapters and the profile."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from torch import nn

from lamzoo.adapters.wrappers import unwrap
from lamzoo.errors import ConfigError
from lamzoo.lam.pruning import PruneConfig, Rest, Score, Training
from lamzoo.profiling import profile
from lamzoo.reduction import hooks

Model = TypeVar("Model", bound=nn.Module)


def prune_tokens(
    model: Model,
    keep: float | None = None,
    at: Sequence[int] | None = None,
    *,
    target_gmacs: float | None = None,
    score: Score = "mask",
    rest: Rest = "drop",
    training: Training = "straight-through",
) -> Model:
    """Lets a vision transformer with masks go on with the tokens that matter, in place.

    It may be a part of the model: the image tower of a CLIP model, whose text tower then stays as it is.

    Class and register tokens stay; of the others each sample keeps the same number, so that shapes are static and
    batches, ``torch.compile`` and export work as before. ``forward_features`` returns the tokens that are left.

    Args:
        model: with masks on a timm ``VisionTransformer``, or on an image tower of open_clip's own; wrappers of
            ``torch.compile`` and data parallelism may be around it.
        keep: share of a layer's tokens that stays at each layer of ``at``; 0.7 by default.
        at: layers, counted from 0, behind whose block tokens leave; by default three, at a quarter, half and three
            quarters of the depth.
        target_gmacs: instead of ``keep``, the largest share is taken with which one input of the model's own size costs
            at most so many GMACs.
        score: what decides, as in :class:`lamzoo.PruneConfig`.
        rest: ``"drop"`` the others, ``"merge"`` them into one token, or average each into the ``"nearest"``.
        training: in training mode, hide what leaves by decisions that the scores learn from (add
            :func:`lamzoo.pruning_loss` to the loss), or let ``"top-k"`` go on, as in evaluation.

    Returns:
        The same model, which now has the attribute ``prune_config``. Pruning it once more replaces what was there.

    Raises:
        UnsupportedHostError: the model has no masks, or they aren't on one such transformer; in a forward pass, that
            straight-through training can't hide tokens from its pooling.
        ConfigError: values that mean nothing, layers that the model has not, ``keep`` beside ``target_gmacs``, or a
            target that no share meets.
    """
    layers = hooks.depth(model)
    where = tuple(at) if at is not None else tuple(sorted({layers * i // 4 for i in (1, 2, 3)} - {layers - 1}))
    if target_gmacs is not None and keep is not None:
        raise ConfigError(f"keep={keep} beside target_gmacs={target_gmacs}: give one of them.")
    config = PruneConfig(0.7 if keep is None else keep, where, score, rest, training)
    hooks.prune(model, config if target_gmacs is None else _largest(model, config, target_gmacs))
    return model


def _largest(model: nn.Module, config: PruneConfig, target: float) -> PruneConfig:
    """Returns the pruning with the largest share, to a thousandth, that costs at most ``target`` GMACs."""
    before = getattr(unwrap(model), "prune_config", None)

    def gmacs(thousandths: int) -> float:
        hooks.prune(model, replace(config, keep=thousandths / 1000))
        return profile(model).gmacs

    try:
        largest = bisect_right(range(1, 1001), target, key=gmacs)
        if largest == 0:
            raise ConfigError(
                f"target_gmacs={target}: with a single token left behind {config.at} it is still {gmacs(1):.3f} GMACs; "
                "prune at earlier layers."
            )
        return replace(config, keep=largest / 1000)
    finally:
        hooks.remove_pruning(model)
        if before is not None:
            hooks.prune(model, before)
