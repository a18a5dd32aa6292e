"""The training run: one recipe in, a folder with checkpoints, logs and the trained model out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm.optim
import timm.scheduler
import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from timm.layers import set_fused_attn, use_fused_attn
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from lamzoo.data import create_dataset, plain_worker_errors
from lamzoo.errors import RecipeError
from lamzoo.lam import LamConfig
from lamzoo.registry import create_model
from lamzoo.training.checkpoints import Checkpoints
from lamzoo.training.loaders import create_loaders, create_mixup, seed_everything
from lamzoo.training.recipe import Recipe
from lamzoo.weights import save_pretrained

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Where a run stands; passed to the progress callback after each update and each evaluation.

    Attributes:
        epoch: from 0.
        epochs: in the whole run.
        update: optimiser updates so far.
        updates: in the whole run.
        loss: mean training loss of the epoch so far.
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
    """

    output: Path
    model: Path
    history: list[dict[str, float]]


def train(recipe: Recipe, *, resume: bool = False, progress: Callable[[Progress], None] | None = None) -> TrainResult:
    """Trains an image classifier; under ``torchrun`` or ``accelerate launch`` on all its processes.

    Order, augmentation and loss depend on the recipe alone: a run that was killed and resumed, or that is spread over
    more processes or workers, follows the same curve. (Dropout, stochastic depth and mixup draw per process, so with
    those the number of processes does matter.)

    Args:
        recipe: what to do; see :func:`lamzoo.training.load_recipe`.
        resume: go on from the latest checkpoint in ``recipe.run.output``, if there is one.
        progress: called on the main process after every update.

    Returns:
        The finished run.

    Raises:
        RecipeError: the output folder holds another run, or the recipe doesn't fit the data.
        LamzooError: whatever the model's name or the data's files are at fault for.
    """
    with plain_worker_errors():
        run = _Run(recipe, resume, progress)
        for epoch in range(run.first_epoch, recipe.schedule.epochs):
            run.epoch(epoch)
        return run.finish()


class _Run:
    """The state of one run between its updates."""

    def __init__(self, recipe: Recipe, resume: bool, progress: Callable[[Progress], None] | None) -> None:
        self.recipe = recipe
        self.progress = progress
        self.checkpoints = Checkpoints(Path(recipe.run.output), recipe, resume)
        train_set = create_dataset(recipe.data.source, recipe.data.train_split)
        self.accelerator = Accelerator(
            mixed_precision=recipe.run.precision,
            gradient_accumulation_steps=recipe.run.accumulation,
            cpu=recipe.run.device == "cpu",
            # Batches are the global ones, split over the processes, in an order that the seed fixes.
            dataloader_config=DataLoaderConfiguration(
                split_batches=True, use_seedable_sampler=True, data_seed=recipe.run.seed
            ),
            log_with="tensorboard" if recipe.run.tensorboard else None,
            project_dir=recipe.run.output,
            step_scheduler_with_optimizer=False,
        )
        self._check_processes()
        seed_everything(recipe.run.seed)
        model = _create_model(recipe, train_set.classes)
        self.class_names: list[str] | None = train_set.classes
        train_loader, eval_loader = create_loaders(recipe, train_set, model)
        self.seeded = train_loader.dataset
        self.mixup = create_mixup(recipe, model.num_classes)
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.0 if self.mixup else recipe.augment.label_smoothing)
        optimizer = _create_optimizer(recipe, model)
        decay = recipe.run.ema_decay
        self.ema = None if decay is None else _create_ema(decay, model, self.accelerator.device)
        self.updates_per_epoch = len(train_loader) // recipe.run.accumulation
        self.scheduler = _create_scheduler(recipe, optimizer, self.updates_per_epoch)
        self.model, self.optimizer, self.loader, self.eval_loader = self.accelerator.prepare(
            model, optimizer, train_loader, eval_loader
        )
        if self.ema is not None:
            self.accelerator.register_for_checkpointing(self.ema.module)
        self.checkpoints.make_folder()
        if recipe.run.tensorboard:
            self.accelerator.init_trackers("tensorboard")
        self.update = 0
        self.loss_sum = 0.0
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []
        state = self.checkpoints.load(self.accelerator)
        if state is not None:
            self.update, self.loss_sum = state["update"], state["loss_sum"]
            self.seconds, self.history = state["seconds"], state["history"]
            _logger.info("resumed %s after %d updates", recipe.run.output, self.update)
        self.first_epoch = self.update // self.updates_per_epoch

    def epoch(self, epoch: int) -> None:
        """Trains and, where it is due, evaluates one epoch, from the update at which the run stands."""
        accumulation = self.recipe.run.accumulation
        self.seeded.epoch = epoch  # type: ignore[attr-defined]
        self.loader.set_epoch(epoch)
        done = self.update - epoch * self.updates_per_epoch
        loader = skip_first_batches(self.loader, done * accumulation) if done else self.loader
        self.model.train()
        loss_sum = torch.tensor(self.loss_sum, dtype=torch.float64, device="cpu")
        for step, (images, labels) in enumerate(loader, start=done * accumulation):
            if step >= self.updates_per_epoch * accumulation:
                break  # batches that don't fill an update
            started = time.perf_counter()
            loss_sum += self._step(epoch, step, images, labels).double().cpu() / accumulation
            self.seconds += time.perf_counter() - started
            if (step + 1) % accumulation:
                continue
            self.update += 1
            self.loss_sum = float(loss_sum)
            self._report(epoch)
            interval = self.recipe.run.checkpoint_interval
            if interval and self.update % interval == 0 and self.update % self.updates_per_epoch:
                self._save()
        self._end_epoch(epoch)

    def finish(self) -> TrainResult:
        """Saves the trained model beside the logs and returns the run."""
        folder = self.checkpoints.output / "model"
        if self.accelerator.is_main_process:
            save_pretrained(self._evaluated_model(), folder, label_names=self.class_names)
        self.accelerator.wait_for_everyone()
        if self.recipe.run.tensorboard:
            self.accelerator.end_training()
        return TrainResult(self.checkpoints.output, folder, self.history)

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
        record = {
            "epoch": epoch,
            "update": self.update,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": self.loss_sum / self.updates_per_epoch,
            "train_seconds": round(self.seconds, 1),
        }
        last = epoch + 1 == recipe.schedule.epochs
        if last or (epoch + 1) % recipe.run.eval_interval == 0:
            record |= self._evaluate()
        self.history.append(record)
        self.loss_sum = 0.0
        if self.accelerator.is_main_process:
            self.checkpoints.write_metrics(self.history)
        if recipe.run.tensorboard:
            self.accelerator.log({k: v for k, v in record.items() if k not in ("epoch", "update")}, step=self.update)
        self._save()
        self._report(epoch, record["train_loss"])

    @torch.inference_mode()
    def _evaluate(self) -> dict[str, float]:
        model = self._evaluated_model().eval()
        correct = losses = count = torch.zeros((), dtype=torch.float64)
        for images, labels in self.eval_loader:
            with self.accelerator.autocast():
                logits = model(images).float()
            logits, labels = self.accelerator.gather_for_metrics((logits, labels))
            correct = correct + (logits.argmax(dim=1) == labels).sum().cpu()
            losses = losses + nn.functional.cross_entropy(logits, labels, reduction="sum").double().cpu()
            count = count + len(labels)
        return {"eval_loss": float(losses / count), "eval_top1": float(100 * correct / count)}

    def _evaluated_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model) if self.ema is None else self.ema.module

    def _save(self) -> None:
        self.checkpoints.save(
            self.accelerator,
            {"update": self.update, "loss_sum": self.loss_sum, "seconds": self.seconds, "history": self.history},
        )

    def _report(self, epoch: int, loss: float | None = None) -> None:
        if self.progress is None or not self.accelerator.is_main_process:
            return
        done = max(1, self.update - epoch * self.updates_per_epoch)
        epochs = self.recipe.schedule.epochs
        evaluated = [record["eval_top1"] for record in self.history if "eval_top1" in record]
        self.progress(
            Progress(
                epoch=epoch,
                epochs=epochs,
                update=self.update,
                updates=epochs * self.updates_per_epoch,
                loss=self.loss_sum / done if loss is None else loss,
                top1=evaluated[-1] if evaluated else None,
            )
        )

    def _check_processes(self) -> None:
        run, processes = self.recipe.run, self.accelerator.num_processes
        if run.batch_size // run.accumulation % processes:
            raise RecipeError(
                f"run.batch_size {run.batch_size} over {run.accumulation} accumulation steps does not divide by "
                f"{processes} processes; choose a multiple."
            )


def _create_model(recipe: Recipe, classes: list[str] | None) -> Any:
    section = recipe.model
    kwargs = dict(section.kwargs)
    if "num_classes" not in kwargs:
        if classes is None:
            raise RecipeError(f"{recipe.data.source} has no class names; set model.kwargs.num_classes in the recipe.")
        kwargs["num_classes"] = len(classes)
    if section.lam is not None:
        kwargs["lam"] = LamConfig.from_dict(section.lam)
    with _fused_attention(section.fused_attention):
        model: Any = create_model(section.name, pretrained=section.pretrained, **kwargs)
    if recipe.run.grad_checkpointing:
        model.set_grad_checkpointing(True)
    return model


@contextmanager
def _fused_attention(enable: bool) -> Iterator[None]:
    # timm's layers read the global switch when they are built.
    before, experimental = use_fused_attn(), use_fused_attn(experimental=True)
    set_fused_attn(enable)
    try:
        yield
    finally:
        set_fused_attn(before, experimental)


def _create_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    section = recipe.optimizer
    try:
        return timm.optim.create_optimizer_v2(
            model,
            opt=section.name,
            lr=section.lr,
            weight_decay=section.weight_decay,
            layer_decay=section.layer_decay,
            **section.kwargs,
        )
    except TypeError as error:
        raise RecipeError(f"optimizer.kwargs {section.kwargs} do not fit {section.name!r}: {error}.") from None


def _create_scheduler(recipe: Recipe, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> Any:
    section = recipe.schedule
    scheduler, _ = timm.scheduler.create_scheduler_v2(
        optimizer,
        sched=section.name,
        num_epochs=section.epochs,
        warmup_epochs=section.warmup_epochs,
        warmup_lr=section.warmup_lr,
        min_lr=section.min_lr,
        cooldown_epochs=section.cooldown_epochs,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return scheduler


def _create_ema(decay: float, model: nn.Module, device: torch.device) -> ModelEmaV3:
    return ModelEmaV3(model.to(device), decay=decay, use_warmup=True)
