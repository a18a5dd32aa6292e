"""The moment retrieval recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lamzoo.errors import RecipeError
from lamzoo.training.recipe_common import (
    DataSectionBase,
    ModelSectionBase,
    OptimizerSection,
    Positive,
    PositiveOrZero,
    Probability,
    RunSection,
    ScheduleSection,
    TaskRecipe,
)


@dataclass(frozen=True)
class MomentModelSection(ModelSectionBase):
    """``[model]``: a model of the family ``lam_moment_detr``.

    ``video_dim``, ``text_dim`` and ``words`` in ``kwargs`` default to those of the data if the model has no weights.
    """


@dataclass(frozen=True)
class MomentDataSection(DataSectionBase):
    """``[data]``: queries, as :func:`lamzoo.data.moments.create_moment_dataset` opens them."""


@dataclass(frozen=True)
class SpliceSection:
    """``[augment]``: augmentation of training videos; the published models use none.

    Attributes:
        splice: probability that a video is spliced from pieces of several, for data with annotated pieces (GRID's
            words).
    """

    splice: Probability = 0.0


@dataclass(frozen=True)
class MomentWeights:
    """``[loss]``: weights of the losses and of the matching costs; the defaults are the published ones.

    Attributes:
        span: weight of the L1 distance of centre and width.
        giou: weight of one minus the generalised intersection over union.
        label: weight of the cross-entropy.
        nothing: class weight of unmatched queries in the cross-entropy.
        saliency: weight of all losses on clips.
        margin: margin between the saliencies of better and worse clips.
        temperature: temperature of the contrast between grades.
        words: weight of the cross-entropy of the word spoken in each clip, for models built with ``words``.
    """

    span: PositiveOrZero = 10.0
    giou: PositiveOrZero = 1.0
    label: PositiveOrZero = 4.0
    nothing: PositiveOrZero = 0.1
    saliency: PositiveOrZero = 1.0
    margin: PositiveOrZero = 0.2
    temperature: Positive = 0.5
    words: PositiveOrZero = 1.0


@dataclass(frozen=True)
class MomentRecipe(TaskRecipe):
    """A training run of moment retrieval; see the sections for the contents of each table."""

    model: MomentModelSection
    data: MomentDataSection
    run: RunSection
    task: Literal["moments"] = "moments"
    augment: SpliceSection = field(default_factory=SpliceSection)
    loss: MomentWeights = field(default_factory=MomentWeights)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)

    def check(self) -> None:
        if self.optimizer.layer_decay is not None:
            raise RecipeError("Recipe key optimizer.layer_decay is for classifiers; leave it out.")
        if self.run.grad_checkpointing:
            raise RecipeError(
                "Recipe key run.grad_checkpointing is not supported for moment models, which are small; use false."
            )
