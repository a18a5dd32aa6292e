"""The training run: one recipe in, a folder with checkpoints, logs, the trained model and its report out."""

from __future__ import annotations

from collections.abc import Callable

from lamzoo.data import plain_worker_errors
from lamzoo.training.classification.run import ClassificationRun
from lamzoo.training.moments.recipe import MomentRecipe
from lamzoo.training.recipe import AnyRecipe, Recipe
from lamzoo.training.retrieval.recipe import RetrievalRecipe
from lamzoo.training.splits import ScanProgress
from lamzoo.training.trainer import Progress, TrainingRun, TrainResult


def train(
    recipe: AnyRecipe,
    *,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    scanning: ScanProgress | None = None,
    command: str | None = None,
) -> TrainResult:
    """Trains a model; under ``torchrun`` or ``accelerate launch`` on all its processes.

    Order, augmentation and loss depend on the recipe alone: a run that was killed and resumed, or that is spread over
    more processes, workers or accumulation steps, follows the same curve. (Batch normalisation, dropout, stochastic
    depth, mixup, modality dropout and straight-through pruning work on each process's part of a batch, so with those
    the number of parts does matter.)

    Args:
        recipe: what to do; see :func:`lamzoo.training.load_recipe` and :func:`lamzoo.training.complete_recipe`.
        resume: continue from the latest checkpoint in ``recipe.run.output``, if there is one; the recipe may have more
            epochs than the run has had.
        progress: called on the main process after every update.
        scanning: called on the main process while inputs are searched for bad ones: split, inputs read, inputs.
        command: what was typed, for the report.

    Returns:
        The finished run; its report is written by the main process.

    Raises:
        RecipeError: the output folder holds another run, or the recipe doesn't fit the data.
        DataError: inputs can't be read, and the recipe stops for them.
        LamzooError: whatever the model's name or the data's files are at fault for.
    """
    with plain_worker_errors():
        run = _run(recipe, resume, progress, scanning)
        for epoch in range(run.first_epoch, recipe.schedule.total_epochs):
            run.epoch(epoch)
        return run.finish(command)


def _run(
    recipe: AnyRecipe,
    resume: bool,
    progress: Callable[[Progress], None] | None,
    scanning: ScanProgress | None,
) -> TrainingRun:
    if isinstance(recipe, Recipe):
        return ClassificationRun(recipe, resume, progress, scanning)
    if isinstance(recipe, RetrievalRecipe):
        from lamzoo.training.retrieval.run import RetrievalRun  # needs open_clip

        return RetrievalRun(recipe, resume, progress, scanning)
    if isinstance(recipe, MomentRecipe):
        from lamzoo.training.moments.run import MomentRun  # needs SciPy

        return MomentRun(recipe, resume, progress, scanning)
    from lamzoo.training.captions.run import CaptionRun  # needs open_clip

    return CaptionRun(recipe, resume, progress, scanning)
