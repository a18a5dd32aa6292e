"""The captioning recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lamzoo.errors import RecipeError
from lamzoo.training.moments.recipe import SpliceSection
from lamzoo.training.recipe_common import (
    CountOrZero,
    DataSectionBase,
    Fraction,
    ModelSectionBase,
    OptimizerSection,
    PositiveOrZero,
    ReductionSection,
    RunSection,
    ScheduleSection,
    Smoothing,
    TaskRecipe,
)


@dataclass(frozen=True)
class CaptionModelSection(ModelSectionBase):
    """``[model]``: a model of the family ``lam_describer``.

    ``features`` in ``kwargs`` default to those of the data if the model has no weights.
    """


@dataclass(frozen=True)
class CaptionDataSection(DataSectionBase):
    """``[data]``: clips, as :func:`lamzoo.data.captions.create_caption_dataset` opens them.

    Attributes:
        val_fraction: share of the training videos, drawn with ``run.seed``, that is held out if the data has no
            ``eval_split``; None makes a missing split an error.
        context: number of earlier captions of the same video that the model receives.
    """

    val_fraction: Fraction | None = None
    context: CountOrZero = 0


@dataclass(frozen=True)
class CaptionWeights:
    """``[loss]``: loss weights.

    Attributes:
        caption: weight of the next-token cross-entropy.
        label_smoothing: label smoothing of that cross-entropy.
        words: weight of the cross-entropy of the word spoken at each encoder token, for models with ``align``.
        ctc: weight of the connectionist temporal classification of each modality's tokens (Graves et al., ICML 2006),
            averaged over the words of a sentence, for models with ``align``.
    """

    caption: PositiveOrZero = 1.0
    label_smoothing: Smoothing = 0.0
    words: PositiveOrZero = 1.0
    ctc: PositiveOrZero = 0.5


@dataclass(frozen=True)
class CaptionRecipe(TaskRecipe):
    """A training run of a captioning model; see the sections for the contents of each table."""

    model: CaptionModelSection
    data: CaptionDataSection
    run: RunSection
    task: Literal["captions"] = "captions"
    augment: SpliceSection = field(default_factory=SpliceSection)
    loss: CaptionWeights = field(default_factory=CaptionWeights)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    reduction: ReductionSection | None = None

    def check(self) -> None:
        if self.optimizer.layer_decay is not None:
            raise RecipeError("Recipe key optimizer.layer_decay is for classifiers; leave it out.")
        if self.run.grad_checkpointing:
            raise RecipeError("Recipe key run.grad_checkpointing is not supported for captions; use false.")
        if self.reduction is not None:
            self.reduction.check(merges_only=True)
