"""Training recipes: reading and validation before anything is loaded, and the image classification recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import timm.data

from lamzoo.data import OnBadInput
from lamzoo.errors import RecipeError, UnknownTaskError
from lamzoo.records import build
from lamzoo.registry.catalog import task_of
from lamzoo.tasks import Task, find_task
from lamzoo.tasks.classification import CLASSIFICATION
from lamzoo.training.config_reader import override, read_recipe
from lamzoo.training.recipe_common import (
    DataSectionBase,
    ModelSectionBase,
    OptimizerSection,
    Positive,
    PositiveOrZero,
    Probability,
    PruneSection,
    ReductionSection,
    RunSection,
    ScheduleSection,
    Smoothing,
    TaskRecipe,
    check_common,
    check_crops,
)

Tune = Literal["all", "lam", "head"]
_LEAST_ALPHA = 0.001  # of the beta distributions of mixing; their samples become NaN for smaller ones


@dataclass(frozen=True)
class ModelSection(ModelSectionBase):
    """``[model]``: an image classifier, which may be ``timm/<name>``.

    ``num_classes`` in ``kwargs`` defaults to that of the data.

    Attributes:
        fused_attention: whether attention may use PyTorch's fused kernels, in timm's layers and in those with masks or
            merged tokens. On CPUs, bfloat16 training of short sequences is faster without them; use the same value on
            both sides of a comparison.
        tune: the trained part: ``"all"``, ``"lam"`` (the masks and the classifier) or ``"head"`` (only the classifier).
            The rest stays in evaluation mode, without dropout and with the stored statistics of norms.
    """

    fused_attention: bool = True
    tune: Tune = "all"


@dataclass(frozen=True)
class DataSection(DataSectionBase):
    """``[data]``: images, as opened by :func:`lamzoo.data.create_dataset`.

    Attributes:
        val_fraction: share of the training images, drawn by class with ``run.seed``, that is held out if the data has
            no ``eval_split``; None makes a missing split an error.
        on_bad_input: treatment of unreadable images in the scan: ``"stop"``, or ``"skip"``, which leaves them out and
            lists them in ``bad-inputs.csv``.
    """

    val_fraction: float | None = None
    on_bad_input: OnBadInput = "stop"


@dataclass(frozen=True)
class AugmentSection:
    """``[augment]``: arguments of ``timm.data.create_transform`` and ``timm.data.Mixup``."""

    scale: tuple[Positive, Positive] = (0.08, 1.0)
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    hflip: Probability = 0.5
    vflip: Probability = 0.0
    color_jitter: PositiveOrZero = 0.4
    auto_augment: str | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random"] = "bicubic"
    random_erasing: Probability = 0.0
    random_erasing_mode: Literal["const", "rand", "pixel"] = "const"
    mixup: PositiveOrZero = 0.0
    cutmix: PositiveOrZero = 0.0
    mixup_prob: Probability = 1.0
    label_smoothing: Smoothing = 0.0

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs, which requires an even batch size."""
        return self.mixup != 0 or self.cutmix != 0


@dataclass(frozen=True)
class Recipe(TaskRecipe):
    """A training run of an image classifier; see the sections for the contents of each table."""

    model: ModelSection
    data: DataSection
    run: RunSection
    task: Literal["classification"] = "classification"
    augment: AugmentSection = field(default_factory=AugmentSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    reduction: ReductionSection | None = None
    prune: PruneSection | None = None

    @property
    def token_reduction(self) -> PruneSection | None:
        """The section on token reduction, under either name."""
        return self.reduction or self.prune

    def check(self) -> None:
        fraction = self.data.val_fraction
        if fraction is not None and not 0 < fraction < 1:  # not a Fraction: the message has more to say
            raise RecipeError(
                f"Recipe key data.val_fraction is {fraction}; it must lie between 0 and 1. To train on all of "
                "train_split, name another split to score on in data.eval_split (--val-split); nothing is held out "
                "then."
            )
        model = self.model
        if model.tune != "all" and not model.pretrained and model.kwargs.get("checkpoint_path") is None:
            raise RecipeError(
                f"Recipe key model.tune is {model.tune!r}, which freezes the backbone, but this backbone has no "
                "weights; start from the published ones (model.pretrained, --pretrained) or tune all."
            )
        if self.reduction is not None:
            if self.prune is not None:
                raise RecipeError("Recipe sections [prune] and [reduction] exclude each other; leave out [prune].")
            self.reduction.check()
        augment = self.augment
        check_crops(augment.scale, augment.ratio)
        for key, value in (("mixup", augment.mixup), ("cutmix", augment.cutmix)):
            if 0 < value < _LEAST_ALPHA:
                raise RecipeError(f"Recipe key augment.{key} is {value}; it must be 0 or at least {_LEAST_ALPHA}.")
        if augment.auto_augment:
            _check_policy(augment.auto_augment)


def _check_policy(policy: str) -> None:
    """Raises a RecipeError for an ``augment.auto_augment`` that timm refuses, or whose numbers have no use."""
    wrong = None
    if re.search(r"(?<![\d.])\d{4}", policy):
        wrong = "a number in it is above 999"
    elif (alpha := re.search(r"^augmix.*-a(\d[\d.]*)", policy)) and float(alpha[1].rstrip(".")) < _LEAST_ALPHA:
        wrong = f"its a must be at least {_LEAST_ALPHA}"
    else:
        try:
            timm.data.create_transform(32, is_training=True, auto_augment=policy)
        except (AssertionError, ValueError, LookupError) as error:
            wrong = str(error) or "timm has no such policy"
    if wrong is not None:
        raise RecipeError(
            f"Recipe key augment.auto_augment is {policy!r:.60} ({wrong}); write '' for none, or one of timm's "
            "policies: 'original', 'v0', '3a', 'rand-m9-n2-mstd0.5' or 'augmix-m3-w3', with other numbers if needed."
        )


AnyRecipe: TypeAlias = TaskRecipe


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> AnyRecipe:
    """Reads a recipe and validates everything that does not require loading a model or data.

    Args:
        path: a TOML file, or the ``recipe.json`` of a run.
        overrides: ``"section.key=value"``, with the value in TOML notation; a bare word is a string.

    Raises:
        RecipeError: the file does not exist or is not TOML, or a key is unknown (the message names the closest one),
            has the wrong type or an invalid value.
        UnknownModelError: the model is unknown.
        ConfigError: the mask configuration is invalid.
    """
    return parse_recipe(override(read_recipe(path), overrides))


def parse_recipe(table: Mapping[str, Any]) -> AnyRecipe:
    """Builds a recipe from nested plain values; raises as :func:`load_recipe`.

    The task defaults to that of the model; for a model ``hf-hub:...`` its configuration is downloaded to find out.
    """
    try:
        task = find_task(table["task"]) if "task" in table else _task_of_model(table)
    except UnknownTaskError as error:
        raise RecipeError(f"Recipe key task: {error}") from None
    recipe: AnyRecipe = build(task.load("recipe"), table, source="Recipe", error=RecipeError)
    check_common(recipe)
    recipe.check()
    return recipe


def _task_of_model(table: Mapping[str, Any]) -> Task:
    model = table.get("model")
    name = model.get("name") if isinstance(model, Mapping) else None
    return task_of(name) if isinstance(name, str) else CLASSIFICATION  # the recipe class reports the missing key
