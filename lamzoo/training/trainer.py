"""Training runs of any task: updates, checkpoints, logs, averaged weights, evaluation."""

from __future__ import annotations

import logging
import math
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import skip_first_batches
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lamzoo.data.fingerprint import write_fingerprints
from lamzoo.data.splits import synonyms
from lamzoo.data.trained import BAD_INPUTS_NAME, MODEL_FOLDERS
from lamzoo.errors import DivergedError, LamzooError, RecipeError
from lamzoo.lam import LamConfig
from lamzoo.registry.catalog import model_ref
from lamzoo.registry.refs import ModelRef
from lamzoo.registry.saving import save_pretrained
from lamzoo.tasks import find_task
from lamzoo.training.build import build_accelerator, build_ema, build_optimizer, build_scheduler
from lamzoo.training.checkpoints import Checkpoints, TrainedParts, on_main_process
from lamzoo.training.gradients import share_statistics
from lamzoo.training.loaders import seed_everything
from lamzoo.training.progress import Progress, TrainResult
from lamzoo.training.recipe import AnyRecipe
from lamzoo.training.score_report import write_score_report
from lamzoo.training.sharding import clip_gradients, gather_into, mixes_sharded, shard
from lamzoo.training.splits import BadInputs, ScanProgress, check_fingerprints, keep_held_out, write_bad_inputs
from lamzoo.weights.files import file_sha256, read_state_dict
from lamzoo.weights.saved import read_saved
from lamzoo.weights.sources import WeightsFile

_logger = logging.getLogger(__name__)

_FETCH_LOSS = 0.5  # seconds between two reads of the loss, each of which waits for the GPU


class TrainingRun(ABC):
    """State and loop of a run; each task's subclass defines data, model, loss and scores.

    Args:
        recipe: the recipe.
        resume: continue from the latest checkpoint, if any.
        progress: called on the main process after each update.
        scanning: called on the main process during the search for invalid inputs.

    Attributes:
        task: the recipe's task.
        metric: the watched metric.
        scores: scores of the validation split in the latest evaluation; None before the first one.
    """

    scoring_precision: ClassVar[str | None] = None  # of scoring, if it differs from training
    scores: Any = None
    videos_held_out: Collection[str] = ()  # names of the videos held out for validation
    masks: Path | None = None  # folder of the masks without their base

    def __init__(
        self,
        recipe: AnyRecipe,
        resume: bool,
        progress: Callable[[Progress], None] | None,
        scanning: ScanProgress | None,
    ) -> None:
        self.started = time.perf_counter()
        self.recipe = recipe
        self.resume = resume
        self.task = find_task(recipe.task)
        self.progress = progress
        self.checkpoints = Checkpoints(Path(recipe.run.output), recipe, resume)
        self.open_data()
        self.metric = self.task.watched_metric(self.datasets()["train"])
        self.accelerator = build_accelerator(recipe.run)
        self.fingerprints = check_fingerprints(self.checkpoints.output, self.datasets(), self.accelerator)
        seed_everything(recipe.run.seed)
        model = self.build_model()
        self.bad: BadInputs = self.scan_data(scanning)
        self._build(model)
        self.update = 0
        self.saved: int | None = None  # update of the latest checkpoint
        self.loss_sum: Tensor = self._loss_sum(0.0)
        self.fetched = (0.0, 0.0)  # time of the last read, and the epoch's mean loss
        self.seconds = self.wall_seconds = 0.0
        self.history: list[dict[str, float]] = []
        self.lam: LamConfig | None = getattr(model, "lam_config", None)
        self.best: dict[str, Any] | None = None  # epoch, from 0, score and sha256 of the weights in model/
        external = model_ref(recipe.model.name).kind in ("timm", "open_clip")
        if recipe.model.lam is None and self.lam is None and external and self.accelerator.is_main_process:
            _logger.warning("%s has no masks to train; add the default ones with model.lam=true", recipe.model.name)

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Locks the run's folder, writes the records to it, loads the latest checkpoint if any, and writes the recipe.

        Called on every process; the lock is held until the end of the context.

        Raises:
            RecipeError: another process trains in the folder, it can't be written to, or its run can't be resumed.
        """
        with ExitStack() as stack:

            def prepare() -> None:
                stack.enter_context(self.checkpoints.lock())
                self.write_records()

            self.accelerator.wait_for_everyone()  # until all have looked for a run in the folder
            on_main_process(self.accelerator, prepare)
            if self.recipe.run.tensorboard:
                self._begin_tensorboard()
            self._load()
            on_main_process(self.accelerator, self.checkpoints.write_recipe)  # before any checkpoint
            self._log_plan()
            yield

    def _begin_tensorboard(self) -> None:
        try:
            self.accelerator.init_trackers("tensorboard")
        except OSError as error:
            raise RecipeError(
                f"The TensorBoard log in {self.recipe.run.output} can't be written ({error.strerror}); choose another "
                "folder, or run.tensorboard=false."
            ) from None

    def _load(self) -> None:
        recipe = self.recipe
        state = self.checkpoints.load(self.accelerator, self._parts(), self.lam)
        if self.resume and state is None and self.accelerator.is_main_process:
            _logger.info("%s has no checkpoint to resume; the run starts at its beginning", recipe.run.output)
        if state is not None:
            self.update = self.saved = state["update"]
            self.loss_sum = self._loss_sum(state["loss_sum"])
            self.seconds, self.history = state["seconds"], state["history"]
            self.wall_seconds = state.get("wall_seconds", state["seconds"])
            self.best = on_main_process(self.accelerator, partial(self._still_best, state.get("best")))
            self._gather_weights()
        if len(self.history) > recipe.schedule.total_epochs:
            raise RecipeError(
                f"[schedule] has {recipe.schedule.total_epochs} epochs, but the run in {recipe.run.output} already has "
                f"{len(self.history)}; raise schedule.epochs, or choose another folder."
            )
        self.first_epoch = len(self.history)  # one record per epoch, added after its evaluation

    @abstractmethod
    def open_data(self) -> None:
        """Opens the splits without reading inputs, so that a wrong name is reported before anything is built."""

    @abstractmethod
    def datasets(self) -> Mapping[str, Any]:
        """Returns the opened splits by role: ``train``, ``validation`` and optionally ``test``."""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Returns the model on the CPU in training mode; random states are seeded with ``run.seed`` before."""

    @abstractmethod
    def train_loader(self, model: nn.Module) -> DataLoader[Any]:
        """Returns a loader of batches of ``run.batch_size / run.accumulation``; ``dataset.epoch`` is set each epoch."""

    @abstractmethod
    def backward(self, epoch: int, update: int, batches: list[Any]) -> Tensor:
        """Computes the gradients of one update; returns the loss of the global batch, a scalar.

        Args:
            epoch: current epoch, from 0.
            update: update within the epoch, from 0; random states depend on it, the epoch and the process.
            batches: ``run.accumulation`` batches on the device.
        """

    @abstractmethod
    def score(self, role: str) -> Any:
        """Scores :attr:`evaluated_model` on a split, ``"validation"`` or ``"test"``; called on every process.

        Returns:
            The scores that the paths of the task's metrics refer to.
        """

    def scan_data(self, progress: ScanProgress | None) -> BadInputs:
        """Searches the splits for unreadable inputs, according to the recipe, and returns those left out."""
        return ()

    def eval_loaders(self, model: nn.Module) -> list[DataLoader[Any]]:
        """Returns the loaders used by :meth:`score`, to be prepared by the accelerator."""
        return []

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Returns the optimiser over the trainable parameters."""
        return build_optimizer(self.recipe.optimizer, model)

    def prepare_model(self, model: nn.Module) -> Any:
        """Returns the model on its device, wrapped for several processes if the task needs it."""
        return self.accelerator.prepare(model)

    def evaluate(self) -> dict[str, float]:
        """Scores :attr:`evaluated_model` on the validation split; returns columns for ``metrics.csv``."""
        self.scores = self.score("validation")
        found = {f"eval_{metric.name}": metric.of(self.scores) for metric in self.task.metrics}
        return {column: value for column, value in found.items() if value is not None}

    def write_report(self, folder: Path, scores: Mapping[str, Any], command: str | None) -> None:
        """Writes ``report.md`` and its companion files into a folder; called on the main process.

        Args:
            folder: output folder; created if needed.
            scores: scores of the trained model by split.
            command: the command line; None if called from Python.
        """
        facts = self.facts(command) | {f"training_{self.task.items}": len(self.datasets()["train"])}
        write_score_report(folder, facts, scores, self.task, self.metric, self.history, self.about_weights())

    def finish(self, command: str | None) -> TrainResult:
        """Saves the trained model, scores it, writes the report and returns the result."""
        folder, splits = self.keep_model(), self.datasets()
        if self.scores is None:  # the run was complete before it was resumed
            self.evaluate()
        scores = {splits["validation"].split or "validation": self.scores}
        if "test" in splits:
            scores[splits["test"].split or "test"] = self.score("test")
        report = None
        if self.recipe.run.report:
            report = self.checkpoints.output / "report" / "report.md"
            on_main_process(self.accelerator, partial(self.write_report, report.parent, scores, command))
        return self._result(folder, scores, report)

    def write_records(self) -> None:
        """Writes the decisions about the data to the run's folder; called once on the main process."""
        keep_held_out(self.checkpoints.output, self.videos_held_out)
        write_fingerprints(self.checkpoints.output, self.fingerprints)
        if self.bad:
            path = self.checkpoints.output / BAD_INPUTS_NAME
            write_bad_inputs(path, self.bad)
            _logger.warning("left out %d unreadable inputs; %s lists them", len(self.bad), path)

    def train_mode(self) -> None:
        """Sets the modules that the task trains to training mode."""
        self.model.train()

    def held_out(self) -> str:
        """Describes how validation data was held out of the training data; empty if it was not."""
        count = len(self.videos_held_out)
        return f" (held out: {_counted(count, 'video')}, by seed {self.recipe.run.seed})" if count else ""

    def class_names(self) -> list[str] | None:
        """Returns the class names to save with the model; None for other tasks."""
        return None

    def after_update(self) -> None:  # noqa: B027 - a hook, which most tasks don't need
        """Hook called after each optimiser step."""

    def epoch(self, epoch: int) -> None:
        """Trains one epoch from the current update on, and evaluates it if due."""
        self.seeded.epoch = epoch
        done = self.update - epoch * self.updates_per_epoch
        accumulation, interval = self.recipe.run.accumulation, self.recipe.run.checkpoint_interval
        loader = skip_first_batches(self.loader, done * accumulation) if done else self.loader
        self.train_mode()
        if self.whole is not None:
            self.whole.cpu()  # the training needs the memory
        left = done < self.updates_per_epoch  # False if the run was stopped in the epoch's evaluation
        for batches in _grouped(loader, accumulation) if left else ():
            started = time.perf_counter()
            loss = self._step(epoch, self.update - epoch * self.updates_per_epoch, batches)
            self.loss_sum += loss.to(self.loss_sum.dtype)
            self.seconds += time.perf_counter() - started
            self.update += 1
            self._report_progress(epoch)
            if interval and self.update % interval == 0 and self.update % self.updates_per_epoch:
                self._save()
        self._end_epoch(epoch)

    def keep_model(self) -> Path:
        """Saves the weights that the recipe keeps in ``model/``, loads them, and returns the folder.

        If they are not the last epoch's, those are saved in ``last/``, and the model is evaluated again.
        """
        folder, last = (self.checkpoints.output / name for name in MODEL_FOLDERS)
        if self.kept_epoch == len(self.history):
            if self.accelerator.is_main_process:
                shutil.rmtree(last, ignore_errors=True)  # left by a shorter run
            if self.best is not None and self._why_last():
                self.best = None  # model/ is overwritten; a later resumption may select the best again
                self.checkpoints.amend(self.accelerator, self._state())
            self._save_model(folder)
            return folder
        self._save_model(last)
        weights = self._best_weights()
        self.evaluated_model.load_state_dict(read_state_dict(weights.path, sha256=weights.sha256))
        self.evaluate()
        return folder

    @property
    def kept_epoch(self) -> int:
        """The epoch whose weights are kept, from 1."""
        return len(self.history) if self.best is None or self._why_last() else int(self.best["epoch"]) + 1

    def about_weights(self) -> str:
        """Returns a sentence on which epoch's weights are kept, and why."""
        epochs, why = len(self.history), self._why_last()
        if why or self.best is None:
            return f"The weights are those of the last epoch, not of the best{why and f': {why}'}."
        split = self.datasets()["validation"].split or "validation"
        chosen = f"the best by {self.metric.name} on {split} ({self.best['value']:.2f})"
        better = [int(record["epoch"]) + 1 for record in self.history if self._gain(record) > 0]
        if better:  # trained while run.keep was "last", or by a version without best weights
            chosen += f" of the epochs whose weights could be kept (epoch {better[-1]} scored better)"
        if self.kept_epoch == epochs:
            return f"The weights are those of the last epoch, which is {chosen}."
        return f"The weights are those of epoch {self.kept_epoch} of {epochs}, {chosen}; the last epoch's are in last/."

    @property
    def evaluated_model(self) -> Any:
        """The averaged weights if enabled, else the model itself; under FSDP, a whole copy of these."""
        model = self.accelerator.unwrap_model(self.model) if self.ema is None else self.ema.module
        return model if self.whole is None else self.whole

    def _gather_weights(self) -> None:
        """Under FSDP, copies the current weights into :attr:`evaluated_model`; called on every process."""
        if self.whole is not None:
            trained = self.model if self.ema is None else self.ema.module
            gather_into(self.whole.to(self.accelerator.device), trained)

    def wall(self) -> float:
        """Seconds since the run began, without interruptions."""
        return self.wall_seconds + time.perf_counter() - self.started

    def facts(self, command: str | None) -> dict[str, Any]:
        """Returns the facts common to the reports of all tasks, as plain values."""
        recipe, model = self.recipe, self.accelerator.unwrap_model(self.model)
        lam = getattr(model, "lam_config", None)
        return {
            "model": recipe.model.name,
            "weights": model.weights_source,
            "masks": None if lam is None else str(lam),
            "data": recipe.data.source,
            "left_out": len(self.bad),
            "parameters": sum(p.numel() for p in model.parameters()),
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "epochs": recipe.schedule.total_epochs,
            "epoch_kept": self.kept_epoch,
            "batch_size": recipe.run.batch_size,
            "lr": recipe.optimizer.lr,
            "seed": recipe.run.seed,
            "precision": recipe.run.precision,
            "scoring_precision": self.scoring_precision or recipe.run.precision,
            "train_seconds": round(self.seconds, 1),
            "wall_seconds": round(self.wall(), 1),
            "device": str(self.accelerator.device),
            "processes": self.accelerator.num_processes,
            "command": command,
        }

    def _result(self, model: Path, scores: dict[str, Any], report: Path | None) -> TrainResult:
        """Finishes the run: waits for the other processes, closes the logs, and returns the result."""
        self.accelerator.wait_for_everyone()
        for tracker in self.accelerator.trackers:  # end_training would also disconnect the processes
            tracker.finish()
        about = self.about_weights()
        return TrainResult(
            self.checkpoints.output, model, self.history, scores, report, len(self.bad), self.kept_epoch, about,
            self.masks,
        )  # fmt: skip

    def _log_plan(self) -> None:
        """Logs the settings of the run before the first update."""
        if not self.accelerator.is_main_process:
            return
        recipe, run = self.recipe, self.recipe.run
        uses = {"train": f"{self.task.items} to train on", "validation": "to validate on", "test": "to test on"}
        counts = ", ".join(f"{len(split):,} {uses[role]}" for role, split in self.datasets().items())
        _logger.info("%s on %s: %s%s", recipe.model.name, recipe.data.source, counts, self.held_out())
        parts = f" in {run.accumulation} parts" if run.accumulation > 1 else ""
        _logger.info(
            "%s of %s, batches of %d%s; %s, learning rate %.3g, %s schedule; seed %d",
            _counted(recipe.schedule.total_epochs, "epoch"), _counted(self.updates_per_epoch, "update"),
            run.batch_size, parts, recipe.optimizer.name, recipe.optimizer.lr, recipe.schedule.name, run.seed,
        )  # fmt: skip
        parameters = list(self.accelerator.unwrap_model(self.model).parameters())
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        _logger.info(
            "%s of %s parameters trained, on %s in %d process(es), precision %s; output folder %s",
            f"{trained:,}", f"{sum(parameter.numel() for parameter in parameters):,}", self.accelerator.device,
            self.accelerator.num_processes, run.precision, run.output,
        )  # fmt: skip
        if self.update:
            whole = _counted(len(self.history), "epoch")
            _logger.info("continued after %s, %s of them whole", _counted(self.update, "update"), whole)

    def _log_epoch(self, record: Mapping[str, float], best: bool) -> None:
        if not self.accelerator.is_main_process:
            return
        scores = ", ".join(f"{name} {value:.4g}" for name, value in _scores(record).items())
        _logger.info(
            "epoch %d of %d: training loss %.4g%s%s; learning rate %.3g, %.0f s",
            record["epoch"] + 1, self.recipe.schedule.total_epochs, record["train_loss"],
            f"; {self.datasets()['validation'].split or 'validation'}: {scores}" if scores else "",
            " (the best so far)" if best else "", record["lr"], self.wall(),
        )  # fmt: skip

    def _why_last(self) -> str:
        """Returns the reason for keeping the last weights; empty if the best ones are kept."""
        if self.recipe.run.keep == "last":
            return 'run.keep is "last"'
        splits = self.datasets()
        watched, test = splits["validation"].split, splits.get("test")
        if "test" in synonyms(watched or "") or (test is not None and test.split == watched):
            return f"{watched} was watched, and weights are not selected on a test split"
        return ""

    def _save_model(self, folder: Path) -> None:
        save = partial(save_pretrained, self.evaluated_model, folder, label_names=self.class_names())
        on_main_process(self.accelerator, save)

    def _keep_if_best(self, record: Mapping[str, float]) -> bool:
        """Saves ``model/`` if the best weights are kept and this score is the best so far; returns whether it did."""
        if self._why_last():
            return False
        value = record.get(f"eval_{self.metric.name}", math.nan)
        better = math.isfinite(value) and (self.best is None or self._gain(record) >= 0)  # the later one of equals
        # One process decides: the last digits of a score may differ, and all processes must agree on saving.
        better, value = broadcast_object_list([better, value])
        if not better:
            return False
        self._save_model(self.checkpoints.output / MODEL_FOLDERS[0])
        # save_pretrained has recorded it, so the file isn't read again.
        sha256 = on_main_process(self.accelerator, lambda: self._best_weights().sha256)
        self.best = {"epoch": record["epoch"], "value": value, "sha256": sha256}
        return True

    def _best_weights(self) -> WeightsFile:
        folder = self.checkpoints.output / MODEL_FOLDERS[0]
        weights = read_saved(ModelRef.of_folder(folder), with_weights=True).weights
        assert weights is not None  # requested by with_weights
        return weights

    def _still_best(self, best: dict[str, Any] | None) -> dict[str, Any] | None:
        """Returns the record of the best weights, or None if ``model/`` holds others or is damaged."""
        if best is None or best.get("sha256") is None:  # 0.1.0 recorded no hash
            return best
        try:
            if file_sha256(self._best_weights().path) == best["sha256"]:
                return best
            reason = "it was written later, or damaged"
        except (LamzooError, OSError) as error:
            reason = str(error)
        _logger.warning(
            "%s does not hold the best weights, of epoch %d (%s); they are selected from the following epochs",
            self.checkpoints.output / MODEL_FOLDERS[0], best["epoch"] + 1, reason,
        )  # fmt: skip
        return None

    def _gain(self, record: Mapping[str, float]) -> float:
        """Returns the improvement of a record's score over the best; 0 without a score."""
        assert self.best is not None
        gain = record.get(f"eval_{self.metric.name}", math.nan) - self.best["value"]
        return 0.0 if not math.isfinite(gain) else gain if self.metric.higher_is_better else -gain

    def _build(self, model: nn.Module) -> None:
        recipe = self.recipe
        loader = self.train_loader(model)
        eval_loaders = self.eval_loaders(model)
        self.seeded: Any = loader.dataset
        sharded = recipe.run.fsdp and self.accelerator.num_processes > 1
        self.whole: Any = deepcopy(model) if sharded else None  # which is scored and saved
        self.ema = build_ema(recipe.run, model, self.accelerator.device)
        if sharded:
            shard(self.accelerator, model)  # before the optimiser, which holds the parameters
            if self.ema is not None:
                self.ema.foreach = not mixes_sharded(shard(self.accelerator, self.ema.module))
        optimizer = self.build_optimizer(model)
        self.updates_per_epoch = len(loader) // recipe.run.accumulation
        self.scheduler = build_scheduler(recipe.schedule, optimizer, self.updates_per_epoch)
        self.model: Any = self.prepare_model(model) if self.whole is None else model
        self.optimizer, self.loader, *rest = self.accelerator.prepare(optimizer, loader, *eval_loaders)
        self.prepared_eval_loaders: list[Any] = rest

    def _step(self, epoch: int, update: int, batches: list[Any]) -> Tensor:
        # Checkpoints hold no random states; most tasks seed each pass again.
        seed_everything(self.recipe.run.seed, epoch, update, self.accelerator.process_index, 3)
        loss = self.backward(epoch, update, batches)
        clip = self.recipe.optimizer.clip_grad
        if clip is not None:
            clip_gradients(self.accelerator, self.model, clip)
        self.scheduler.step_update(self.update)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.after_update()
        if self.ema is not None:
            self.ema.update(self.accelerator.unwrap_model(self.model), step=self.update + 1)
        return loss

    def _end_epoch(self, epoch: int) -> None:
        recipe = self.recipe
        share_statistics(self.accelerator, self.model, self.ema and self.ema.module)
        waited = time.perf_counter()
        loss = self._total_loss() / self.updates_per_epoch  # waits for the GPU
        self.seconds += time.perf_counter() - waited
        record = {
            "epoch": epoch,
            "update": self.update,
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            "train_loss": loss,
            "train_seconds": round(self.seconds, 1),
        }
        last = epoch + 1 == recipe.schedule.total_epochs
        evaluates, best = last or (epoch + 1) % recipe.run.eval_interval == 0, False
        if evaluates:
            self._save()  # before the evaluation, which may fail
            self._gather_weights()
            record |= self.evaluate()
            best = self._keep_if_best(record)
        self._log_epoch(record, best)
        self.history.append(record)
        self.loss_sum = self._loss_sum(0.0)
        on_main_process(self.accelerator, partial(self.checkpoints.write_metrics, self.history))
        if recipe.run.tensorboard:
            self.accelerator.log({k: v for k, v in record.items() if k not in ("epoch", "update")}, step=self.update)
        if evaluates:
            self.checkpoints.amend(self.accelerator, self._state())
        else:
            self._save()
        self._report_progress(epoch, loss)

    def _total_loss(self) -> float:
        total = float(self.loss_sum)
        if not math.isfinite(total):
            raise DivergedError(
                f"The training diverged: its loss is {total} at update {self.update}; these weights are not saved. "
                f"{DivergedError.way_out}"
            )
        return total

    def _save(self) -> None:
        if self.saved == self.update:  # the run was stopped after this checkpoint
            self.checkpoints.amend(self.accelerator, self._state())
        else:
            self.checkpoints.save(self.accelerator, self._parts(), self._state())
            self.saved = self.update

    def _parts(self) -> TrainedParts:
        model, ema = self.accelerator.unwrap_model(self.model), self.ema
        return TrainedParts(model, self.optimizer, None if ema is None else ema.module, self.accelerator.scaler)

    def _state(self) -> dict[str, Any]:
        state = {"update": self.update, "loss_sum": self._total_loss(), "seconds": self.seconds}
        lam = None if self.lam is None else self.lam.to_dict()
        history = {"history": self.history, "best": self.best}
        return {**state, "wall_seconds": self.wall(), "lam_config": lam, **history}

    def _loss_sum(self, value: float) -> Tensor:
        device = self.accelerator.device
        return torch.tensor(value, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)

    def _report_progress(self, epoch: int, loss: float | None = None) -> None:
        if self.progress is None or not self.accelerator.is_main_process:
            return
        if loss is None and (now := time.perf_counter()) - self.fetched[0] > _FETCH_LOSS:
            loss = float(self.loss_sum) / max(1, self.update - epoch * self.updates_per_epoch)
            self.fetched = now, loss
        epochs = self.recipe.schedule.total_epochs
        scores = next((found for record in reversed(self.history) if (found := _scores(record))), {})
        self.progress(
            Progress(
                epoch=epoch,
                epochs=epochs,
                update=self.update,
                updates=epochs * self.updates_per_epoch,
                loss=self.fetched[1] if loss is None else loss,
                metric=self.metric.name,
                value=scores.get(self.metric.name),
                scores=scores,
            )
        )


def _scores(record: Mapping[str, float]) -> dict[str, float]:
    return {key.removeprefix("eval_"): value for key, value in record.items() if key.startswith("eval_")}


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _grouped(loader: Any, size: int) -> Iterator[list[Any]]:
    """Groups batches by update; the last incomplete group is dropped."""
    batches = iter(loader)
    while len(group := list(islice(batches, size))) == size:
        yield group
