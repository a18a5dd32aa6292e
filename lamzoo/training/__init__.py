"""Training of image classifiers from recipes; needs ``pip install lamzoo[train]``."""

from lamzoo.training.loop import Progress, TrainResult, train
from lamzoo.training.recipe import Recipe, load_recipe, parse_recipe

__all__ = ["Progress", "Recipe", "TrainResult", "load_recipe", "parse_recipe", "train"]
