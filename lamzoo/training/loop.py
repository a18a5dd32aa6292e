"""The training run: one recipe in, a folder with checkpoints, logs, the trained model and its report out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from torch import Tensor, nn

from lamzoo.data import plain_worker_errors
from lamzoo.errors import RecipeError
from lamzoo.training.build import build_ema, build_model, build_optimizer, build_scheduler
from lamzoo.training.checkpoints import Checkpoints
from lamzoo.training.inputs import ScanProgress, open_splits, prepare_splits, write_bad_images
from lamzoo.training.loaders import (
    check_batches,
    create_eval_loader,
    create_mixup,
    create_train_loader,
    seed_everything,
)
from lamzoo.training.recipe import Recipe
from lamzoo.training.report import RunFacts, write_report
from lamzoo.training.scoring import Score, score
from lamzoo.training.tuning import Tuning
from lamzoo.weights import save_pretrained

_logger = logging.getLogger(__name__)

_FETCH_LOSS = 0.5  # seconds between two looks at the loss, each of which waits for the GPU


@dataclass(frozen=True)
class Progress:
    """Where a run stands; passed to the progress callback after each update and each evaluation.

    Attributes:
        epoch: from 0.
        epochs: in the whole run.
        update: optimiser updates so far.
        updates: in the whole run.
        loss: mean training loss of the epoch, at most half a second old.
        top1: of the last evaluation, percent; None before the first.
    """

    epoch: int
    epochs: int
    update: int
    updates: int
    loss: float
    top1: float | None


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves.

    Attributes:
        output: the folder.
        model: the trained model's folder, which ``create_model("local-dir:...")`` loads.
        history: one record an epoch, as in ``metrics.csv``.
        scores: of the trained model, by split: the one scored during the run, and the recipe's ``test_split``.
        report: ``report.md``; None where the recipe asks for none.
        left_out: images that were left out because they can't be read.
    """

    output: Path
    model: Path
    history: list[dict[str, float]]
    scores: dict[str, Score] = field(default_factory=dict)
    report: Path | None = None
    left_out: int = 0


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    scanning: ScanProgress | None = None,
    command: str | None = None,
) -> TrainResult:
    """Trains an image classifier; under ``torchrun`` or ``accelerate launch`` on all its processes.

    Order, augmentation and loss depend on the recipe alone: a run that was killed and resumed, or that is spread over
    more processes or workers, follows the same curve. (Dropout, stochastic depth and mixup draw per process, so with
    those the number of processes does matter.)

    Args:
        recipe: what to do; see :func:`lamzoo.training.load_recipe` and :func:`lamzoo.training.complete_recipe`.
        resume: go on from the latest checkpoint in ``recipe.run.output``, if there is one.
        progress: called on the main process after every update.
        scanning: called on the main process while images are searched for bad ones: split, images read, images.
        command: what was typed, for the report.

    Returns:
        The finished run; its report is written by the main process.

    Raises:
        RecipeError: the output folder holds another run, or the recipe doesn't fit the data.
        DataError: images can't be read, and the recipe stops for them.
        LamzooError: whatever the model's name or the data's files are at fault for.
    """
    with plain_worker_errors():
        run = _Run(recipe, resume, progress, scanning)
        for epoch in range(run.first_epoch, recipe.schedule.epochs):
            run.epoch(epoch)
        return run.finish(command)


class _Run:
    """The state of one run between its updates."""

    def __init__(
        self,
        recipe: Recipe,
        resume: bool,
        progress: Callable[[Progress], None] | None,
        scanning: ScanProgress | None,
    ) -> None:
        self.started = time.perf_counter()
        self.recipe = recipe
        self.progress = progress
        self.checkpoints = Checkpoints(Path(recipe.run.output), recipe, resume)
        splits = open_splits(recipe.data)
        self.accelerator = _create_accelerator(recipe)
        seed_everything(recipe.run.seed)
        model = build_model(recipe, splits.train.classes)
        self.tuning = Tuning(model, recipe.model.tune)
        self.splits = prepare_splits(recipe.data, splits, recipe.run.seed, self.accelerator, scanning)
        self._build(model)
        self.update = 0
        self.loss_sum: Tensor = self._loss_sum(0.0)
        self.fetched = (0.0, 0.0)  # when, and the epoch's mean loss then
        self.seconds = self.wall_seconds = 0.0
        self.history: list[dict[str, float]] = []
        self.score: Score | None = None
        state = self.checkpoints.load(self.accelerator)
        if state is not None:
            self.update, self.loss_sum = state["update"], self._loss_sum(state["loss_sum"])
            self.seconds, self.history = state["seconds"], state["history"]
            self.wall_seconds = state.get("wall_seconds", state["seconds"])
            _logger.info("resumed %s after %d updates", recipe.run.output, self.update)
        self.first_epoch = self.update // self.updates_per_epoch

    def _build(self, model: Any) -> None:
        recipe, splits = self.recipe, self.splits
        check_batches(recipe, splits.train)
        loader = create_train_loader(recipe, splits.train, model)
        scored = [split for split in (splits.evaluation, splits.test) if split is not None]
        eval_loaders = [create_eval_loader(recipe, split, model) for split in scored]
        self.seeded: Any = loader.dataset
        self.mixup = create_mixup(recipe, model.num_classes)
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.0 if self.mixup else recipe.augment.label_smoothing)
        optimizer = build_optimizer(recipe, model)
        self.ema = build_ema(recipe, model, self.accelerator.device)
        self.updates_per_epoch = len(loader) // recipe.run.accumulation
        self.scheduler = build_scheduler(recipe, optimizer, self.updates_per_epoch)
        self.model, self.optimizer, self.loader, self.eval_loader, *rest = self.accelerator.prepare(
            model, optimizer, loader, *eval_loaders
        )
        self.test_loader = rest[0] if rest else None
        if self.ema is not None:
            self.accelerator.register_for_checkpointing(self.ema.module)
        self.checkpoints.make_folder()
        if splits.bad and self.accelerator.is_main_process:
            path = self.checkpoints.output / "bad-inputs.csv"
            write_bad_images(path, splits.bad)
            _logger.warning("left out %d images that can't be read; %s lists them", len(splits.bad), path)
        if recipe.run.tensorboard:
            self.accelerator.init_trackers("tensorboard")

    def epoch(self, epoch: int) -> None:
        """Trains and, where it is due, evaluates one epoch, from the update at which the run stands."""
        accumulation = self.recipe.run.accumulation
        self.seeded.epoch = epoch
        self.loader.set_epoch(epoch)
        done = self.update - epoch * self.updates_per_epoch
        loader = skip_first_batches(self.loader, done * accumulation) if done else self.loader
        self.tuning.train_mode(self.model)
        for step, (images, labels) in enumerate(loader, start=done * accumulation):
            if step >= self.updates_per_epoch * accumulation:
                break  # batches that don't fill an update
            started = time.perf_counter()
            self.loss_sum += self._step(epoch, step, images, labels).to(self.loss_sum.dtype) / accumulation
            self.seconds += time.perf_counter() - started
            if (step + 1) % accumulation:
                continue
            self.update += 1
            self._report_progress(epoch)
            interval = self.recipe.run.checkpoint_interval
            if interval and self.update % interval == 0 and self.update % self.updates_per_epoch:
                self._save()
        self._end_epoch(epoch)

    def finish(self, command: str | None) -> TrainResult:
        """Saves the trained model beside the logs, scores it, writes the report and returns the run."""
        folder, model = self.checkpoints.output / "model", self._evaluated_model()
        main, classes = self.accelerator.is_main_process, self.splits.train.classes
        if main:
            save_pretrained(model, folder, label_names=classes)
        self.accelerator.wait_for_everyone()
        assert self.splits.evaluation is not None  # prepare_splits has made it
        if self.score is None:  # the run was complete before it was resumed
            self.score = score(self.accelerator, model, self.eval_loader)
        scores = {self.splits.evaluation.split or "validation": self.score}
        if self.splits.test is not None:
            scores[self.splits.test.split or "test"] = score(self.accelerator, model, self.test_loader)
        report = None
        if self.recipe.run.report:
            report = self.checkpoints.output / "report" / "report.md"
            if main:
                write_report(report.parent, self._facts(model, scores, command))
        self.accelerator.wait_for_everyone()
        if self.recipe.run.tensorboard:
            self.accelerator.end_training()
        return TrainResult(self.checkpoints.output, folder, self.history, scores, report, len(self.splits.bad))

    def _facts(self, model: nn.Module, scores: dict[str, Score], command: str | None) -> RunFacts:
        return RunFacts(
            recipe=self.recipe,
            model=model,
            trained=sum(p.numel() for p in self.accelerator.unwrap_model(self.model).parameters() if p.requires_grad),
            splits=self.splits,
            scores=scores,
            history=self.history,
            train_seconds=self.seconds,
            wall_seconds=self._wall(),
            device=str(self.accelerator.device),
            processes=self.accelerator.num_processes,
            command=command,
        )

    def _step(self, epoch: int, step: int, images: Tensor, labels: Tensor) -> Tensor:
        # Seeds of their own for each step: dropout and mixup need no states in the checkpoints.
        seed_everything(self.recipe.run.seed, epoch, step, self.accelerator.process_index, 1)
        if self.mixup is not None:
            images, labels = self.mixup(images, labels)
        with self.accelerator.accumulate(self.model):
            with self.accelerator.autocast():
                logits = self.model(images)
            loss: Tensor = self.loss(logits.float(), labels)
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                if self.recipe.optimizer.clip_grad is not None:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.clip_grad)
                self.scheduler.step_update(self.update)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.accelerator.sync_gradients and self.ema is not None:
            self.ema.update(self.accelerator.unwrap_model(self.model), step=self.update + 1)
        return self.accelerator.reduce(loss.detach(), "mean")

    def _end_epoch(self, epoch: int) -> None:
        recipe = self.recipe
        waited = time.perf_counter()
        loss = float(self.loss_sum) / self.updates_per_epoch  # waits for what a GPU has yet to do
        self.seconds += time.perf_counter() - waited
        record = {
            "epoch": epoch,
            "update": self.update,
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            "train_loss": loss,
            "train_seconds": round(self.seconds, 1),
        }
        last = epoch + 1 == recipe.schedule.epochs
        if last or (epoch + 1) % recipe.run.eval_interval == 0:
            self.score = score(self.accelerator, self._evaluated_model(), self.eval_loader)
            record |= {"eval_loss": self.score.loss, "eval_top1": self.score.top1}
        _logger.info("epoch %d of %d: %s", epoch + 1, recipe.schedule.epochs, record)
        self.history.append(record)
        self.loss_sum = self._loss_sum(0.0)
        if self.accelerator.is_main_process:
            self.checkpoints.write_metrics(self.history)
        if recipe.run.tensorboard:
            self.accelerator.log({k: v for k, v in record.items() if k not in ("epoch", "update")}, step=self.update)
        self._save()
        self._report_progress(epoch, loss)

    def _evaluated_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model) if self.ema is None else self.ema.module

    def _save(self) -> None:
        state = {"update": self.update, "loss_sum": float(self.loss_sum), "seconds": self.seconds}
        self.checkpoints.save(self.accelerator, {**state, "wall_seconds": self._wall(), "history": self.history})

    def _wall(self) -> float:
        return self.wall_seconds + time.perf_counter() - self.started

    def _loss_sum(self, value: float) -> Tensor:
        device = self.accelerator.device
        return torch.tensor(value, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)

    def _report_progress(self, epoch: int, loss: float | None = None) -> None:
        if self.progress is None or not self.accelerator.is_main_process:
            return
        if loss is None and (now := time.perf_counter()) - self.fetched[0] > _FETCH_LOSS:
            loss = float(self.loss_sum) / max(1, self.update - epoch * self.updates_per_epoch)
            self.fetched = now, loss
        epochs = self.recipe.schedule.epochs
        evaluated = [record["eval_top1"] for record in self.history if "eval_top1" in record]
        self.progress(
            Progress(
                epoch=epoch,
                epochs=epochs,
                update=self.update,
                updates=epochs * self.updates_per_epoch,
                loss=self.fetched[1] if loss is None else loss,
                top1=evaluated[-1] if evaluated else None,
            )
        )


def _create_accelerator(recipe: Recipe) -> Accelerator:
    run = recipe.run
    accelerator = Accelerator(
        mixed_precision=run.precision,
        gradient_accumulation_steps=run.accumulation,
        cpu=run.device == "cpu",
        # Batches are the global ones, split over the processes, in an order that the seed fixes.
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=run.seed),
        log_with="tensorboard" if run.tensorboard else None,
        project_dir=run.output,
        step_scheduler_with_optimizer=False,
    )
    if run.batch_size // run.accumulation % accelerator.num_processes:
        raise RecipeError(
            f"run.batch_size {run.batch_size} over {run.accumulation} accumulation steps does not divide by "
            f"{accelerator.num_processes} processes; choose a multiple."
        )
    return accelerator
