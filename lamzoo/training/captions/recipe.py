"""The recipe of captions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from lamzoo.errors import RecipeError
from lamzoo.training.moments.recipe import SpliceSection
from lamzoo.training.recipe_common import (
    DataSectionBase,
    ModelSectionBase,
    OptimizerSection,
    RunSection,
    ScheduleSection,
    TaskRecipe,
)


@dataclass(frozen=True)
class CaptionModelSection(ModelSectionBase):
    """``[model]``: a model of the family ``lam_describer``.

    ``features`` in ``kwargs`` are those of the data where they are left out and the model has no weights.
    """


@dataclass(frozen=True)
class CaptionDataSection(DataSectionBase):
    """``[data]``: clips, as :func:`lamzoo.data.captions.create_caption_dataset` opens them.

    Attributes:
        val_fraction: where the data has no ``eval_split``, this share of the training videos, drawn with ``run.seed``,
            takes its place; None makes that an error.
        context: earlier captions of the same video that the model reads.
    """

    val_fraction: float | None = None
    context: int = 0


@dataclass(frozen=True)
class CaptionWeights:
    """``[loss]``: weights of the losses.

    Attributes:
        caption: of the cross-entropy of the next token.
        label_smoothing: of it.
        words: of the cross-entropy of the word said at each of the encoder's tokens, for models with ``align``.
        ctc: of the connectionist temporal classification of each modality's tokens (Graves et al., ICML 2006), a mean
            over the words of a sentence, likewise.
    """

    caption: float = 1.0
    label_smoothing: float = 0.0
    words: float = 1.0
    ctc: float = 0.5


@dataclass(frozen=True)
class CaptionRecipe(TaskRecipe):
    """One training run of description; see the sections for what each table holds."""

    model: CaptionModelSection
    data: CaptionDataSection
    run: RunSection
    task: Literal["captions"] = "captions"
    augment: SpliceSection = field(default_factory=SpliceSection)
    loss: CaptionWeights = field(default_factory=CaptionWeights)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)

    def check(self) -> None:
        fraction = self.data.val_fraction
        if fraction is not None and not 0 < fraction < 1:
            raise RecipeError(f"Recipe key data.val_fraction is {fraction}; it must lie between 0 and 1.")
        if not 0 <= self.augment.splice <= 1:
            raise RecipeError(f"Recipe key augment.splice is {self.augment.splice}; it must lie between 0 and 1.")
        for key, value in dataclasses.asdict(self.loss).items():
            if value < 0 or (key == "label_smoothing" and value >= 1):
                raise RecipeError(
                    f"Recipe key loss.{key} is {value}; it must not be negative, nor all of it smoothing."
                )
        if self.data.context < 0:
            raise RecipeError(f"Recipe key data.context is {self.data.context}; it must be 0 or more.")
        if self.optimizer.layer_decay is not None:
            raise RecipeError("Recipe key optimizer.layer_decay is for classifiers; leave it out.")
        if self.run.grad_checkpointing:
            raise RecipeError("Recipe key run.grad_checkpointing does not go with captions; use false.")
