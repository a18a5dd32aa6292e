"""Fewer tokens from layer to layer: pruning by the masks, to a share or to a budget."""

from typing import TYPE_CHECKING

from lamzoo.lazy import submodules_of

if TYPE_CHECKING:
    from lamzoo.reduction.budget import prune_tokens
    from lamzoo.reduction.hooks import pruning_loss, remove_pruning

__all__ = ["prune_tokens", "pruning_loss", "remove_pruning"]

_HOMES = dict.fromkeys(__all__, "lamzoo.reduction.hooks") | {"prune_tokens": "lamzoo.reduction.budget"}

if not TYPE_CHECKING:  # a type checker would believe any name
    __getattr__ = submodules_of(__name__, _HOMES)
