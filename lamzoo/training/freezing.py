"""Freezing of model parts that a run does not train."""

from __future__ import annotations

from typing import Any

from torch import nn

from lamzoo.errors import RecipeError
from lamzoo.lam import Lam
from lamzoo.registry.refs import name_of
from lamzoo.training.recipe import Tune


class Tuning:
    """Freezes the parts of a model that a run does not train.

    Args:
        model: a timm classifier, with or without masks; ``requires_grad`` of its parameters is set.
        tune: ``"all"``; ``"lam"``: the masks and the classifier; ``"head"``: only the classifier.

    Attributes:
        classifier: paths of the classifier in the model.

    Raises:
        RecipeError: the model lacks masks or a classifier to train; the model is unchanged.
    """

    def __init__(self, model: nn.Module, tune: Tune) -> None:
        self._trained: list[nn.Module] | None = None
        classifier = _classifier(model)
        self.classifier = [path for path, module in model.named_modules() if module in classifier]
        if tune == "all":
            return
        name = name_of(model)
        trained = list(classifier)
        if not any(True for module in trained for _ in module.parameters()):
            raise RecipeError(f"model.tune is {tune!r}, but {name} has no classifier to train; use 'all'.")
        if tune == "lam":
            masks = [module for module in model.modules() if isinstance(module, Lam)]
            if not masks:
                raise RecipeError(
                    f"model.tune is 'lam', but {name} has no learnable masks; choose a model with masks (model.lam "
                    "adds them), or tune 'head' or 'all'."
                )
            trained += masks
        model.requires_grad_(False)
        for module in trained:
            module.requires_grad_(True)
        # The dropout before the classifier belongs to it.
        self._trained = [*trained, *(module for module in [getattr(model, "head_drop", None)] if module is not None)]

    def train_mode(self, model: nn.Module) -> None:
        """Sets trained modules to training mode, and the rest of the model to evaluation mode.

        Args:
            model: the given model, or a wrapper around it.
        """
        model.train(self._trained is None)
        for module in self._trained or ():
            module.train()


def _classifier(model: Any) -> list[nn.Module]:
    if not hasattr(model, "get_classifier"):
        return []
    head = model.get_classifier()  # distilled models have two
    return [module for module in (head if isinstance(head, tuple) else (head,)) if isinstance(module, nn.Module)]
