"""Trains a classifier from a recipe, with a peer in place of this project's token reduction.

    python -m benchmarks.train_peer benchmarks/recipes/cifar10_merged.toml run.output=runs/tome.cifar10
    python -m benchmarks.train_peer benchmarks/recipes/cifar10_merged.toml run.output=runs/tome.cifar10 --resume

The run is that of ``lamzoo train``, with the same data, seed, schedule, averaged weights, precision and checkpoints.
The peer takes the largest setting of its official variant within the recipe's ``reduction.target_gmacs``, and reduces
tokens in training and in evaluation. The saved model is without it.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from accelerate import PartialState
from torch import nn

import lamzoo
from benchmarks.methods import largest
from benchmarks.peers import Peer, applied
from benchmarks.peers.pitome import PiToMe
from benchmarks.peers.tome import ToMe
from lamzoo.errors import RecipeError
from lamzoo.records import Limits
from lamzoo.tasks import register_task
from lamzoo.tasks.classification import CLASSIFICATION
from lamzoo.training import AnyRecipe, parse_recipe, train
from lamzoo.training.classification.run import ClassificationRun
from lamzoo.training.config_reader import override, read_recipe
from lamzoo.training.recipe import Recipe

_logger = logging.getLogger(__name__)

_TASK = "classification with a peer"
Method = Literal["ToMe", "PiToMe"]
#: Peers that reduce tokens in every layer, and whose setting doesn't depend on images.
_PEERS: dict[Method, type[Peer]] = {"ToMe": ToMe, "PiToMe": PiToMe}


@dataclass(frozen=True)
class PeerSection:
    """``[peer]``: the peer and its budget.

    Attributes:
        method: the peer, in its official variant.
        target_gmacs: upper limit on the GMACs of one image.
    """

    method: Method
    target_gmacs: Annotated[float, Limits(above=0)]


@dataclass(frozen=True, kw_only=True)
class PeerRecipe(Recipe):
    """A recipe of a classifier that is trained with a peer.

    Its task is another one, so that ``lamzoo train --resume`` doesn't continue the run without the peer.
    """

    task: Literal["classification with a peer"] = _TASK  # type: ignore[assignment]
    peer: PeerSection

    def check(self) -> None:
        super().check()
        if self.token_reduction is not None:
            raise RecipeError("Recipe section [peer] excludes [reduction] and [prune]; leave them out.")
        if self.run.grad_checkpointing:
            raise RecipeError("Recipe key run.grad_checkpointing is true, which peers don't support; leave it out.")


class PeerRun(ClassificationRun):
    """A training run in which a peer reduces the tokens of the trained model and of its averaged copy."""

    recipe: PeerRecipe

    def build_model(self) -> nn.Module:
        model = lamzoo.remove_reduction(super().build_model())  # of weights that were trained with one
        section = self.recipe.peer
        found = largest(model, _PEERS[section.method].settings(model), section.target_gmacs)
        if found is None:
            raise RecipeError(
                f"Recipe key peer.target_gmacs is {section.target_gmacs:g}, which no setting of {section.method} meets "
                f"on {self.recipe.model.name}; raise it."
            )
        self.peer, setting = found
        if self.accelerator.is_main_process:
            _logger.info("%s with %s: %.4g GMACs", section.method, setting.text, setting.gmacs)
        return model

    @contextmanager
    def begun(self) -> Iterator[None]:
        with ExitStack() as stack:
            for model in {self.accelerator.unwrap_model(self.model), self.evaluated_model}:
                stack.enter_context(applied(model, self.peer))
            stack.enter_context(super().begun())
            yield


TASK = replace(
    CLASSIFICATION, name=_TASK, recipe=f"{__name__}:{PeerRecipe.__name__}", run=f"{__name__}:{PeerRun.__name__}"
)


def peer_recipe(path: str | Path, overrides: Sequence[str], method: str) -> AnyRecipe:
    """Reads a recipe and puts a peer in place of its token reduction.

    Args:
        path: the recipe; its ``reduction.target_gmacs`` is the budget, and the rest of ``[reduction]`` is left out.
        overrides: as of :func:`lamzoo.training.load_recipe`.
        method: one of :data:`Method`.

    Raises:
        RecipeError: the recipe has no budget; or as for :func:`lamzoo.training.load_recipe`.
    """
    table = override(read_recipe(path), overrides)
    reduction = table.pop("reduction", {})
    if "target_gmacs" not in reduction:
        raise RecipeError(f"The recipe {path} has no reduction.target_gmacs, the budget of the peer; add it.")
    peer = {"method": method, "target_gmacs": reduction["target_gmacs"]}
    register_task(TASK)
    return parse_recipe({**table, "task": TASK.name, "peer": peer})


def train_by(parser: argparse.ArgumentParser, module: str, recipe: Callable[[argparse.Namespace], AnyRecipe]) -> None:
    """Trains as ``lamzoo train`` does, for the command lines of this module and others with a task of their own.

    Args:
        parser: with the module's own arguments; those of every training are added.
        module: name of the module, for the record of the run.
        recipe: returns the recipe of parsed arguments; its errors end the process.
    """
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for `lamzoo train`")
    parser.add_argument("--resume", action="store_true", help="continue from the latest checkpoint, if any")
    args = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    command = shlex.join(["python", "-m", module, *sys.argv[1:]])
    try:
        result = train(recipe(args), resume=args.resume, command=command)
    except lamzoo.LamzooError as error:
        parser.exit(2, f"{error}\n")
    if PartialState().is_main_process:
        print(f"The model is {result.model}. {result.about}")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a TOML file with reduction.target_gmacs")
    parser.add_argument("--peer", default="ToMe", choices=Method.__args__)  # type: ignore[attr-defined]
    train_by(parser, "benchmarks.train_peer", lambda args: peer_recipe(args.recipe, args.overrides, args.peer))


if __name__ == "__main__":
    main()
