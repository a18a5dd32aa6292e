"""Training from recipes: classification, retrieval, moments, captions; needs ``pip install "lamzoo[train]"``."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from lamzoo.errors import MissingExtraError
from lamzoo.lazy import submodules_of

if find_spec("accelerate") is None:
    raise MissingExtraError("Training needs accelerate, which is not installed; pip install 'lamzoo[train]'.")

from lamzoo.training.caption_recipe import CaptionRecipe
from lamzoo.training.defaults import complete_recipe
from lamzoo.training.loop import train
from lamzoo.training.moment_recipe import MomentRecipe
from lamzoo.training.recipe import AnyRecipe, Recipe, load_recipe, parse_recipe
from lamzoo.training.retrieval_recipe import RetrievalRecipe
from lamzoo.training.run import Progress, TrainResult
from lamzoo.training.scoring import Score

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

if not TYPE_CHECKING:  # a type checker would believe any name
    __getattr__ = submodules_of(__name__)
