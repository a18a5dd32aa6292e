"""The recipe of moment retrieval."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from lamzoo.errors import RecipeError
from lamzoo.training.recipe_common import (
    DataSectionBase,
    ModelSectionBase,
    OptimizerSection,
    RunSection,
    ScheduleSection,
    TaskRecipe,
)


@dataclass(frozen=True)
class MomentModelSection(ModelSectionBase):
    """``[model]``: a model of the family ``lam_moment_detr``.

    ``video_dim``, ``text_dim`` and ``words`` in ``kwargs`` are those of the data where they are left out and the model
    has no weights.
    """


@dataclass(frozen=True)
class MomentDataSection(DataSectionBase):
    """``[data]``: queries, as :func:`lamzoo.data.moments.create_moment_dataset` opens them."""


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
class MomentRecipe(TaskRecipe):
    """One training run of moment retrieval; see the sections for what each table holds."""

    model: MomentModelSection
    data: MomentDataSection
    run: RunSection
    task: Literal["moments"] = "moments"
    augment: SpliceSection = field(default_factory=SpliceSection)
    loss: MomentWeights = field(default_factory=MomentWeights)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)

    def check(self) -> None:
        if not 0 <= self.augment.splice <= 1:
            raise RecipeError(f"Recipe key augment.splice is {self.augment.splice}; it must lie between 0 and 1.")
        for key, value in dataclasses.asdict(self.loss).items():
            if value < 0 or (key == "temperature" and not value):
                raise RecipeError(f"Recipe key loss.{key} is {value}; it must be positive.")
        if self.optimizer.layer_decay is not None:
            raise RecipeError("Recipe key optimizer.layer_decay is for classifiers; leave it out.")
        if self.run.grad_checkpointing:
            raise RecipeError(
                "Recipe key run.grad_checkpointing does not go with moments, whose models are small; use false."
            )
