"""The recipe of description: its own sections beside those that all tasks share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from lamzoo.errors import RecipeError
from lamzoo.training.config_reader import without_none
from lamzoo.training.moments.recipe import SpliceSection
from lamzoo.training.recipe_common import OptimizerSection, RunSection, ScheduleSection


@dataclass(frozen=True)
class CaptionModelSection:
    """``[model]``: what :func:`lamzoo.create_model` gets.

    Attributes:
        name: a model of the family ``lam_describer``, ``local-dir:`` or ``hf-hub:``.
        pretrained: start from the published weights.
        lam: fields of a :class:`lamzoo.LamConfig` in place of the registered one; true for the registered one or, where
            there is none, the default; false for none.
        kwargs: further arguments of ``create_model``; ``features`` are those of the data where they are left out and
            the model has no weights.
    """

    name: str
    pretrained: bool = False
    lam: dict[str, Any] | bool | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CaptionDataSection:
    """``[data]``: the data set, as :func:`lamzoo.data.captions.create_caption_dataset` reads it.

    Attributes:
        source: the data set's specification.
        train_split: the clips to train on.
        eval_split: the clips to score on during the run.
        test_split: scored once, at the end; None for none.
        context: earlier captions of the same video that the model reads.
        workers: processes that read features, for each training process; 0 reads in that one.
        scan: read the features of all these splits once before the first epoch, so that one that is missing is named
            then.
    """

    source: str
    train_split: str = "train"
    eval_split: str = "validation"
    test_split: str | None = None
    context: int = 0
    workers: int = 0
    scan: bool = True


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
class CaptionRecipe:
    """One training run of description; see the sections for what each table holds."""

    model: CaptionModelSection
    data: CaptionDataSection
    run: RunSection
    task: Literal["captions"] = "captions"
    augment: SpliceSection = field(default_factory=SpliceSection)
    loss: CaptionWeights = field(default_factory=CaptionWeights)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)

    def to_dict(self) -> dict[str, Any]:
        """Returns the recipe as nested plain values, fields that are None left out."""
        return without_none(dataclasses.asdict(self))


def check_captions(recipe: CaptionRecipe) -> None:
    """Checks what only this task's sections say.

    Raises:
        RecipeError: an impossible value; names its key.
    """
    if not 0 <= recipe.augment.splice <= 1:
        raise RecipeError(f"Recipe key augment.splice is {recipe.augment.splice}; it must lie between 0 and 1.")
    for key, value in dataclasses.asdict(recipe.loss).items():
        if value < 0 or (key == "label_smoothing" and value >= 1):
            raise RecipeError(f"Recipe key loss.{key} is {value}; it must not be negative, nor all of it smoothing.")
    if recipe.data.context < 0:
        raise RecipeError(f"Recipe key data.context is {recipe.data.context}; it must be 0 or more.")
    if recipe.optimizer.layer_decay is not None:
        raise RecipeError("Recipe key optimizer.layer_decay is for classifiers; leave it out.")
    if recipe.run.grad_checkpointing:
        raise RecipeError("Recipe key run.grad_checkpointing does not go with captions; use false.")
