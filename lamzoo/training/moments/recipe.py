"""The recipe of moment retrieval: its own sections beside those that all tasks share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from lamzoo.errors import RecipeError
from lamzoo.training.config_reader import without_none
from lamzoo.training.recipe_common import OptimizerSection, RunSection, ScheduleSection


@dataclass(frozen=True)
class MomentModelSection:
    """``[model]``: what :func:`lamzoo.create_model` gets.

    Attributes:
        name: a model of the family ``lam_moment_detr``, ``local-dir:`` or ``hf-hub:``.
        pretrained: start from the published weights.
        lam: fields of a :class:`lamzoo.LamConfig` in place of the registered one; true for the registered one or, where
            there is none, the default; false for none.
        kwargs: further arguments of ``create_model``, such as ``lam_in`` and ``queries``; ``video_dim``,
            ``text_dim`` and ``words`` are those of the data where they are left out and the model has no weights.
    """

    name: str
    pretrained: bool = False
    lam: dict[str, Any] | bool | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MomentDataSection:
    """``[data]``: the data set, as :func:`lamzoo.data.moments.create_moment_dataset` reads it.

    Attributes:
        source: the data set's specification.
        train_split: the queries to train on.
        eval_split: the queries to score on during the run.
        test_split: scored once, at the end; None for none.
        workers: processes that read features, for each training process; 0 reads in that one.
        scan: read the features of all these splits once before the first epoch, so that one that is missing is named
            then.
    """

    source: str
    train_split: str = "train"
    eval_split: str = "validation"
    test_split: str | None = None
    workers: int = 0
    scan: bool = True


@dataclass(frozen=True)
class SpliceSection:
    """``[augment]``: what happens to videos in training; the published models have none of it.

    Attributes:
        splice: probability that a video is put together from pieces of several, where the data know pieces (GRID's
            words).
    """

    splice: float = 0.0


@dataclass(frozen=True)
class MomentWeights:
    """``[loss]``: weights of the losses, and of the costs by which queries are matched; the published ones.

    Attributes:
        span: of the L1 distance of centre and width.
        giou: of one minus the generalised intersection over union.
        label: of the cross-entropy.
        nothing: of the class of queries that match no moment, in it.
        saliency: of all that is said of clips.
        margin: by which a better clip is to be ahead of a worse one.
        temperature: of the contrast between grades.
        words: of the cross-entropy of the word said in each clip, for models built with ``words``.
    """

    span: float = 10.0
    giou: float = 1.0
    label: float = 4.0
    nothing: float = 0.1
    saliency: float = 1.0
    margin: float = 0.2
    temperature: float = 0.5
    words: float = 1.0


@dataclass(frozen=True)
class MomentRecipe:
    """One training run of moment retrieval; see the sections for what each table holds."""

    model: MomentModelSection
    data: MomentDataSection
    run: RunSection
    task: Literal["moments"] = "moments"
    augment: SpliceSection = field(default_factory=SpliceSection)
    loss: MomentWeights = field(default_factory=MomentWeights)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)

    def to_dict(self) -> dict[str, Any]:
        """Returns the recipe as nested plain values, fields that are None left out."""
        return without_none(dataclasses.asdict(self))


def check_moments(recipe: MomentRecipe) -> None:
    """Checks what only this task's sections say.

    Raises:
        RecipeError: an impossible value; names its key.
    """
    if not 0 <= recipe.augment.splice <= 1:
        raise RecipeError(f"Recipe key augment.splice is {recipe.augment.splice}; it must lie between 0 and 1.")
    for key, value in dataclasses.asdict(recipe.loss).items():
        if value < 0 or (key == "temperature" and not value):
            raise RecipeError(f"Recipe key loss.{key} is {value}; it must be positive.")
    if recipe.optimizer.layer_decay is not None:
        raise RecipeError("Recipe key optimizer.layer_decay is for classifiers; leave it out.")
    if recipe.run.grad_checkpointing:
        raise RecipeError(
            "Recipe key run.grad_checkpointing does not go with moments, whose models are small; use false."
        )
