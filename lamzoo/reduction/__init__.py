"""Token reduction: pruning by the masks, to a share of the tokens or to a budget of GMACs."""

from typing import TYPE_CHECKING

from lamzoo.lazy import submodules_of

if TYPE_CHECKING:
    from lamzoo.reduction.budget import prune_tokens
    from lamzoo.reduction.config import PruneConfig
    from lamzoo.reduction.pruning import pruning_loss, remove_pruning

__all__ = ["PruneConfig", "prune_tokens", "pruning_loss", "remove_pruning"]

_HOMES = {
    "PruneConfig": "lamzoo.reduction.config",
    "prune_tokens": "lamzoo.reduction.budget",
    "pruning_loss": "lamzoo.reduction.pruning",
    "remove_pruning": "lamzoo.reduction.pruning",
}

if not TYPE_CHECKING:  # a type checker would believe any name
    __getattr__ = submodules_of(__name__, _HOMES)
