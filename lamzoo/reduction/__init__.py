"""Token reduction: merging and pruning, to a share of the tokens or to a budget of GMACs."""

from typing import TYPE_CHECKING

from lamzoo.lazy import submodules_of

if TYPE_CHECKING:
    from lamzoo.reduction.budget import merge_tokens, prune_tokens
    from lamzoo.reduction.config import PruneConfig, TokenReduction
    from lamzoo.reduction.pruning import pruning_loss, remove_pruning
    from lamzoo.reduction.stacks import remove_reduction

__all__ = [
    "PruneConfig",
    "TokenReduction",
    "merge_tokens",
    "prune_tokens",
    "pruning_loss",
    "remove_pruning",
    "remove_reduction",
]

_HOMES = {
    "PruneConfig": "lamzoo.reduction.config",
    "TokenReduction": "lamzoo.reduction.config",
    "merge_tokens": "lamzoo.reduction.budget",
    "prune_tokens": "lamzoo.reduction.budget",
    "pruning_loss": "lamzoo.reduction.pruning",
    "remove_pruning": "lamzoo.reduction.pruning",
    "remove_reduction": "lamzoo.reduction.stacks",
}

if not TYPE_CHECKING:  # a type checker would believe any name
    __getattr__ = submodules_of(__name__, _HOMES)
