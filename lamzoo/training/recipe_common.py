"""Sections and checks common to the recipes of all tasks."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

import torch
from timm.optim import list_optimizers

from lamzoo.errors import ConfigError, RecipeError
from lamzoo.lam import LamConfig
from lamzoo.records import Limits
from lamzoo.reduction.config import Method, Rest, Score, TokenReduction, Training
from lamzoo.registry.catalog import find_spec, model_ref
from lamzoo.training.config_reader import without_none

Precision = Literal["no", "bf16", "fp16"]
#: timm's optimisers whose states have the shapes of the parameters, and which FSDP2 shards like those.
SHARDED_OPTIMIZERS = ("adam", "adamw", "lion", "momentum", "nadam", "nadamw", "radam", "rmsprop", "sgd")
SCHEDULES = ("cosine", "tanh", "poly", "wsd", "rsqrt", "constant")
Keep = Literal["best", "last"]

Count: TypeAlias = Annotated[int, Limits(least=1)]
CountOrZero: TypeAlias = Annotated[int, Limits(least=0)]
Seed: TypeAlias = Annotated[int, Limits(least=0, most=2**32 - 1)]  # NumPy's limit
Workers: TypeAlias = Annotated[int, Limits(least=0, most=1024)]
Positive: TypeAlias = Annotated[float, Limits(above=0)]
PositiveOrZero: TypeAlias = Annotated[float, Limits(least=0)]
Probability: TypeAlias = Annotated[float, Limits(least=0, most=1)]
Fraction: TypeAlias = Annotated[float, Limits(above=0, below=1)]
Smoothing: TypeAlias = Annotated[float, Limits(least=0, below=1)]


@dataclass(frozen=True)
class OptimizerSection:
    """``[optimizer]``: arguments of ``timm.optim.create_optimizer_v2``; ``kwargs`` go to the optimiser itself.

    Attributes:
        lam_lr: learning rate of the masks; None for that of their layers.
    """

    name: str = "adamw"
    lr: Positive = 1e-3
    weight_decay: PositiveOrZero = 0.05
    layer_decay: Annotated[float, Limits(above=0, most=1)] | None = None
    clip_grad: Positive | None = None
    lam_lr: Positive | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ScheduleSection:
    """``[schedule]``: arguments of ``timm.scheduler.create_scheduler_v2``, stepped each update; lengths in epochs.

    As in timm's training script, ``cooldown_epochs`` at ``min_lr`` follow the ``epochs``.
    """

    name: str = "cosine"
    epochs: Count = 100
    warmup_epochs: PositiveOrZero = 5
    warmup_lr: PositiveOrZero = 1e-6
    min_lr: PositiveOrZero = 0.0
    cooldown_epochs: CountOrZero = 0

    @property
    def total_epochs(self) -> int:
        """Total number of epochs, cooldown included."""
        return self.epochs + self.cooldown_epochs


@dataclass(frozen=True)
class RunSection:
    """``[run]``: output, batches, precision, checkpoints and evaluation.

    Attributes:
        output: folder for checkpoints, logs and the trained model.
        batch_size: inputs per optimiser update, over all processes and accumulation steps.
        accumulation: forward passes per update.
        seed: seed of initialisation, data order, augmentation, dropout and mixup.
        precision: autocast precision in Accelerate's notation, for training and for scoring images and videos. Moments
            and captions are scored in float32, the default of ``lamzoo eval``.
        device: ``"auto"`` uses the GPU if available.
        ema_decay: decay of ``timm.utils.ModelEmaV3`` with its warm-up; None for no averaging. If set, the averaged
            weights are evaluated and saved.
        grad_checkpointing: recompute activations in the backward pass to save memory.
        checkpoint_interval: updates between checkpoints within an epoch; None saves only at the end of each epoch.
        keep_checkpoints: number of latest checkpoints to keep.
        keep: the weights saved in ``model/``: ``"best"``, by the watched metric on the validation split, with those of
            the last epoch in ``last/``; or ``"last"``. If the watched split is a test split, the last ones are saved.
        eval_interval: epochs between evaluations; the last epoch is always evaluated.
        tensorboard: write TensorBoard logs in addition to the CSV file.
        report: write ``report/`` at the end: scores by class, confusion matrix, curves and masks.
        fsdp: shard weights, gradients and optimiser over the processes (FSDP2), to save memory; without effect in one
            process. Scores are computed with the whole weights, and checkpoints are those of any number of processes.
    """

    output: str
    batch_size: Count = 128
    accumulation: Count = 1
    seed: Seed = 0
    precision: Precision = "no"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    ema_decay: Fraction | None = None
    grad_checkpointing: bool = False
    checkpoint_interval: Count | None = None
    keep_checkpoints: Count = 2
    keep: Keep = "best"
    eval_interval: Count = 1
    tensorboard: bool = False
    report: bool = True
    fsdp: bool = False


@dataclass(frozen=True)
class ModelSectionBase:
    """``[model]`` of most tasks: arguments of :func:`lamzoo.create_model`.

    Attributes:
        name: a registered name, ``local-dir:`` or ``hf-hub:``.
        pretrained: start from the published weights.
        lam: fields of a :class:`lamzoo.LamConfig` that replaces the registered one; true for the registered one or, if
            there is none, the default; false for a plain model.
        kwargs: further arguments of ``create_model``.
    """

    name: str
    pretrained: bool = False
    lam: dict[str, Any] | bool | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """Returns ``kwargs``, with ``lam`` if it is given."""
        return {**self.kwargs, **({} if self.lam is None else {"lam": self.lam})}


@dataclass(frozen=True)
class DataSectionBase:
    """``[data]`` of most tasks.

    Attributes:
        source: specification of the data set.
        train_split: the training split.
        eval_split: the split scored during the run.
        test_split: the split scored once at the end; None for none.
        workers: worker processes per training process; 0 reads inputs in the main process.
        scan: read the inputs of these splits once before the first epoch, to report missing ones early.
    """

    source: str
    train_split: str = "train"
    eval_split: str = "validation"
    test_split: str | None = None
    workers: Workers = 0
    scan: bool = True


@dataclass(frozen=True)
class PruneSection:
    """``[prune]``: ``[reduction]`` with ``method = "prune"``, under its earlier name.

    Attributes:
        keep: share of a layer's tokens to keep; 0.7 if neither this nor ``target_gmacs`` is given.
        target_gmacs: GMACs per image to reach instead.
        at: layers after which tokens are pruned.
        score: criterion by which tokens are selected.
        rest: treatment of pruned tokens, in evaluation and with ``training = "top-k"``.
        training: ``"straight-through"`` or ``"top-k"``; see :class:`lamzoo.PruneConfig`.
        loss_weight: weight of :func:`lamzoo.pruning_loss`, with ``"straight-through"``.
    """

    keep: float | None = None
    target_gmacs: Positive | None = None
    at: list[int] | None = None
    score: Score = "mask"
    rest: Rest = "drop"
    training: Training = "straight-through"
    loss_weight: PositiveOrZero = 2.0


@dataclass(frozen=True)
class ReductionSection(PruneSection):
    """``[reduction]``: token reduction with :func:`lamzoo.merge_tokens` or :func:`lamzoo.prune_tokens`.

    Attributes:
        method: ``"merge"`` or ``"prune"``.
        keep: share of the patches to keep: after the last layer with ``"merge"``, of a layer's own with ``"prune"``.
            Merging needs one of ``keep``, ``target_gmacs`` and ``r``, or ``frames`` alone; pruning keeps 0.7 by
            default.
        r: for merging, the number of patches that merge in each layer.
        frames: for merging in text-video retrieval, the share of a video's frames that is left.
        at: layers in which tokens merge, or after which they are pruned.
        score: for pruning, criterion by which tokens are selected.
        rest: for pruning, treatment of pruned tokens, in evaluation and with ``training = "top-k"``.
        training: for pruning, ``"straight-through"`` or ``"top-k"``; merging is the same in training and evaluation.
        loss_weight: for pruning, weight of :func:`lamzoo.pruning_loss`, with ``"straight-through"``.
    """

    method: Method = "merge"
    r: CountOrZero | None = None
    frames: float = 1.0

    def check(self, *, merges_only: bool = False) -> None:
        """Raises a RecipeError for settings that contradict each other or the method, or a task that merges only."""
        try:
            keep, at = 1.0 if self.keep is None else self.keep, None if self.at is None else tuple(self.at)
            TokenReduction(keep, self.method, at, self.score, self.rest, self.training, self.frames)
        except ConfigError as error:
            raise RecipeError(f"Recipe section [reduction]: {error}") from None
        if self.method == "prune":
            if merges_only:
                raise RecipeError(
                    "Recipe key reduction.method is 'prune', which only classifiers are trained with; leave it out to "
                    "merge tokens."
                )
            if self.r is not None:
                raise RecipeError(
                    f"Recipe key reduction.r is {self.r}, a setting of merging; set keep or target_gmacs instead."
                )
            return
        if self.loss_weight != ReductionSection.loss_weight:
            raise RecipeError(
                f"Recipe key reduction.loss_weight is {self.loss_weight}, a setting of pruning; leave it out, or set "
                "method = 'prune'."
            )
        given = [key for key in ("keep", "target_gmacs", "r") if getattr(self, key) is not None]
        if len(given) != 1 and not (self.frames != 1 and not given):
            raise RecipeError(
                "Recipe section [reduction] needs one of keep, target_gmacs and r for merging, and has "
                f"{' and '.join(given) or 'none of them'}."
            )


class TaskRecipe:
    """Base of the recipes of all tasks; each task defines a frozen dataclass with these fields and its own.

    Attributes:
        model: ``[model]``; it has at least ``name``, ``pretrained``, ``lam`` and ``kwargs``.
        data: ``[data]``; it has at least ``source``, ``train_split``, ``eval_split``, ``test_split`` and ``workers``.
        run: ``[run]``.
        task: name of the task.
        augment: ``[augment]``.
        optimizer: ``[optimizer]``.
        schedule: ``[schedule]``.
    """

    model: Any
    data: Any
    run: RunSection
    task: str
    augment: Any
    optimizer: OptimizerSection
    schedule: ScheduleSection

    def to_dict(self) -> dict[str, Any]:
        """Returns the recipe as nested plain values, without None fields."""
        return without_none(dataclasses.asdict(self))  # type: ignore[call-overload]  # each subclass is a dataclass

    def check(self) -> None:
        """Validates the task-specific sections.

        Raises:
            RecipeError: an invalid value; names its key.
        """


def check_crops(scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    """Raises a RecipeError for ranges of random crops that are empty, or larger than the image."""
    if not scale[0] <= scale[1] <= 1:
        raise RecipeError(f"Recipe key augment.scale is {scale}; it must be increasing and lie between 0 and 1.")
    if not ratio[0] <= ratio[1]:
        raise RecipeError(f"Recipe key augment.ratio is {ratio}; it must be increasing.")


def check_common(recipe: TaskRecipe) -> None:
    """Validates the common sections, and the model's name and mask configuration.

    Raises:
        RecipeError: an invalid value; names its key.
        UnknownModelError: the model is unknown.
        ConfigError: the mask configuration is invalid.
    """
    run, optimizer, schedule = recipe.run, recipe.optimizer, recipe.schedule
    name, lam = recipe.model.name, recipe.model.lam
    if schedule.cooldown_epochs and schedule.name == "constant":
        raise RecipeError(
            "Recipe key schedule.cooldown_epochs adds epochs at min_lr, which schedule.name 'constant' never reaches; "
            "leave it out and raise schedule.epochs."
        )
    if run.batch_size % run.accumulation:
        raise RecipeError(
            f"Recipe key run.batch_size is {run.batch_size}, not a multiple of run.accumulation ({run.accumulation})."
        )
    if not recipe.data.source:  # as a path, it would be the current folder
        raise RecipeError("Recipe key data.source is empty; name the data.")
    _check_name("optimizer.name", optimizer.name, [str(name) for name in list_optimizers()])
    _check_name("schedule.name", schedule.name, SCHEDULES)
    if isinstance(lam, dict):
        LamConfig.from_dict(lam)
    ref = model_ref(name)
    if not ref.is_saved:
        find_spec(ref)
    if run.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("Recipe key run.device is 'cuda', but no GPU is available; use 'auto' or 'cpu'.")
    if run.precision == "fp16" and (run.device == "cpu" or not torch.cuda.is_available()):
        raise RecipeError("Recipe key run.precision is 'fp16', which needs a GPU; use 'bf16' or 'no' on a CPU.")
    if run.fsdp and run.precision == "fp16":
        raise RecipeError("Recipe key run.fsdp does not go with run.precision 'fp16'; use 'bf16' or 'no'.")
    if run.fsdp and optimizer.name not in SHARDED_OPTIMIZERS:
        raise RecipeError(
            f"Recipe key optimizer.name is {optimizer.name!r}, whose state run.fsdp can't shard; use one of "
            f"{', '.join(SHARDED_OPTIMIZERS)}."
        )


def _check_name(key: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3) or known
        raise RecipeError(f"Recipe key {key} is {name!r}, which is unknown; did you mean {', '.join(close)}?")
