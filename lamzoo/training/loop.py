"""Training by a recipe: the run leaves a folder with checkpoints, logs, the trained model and its report."""

from __future__ import annotations

from collections.abc import Callable

from lamzoo.data import plain_worker_errors
from lamzoo.tasks import find_task
from lamzoo.training.recipe import AnyRecipe
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
        recipe: the settings; see :func:`lamzoo.training.load_recipe` and :func:`lamzoo.training.complete_recipe`.
        resume: continue from the latest checkpoint in ``recipe.run.output``, if there is one; the recipe may have more
            epochs than the run has had.
        progress: called on the main process after every update.
        scanning: called on the main process while the data is searched for invalid inputs: split, inputs read, inputs.
        command: the command line, for the report.

    Returns:
        The finished run; its report is written by the main process.

    Raises:
        RecipeError: the output folder holds another run, or the recipe doesn't fit the data.
        DataError: inputs can't be read, and the recipe stops for them.
        LamzooError: whatever the model's name or the data's files are at fault for.
    """
    with plain_worker_errors():
        run = create_run(recipe, resume, progress, scanning)
        for epoch in range(run.first_epoch, recipe.schedule.total_epochs):
            run.epoch(epoch)
        return run.finish(command)


def create_run(
    recipe: AnyRecipe,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    scanning: ScanProgress | None = None,
) -> TrainingRun:
    """Opens the data and builds the model of a run, or loads its latest checkpoint; arguments as of :func:`train`."""
    run: TrainingRun = find_task(recipe.task).load("run")(recipe, resume, progress, scanning)
    return run
