"""Fine-tunes a classifier by LoRA (Hu et al., arXiv 2106.09685), with its masks if it has some, from a recipe.

    python -m benchmarks.train_lora benchmarks/recipes/clothing10_dinov2.toml run.output=runs/lora.clothing10

The run is that of ``lamzoo train``, with the same data, seed, schedule, averaged weights, precision and checkpoints.
The linear layers of the blocks get LoRA by peft, of rank 8; it is trained with the masks and the classifier, and the
rest is frozen. The saved model has LoRA in its weights.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import peft
from peft.tuners.lora import LoraLayer
from torch import nn

from benchmarks.train_peer import train_by
from lamzoo.errors import RecipeError
from lamzoo.lam import Lam
from lamzoo.registry.saving import save_pretrained
from lamzoo.tasks import register_task
from lamzoo.tasks.classification import CLASSIFICATION
from lamzoo.training import AnyRecipe, parse_recipe
from lamzoo.training.checkpoints import on_main_process
from lamzoo.training.classification.run import ClassificationRun
from lamzoo.training.config_reader import override, read_recipe
from lamzoo.training.recipe import Recipe

_TASK = "classification with LoRA"
_RANK, _ALPHA = 8, 16


@dataclass(frozen=True)
class LoraRecipe(Recipe):
    """A recipe of a classifier that is fine-tuned by LoRA.

    Its task is another one, so that ``lamzoo train --resume`` doesn't continue the run without LoRA.
    """

    task: Literal["classification with LoRA"] = _TASK  # type: ignore[assignment]

    def check(self) -> None:
        super().check()
        if self.token_reduction is not None or self.run.fsdp:
            raise RecipeError("LoRA is trained with all tokens and without FSDP; leave [reduction] and run.fsdp out.")
        if self.run.keep != "last":
            raise RecipeError(
                f"Recipe key run.keep is {self.run.keep!r}, but saved models have LoRA in their weights, which the "
                "run can't load again; set it to 'last'."
            )


class LoraRun(ClassificationRun):
    """A training run whose model and averaged copy have LoRA; saved models have it in their weights."""

    recipe: LoraRecipe

    def build_model(self) -> nn.Module:
        return add_lora(super().build_model())

    def train_mode(self) -> None:
        super().train_mode()
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):  # frozen, as are its statistics
                module.eval()

    def _save_model(self, folder: Path) -> None:
        def save() -> None:
            save_pretrained(without_lora(self.evaluated_model), folder, label_names=self.class_names())

        on_main_process(self.accelerator, save)


def add_lora(model: nn.Module) -> nn.Module:
    """Adds LoRA to the linear layers of a timm transformer's blocks, and freezes all but it, the masks and the head.

    Raises:
        RecipeError: the model has no blocks with linear layers.
    """
    masks = [path for path, module in model.named_modules() if isinstance(module, Lam)]
    targets = [
        path
        for path, module in model.named_modules()
        if path.startswith("blocks.")
        and type(module) is nn.Linear
        and not path.startswith(tuple(f"{m}." for m in masks))
    ]
    if not targets:
        raise RecipeError("LoRA is for timm's transformers, whose blocks have linear layers; choose another model.")
    config = peft.LoraConfig(r=_RANK, lora_alpha=_ALPHA, target_modules=targets)
    peft.inject_adapter_in_model(config, model)  # which freezes the rest
    for part in (model.get_classifier(), *(model.get_submodule(path) for path in masks)):  # type: ignore[operator]
        part.requires_grad_(True)
    return model


def without_lora(model: nn.Module) -> nn.Module:
    """Returns a copy of a model with LoRA in the weights of its linear layers."""
    plain = copy.deepcopy(model)
    for path, layer in [*plain.named_modules()]:
        if isinstance(layer, LoraLayer):
            layer.merge()  # type: ignore[operator]
            plain.set_submodule(path, layer.get_base_layer())
    del plain.peft_config
    return plain.requires_grad_(True)


TASK = replace(
    CLASSIFICATION, name=_TASK, recipe=f"{__name__}:{LoraRecipe.__name__}", run=f"{__name__}:{LoraRun.__name__}"
)


def lora_recipe(path: str | Path, overrides: Sequence[str]) -> AnyRecipe:
    """Reads a recipe of a classifier; arguments and errors are those of :func:`lamzoo.training.load_recipe`."""
    register_task(TASK)
    return parse_recipe({**override(read_recipe(path), overrides), "task": TASK.name})


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a TOML or JSON file")
    train_by(parser, "benchmarks.train_lora", lambda args: lora_recipe(args.recipe, args.overrides))


if __name__ == "__main__":
    main()
