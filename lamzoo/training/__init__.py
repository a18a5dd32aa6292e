"""Training of image classifiers from recipes; needs ``pip install "lamzoo[train]"``."""

from importlib.util import find_spec

from lamzoo.errors import MissingExtraError

if find_spec("accelerate") is None:
    raise MissingExtraError("Training needs accelerate, which is not installed; pip install 'lamzoo[train]'.")

from lamzoo.training.defaults import complete_recipe
from lamzoo.training.loop import Progress, TrainResult, train
from lamzoo.training.recipe import Recipe, load_recipe, parse_recipe
from lamzoo.training.scoring import Score

__all__ = ["Progress", "Recipe", "Score", "TrainResult", "complete_recipe", "load_recipe", "parse_recipe", "train"]
