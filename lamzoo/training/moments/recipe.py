"""The moment retrieval recipe."""

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
    check_probability,
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

    splice: float = 0.0


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
        check_probability("augment.splice", self.augment.splice)
        for key, value in dataclasses.asdict(self.loss).items():
            if value < 0 or (key == "temperature" and not value):
                raise RecipeError(f"Recipe key loss.{key} is {value}; it must be positive.")
        if self.optimizer.layer_decay is not None:
            raise RecipeError("Recipe key optimizer.layer_decay is for classifiers; leave it out.")
        if self.run.grad_checkpointing:
            raise RecipeError(
                "Recipe key run.grad_checkpointing is not supported for moment models, which are small; use false."
            )
