"""Training from a recipe; a run writes checkpoints, logs, the trained model and a report to its folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from lamzoo.data import plain_worker_errors
from lamzoo.errors import LamzooError
from lamzoo.tasks import find_task
from lamzoo.training.progress import Progress, TrainResult
from lamzoo.training.recipe import AnyRecipe
from lamzoo.training.splits import ScanProgress
from lamzoo.training.trainer import TrainingRun


def train(
    recipe: AnyRecipe,
    *,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    scanning: ScanProgress | None = None,
    command: str | None = None,
) -> TrainResult:
    """Trains a model; under ``torchrun`` or ``accelerate launch`` on all processes.

    Data order, augmentation and loss depend on the recipe only: a run follows the same curve if it is interrupted and
    resumed, or uses more processes, workers or accumulation steps. (Exceptions are batch normalisation, dropout,
    stochastic depth, mixup, modality dropout and straight-through pruning, which work on each process's part of a
    batch, so their results depend on the number of parts.)

    Args:
        recipe: the recipe; see :func:`lamzoo.training.load_recipe` and :func:`lamzoo.training.complete_recipe`.
        resume: continue from the latest checkpoint in ``recipe.run.output``, if any; the recipe may have more epochs
            than before.
        progress: called on the main process after each update.
        scanning: called on the main process during the search for invalid inputs, with split, inputs read and total.
        command: the command line, for the report.

    Returns:
        The finished run; the main process has written its report.

    Raises:
        RecipeError: the output folder holds another run, or the recipe doesn't fit the data.
        DataError: inputs can't be read, and the recipe does not skip them.
        LamzooError: the model's name or the data's files are invalid, or another process of the run has ended.
    """
    with plain_worker_errors(), _reporting_ends():
        run = create_run(recipe, resume, progress, scanning)
        with run.begun():
            for epoch in range(run.first_epoch, recipe.schedule.total_epochs):
                run.epoch(epoch)
            return run.finish(command)


def create_run(
    recipe: AnyRecipe,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    scanning: ScanProgress | None = None,
) -> TrainingRun:
    """Opens data and model of a run, without writing or loading anything; arguments as of :func:`train`."""
    task = find_task(recipe.task)
    task.check_data(recipe.data.source)
    run: TrainingRun = task.load("run")(recipe, resume, progress, scanning)
    return run


@contextmanager
def _reporting_ends() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not (several and re.search("Connection (closed|reset)|gloo|NCCL", str(error))):
            raise
        raise LamzooError(
            "another process of this run has ended, and its message says why; start again with --resume"
        ) from error
