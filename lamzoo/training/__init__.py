"""Training from recipes, for all tasks; needs ``pip install "lamzoo[train]"``."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from lamzoo.errors import MissingExtraError
from lamzoo.lazy import submodules_of

if find_spec("accelerate") is None:
    raise MissingExtraError("Training needs accelerate, which is not installed; pip install 'lamzoo[train]'.")

from lamzoo.training.captions.recipe import CaptionRecipe
from lamzoo.training.classification.scoring import Score
from lamzoo.training.defaults import complete_recipe
from lamzoo.training.loop import train
from lamzoo.training.moments.recipe import MomentRecipe
from lamzoo.training.progress import Progress, TrainResult
from lamzoo.training.recipe import AnyRecipe, Recipe, load_recipe, parse_recipe
from lamzoo.training.retrieval.recipe import RetrievalRecipe

__all__ = [
    "AnyRecipe",
    "CaptionRecipe",
    "MomentRecipe",
    "Progress",
    "Recipe",
    "RetrievalRecipe",
    "Score",
    "TrainResult",
    "complete_recipe",
    "load_recipe",
    "parse_recipe",
    "train",
]

if not TYPE_CHECKING:  # hidden from type checkers, which would accept any name
    __getattr__ = submodules_of(__name__)
