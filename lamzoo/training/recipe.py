"""A training recipe: what a TOML file may say, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from timm.optim import list_optimizers

from lamzoo.data import OnBadInput
from lamzoo.errors import RecipeError
from lamzoo.lam import LamConfig
from lamzoo.names import find_card

Section = TypeVar("Section")
Precision = Literal["no", "bf16", "fp16"]
Tune = Literal["all", "lam", "head"]


@dataclass(frozen=True)
class ModelSection:
    """``[model]``: what :func:`lamzoo.create_model` gets.

    Attributes:
        name: a registered name, ``timm/<name>``, ``local-dir:`` or ``hf-hub:``.
        pretrained: start from the published weights.
        lam: fields of a :class:`lamzoo.LamConfig` in place of the registered one.
        kwargs: further arguments of ``create_model``; ``num_classes`` comes from the data where it is left out.
        fused_attention: whether timm's own attention may use the fused kernel. On CPUs, bfloat16 training of short
            sequences is faster without it; both sides of a comparison should say the same.
        tune: what is trained: ``"all"``, ``"lam"`` (the masks and the classifier) or ``"head"`` (the classifier alone).
            What is not trained computes as in evaluation, without dropout and with the norms' stored statistics.
    """

    name: str
    pretrained: bool = False
    lam: dict[str, Any] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    fused_attention: bool = True
    tune: Tune = "all"


@dataclass(frozen=True)
class DataSection:
    """``[data]``: the data set, as :func:`lamzoo.data.create_dataset` reads it.

    Attributes:
        source: the data set's specification.
        train_split: the images to train on.
        eval_split: the images to score on during the run.
        test_split: scored once, at the end, for the report; None for none.
        val_fraction: where the data has no ``eval_split``, this share of the training images, by class and drawn with
            ``run.seed``, takes its place; None makes that an error.
        workers: processes that read images, for each training process; 0 reads in that one.
        scan: read every image of all these splits once before the first epoch.
        on_bad_input: what a scan does with images that can't be read: ``"stop"``, or ``"skip"``, which leaves them out
            and lists them in ``bad-inputs.csv``.
    """

    source: str
    train_split: str = "train"
    eval_split: str = "validation"
    test_split: str | None = None
    val_fraction: float | None = None
    workers: int = 0
    scan: bool = True
    on_bad_input: OnBadInput = "stop"


@dataclass(frozen=True)
class AugmentSection:
    """``[augment]``: arguments of ``timm.data.create_transform`` and ``timm.data.Mixup``."""

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.4
    auto_augment: str | None = None
    interpolation: str = "bicubic"
    random_erasing: float = 0.0
    random_erasing_mode: Literal["const", "rand", "pixel"] = "const"
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class OptimizerSection:
    """``[optimizer]``: arguments of ``timm.optim.create_optimizer_v2``; ``kwargs`` goes to the optimiser itself."""

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    layer_decay: float | None = None
    clip_grad: float | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ScheduleSection:
    """``[schedule]``: arguments of ``timm.scheduler.create_scheduler_v2``, stepped every update; lengths in epochs."""

    name: str = "cosine"
    epochs: int = 100
    warmup_epochs: int = 5
    warmup_lr: float = 1e-6
    min_lr: float = 0.0
    cooldown_epochs: int = 0


@dataclass(frozen=True)
class RunSection:
    """``[run]``: where and how.

    Attributes:
        output: folder for checkpoints, logs and the trained model.
        batch_size: images of one optimiser update, over all processes and accumulation steps together.
        accumulation: forward passes of one update.
        seed: of the initialisation, the order of the images, every augmentation, dropout and mixup.
        precision: autocast, as Accelerate names it.
        device: ``"auto"`` takes the GPU where there is one.
        ema_decay: of ``timm.utils.ModelEmaV3`` with its warm-up; None for none. With it, the averaged weights are
            those that are evaluated and saved.
        grad_checkpointing: trade time for memory.
        checkpoint_interval: updates between checkpoints inside an epoch; None for one at the end of each epoch alone.
        keep_checkpoints: how many of the latest stay.
        eval_interval: epochs between evaluations; the last one is always evaluated.
        tensorboard: write TensorBoard logs beside the CSV.
        report: write ``report/`` at the end: scores by class, confusion matrix, curves and masks.
    """

    output: str
    batch_size: int = 128
    accumulation: int = 1
    seed: int = 0
    precision: Precision = "no"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    ema_decay: float | None = None
    grad_checkpointing: bool = False
    checkpoint_interval: int | None = None
    keep_checkpoints: int = 2
    eval_interval: int = 1
    tensorboard: bool = False
    report: bool = True


@dataclass(frozen=True)
class Recipe:
    """One training run of an image classifier; see the sections for what each table holds."""

    model: ModelSection
    data: DataSection
    run: RunSection
    augment: AugmentSection = AugmentSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()

    def to_dict(self) -> dict[str, Any]:
        """Returns the recipe as nested plain values, fields that are None left out."""
        return _without_none(dataclasses.asdict(self))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and checks everything that can be known without loading a model or data.

    Args:
        path: a TOML file, or the ``recipe.json`` that a run leaves.
        overrides: ``"section.key=value"``, the value in TOML notation; a bare word is a string.

    Raises:
        RecipeError: no such file, not TOML, an unknown key (named, with the closest one), a wrong type, an unknown
            optimiser or scheduler, or an impossible value.
        UnknownModelError: no such model.
        ConfigError: masks that mean nothing.
    """
    return parse_recipe(override(read_recipe(path), overrides))


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Returns a recipe file's nested values, not yet checked.

    Raises:
        RecipeError: no such file, or not TOML (or, for a ``.json``, not JSON).
    """
    path = Path(path)
    kind = "JSON" if path.suffix.lower() == ".json" else "TOML"
    try:
        text = path.read_text(encoding="utf-8")
        table = json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except OSError as error:
        raise RecipeError(f"Recipe {path} can't be read: {error.strerror}; give the path of a TOML file.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RecipeError(f"Recipe {path} is not valid {kind}: {error}.") from None
    if not isinstance(table, dict):
        raise RecipeError(f"Recipe {path} is not valid: it holds no table.")
    return table


def override(table: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Puts ``"section.key=value"`` entries into nested values, and returns them; see :func:`load_recipe`.

    Raises:
        RecipeError: an entry of another form, or one that reaches into a value.
    """
    for entry in overrides:
        _override(table, entry)
    return table


def put(table: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Puts values into nested values by keys such as ``"run.seed"``, and returns them; raises as :func:`override`."""
    for key, value in values.items():
        _put(table, key, value, key)
    return table


def parse_recipe(table: Mapping[str, Any]) -> Recipe:
    """Builds a recipe from nested plain values; raises as :func:`load_recipe`."""
    recipe = _build(Recipe, table, "")
    _check_values(recipe)
    return recipe


def _override(table: dict[str, Any], entry: str) -> None:
    keys, separator, text = entry.partition("=")
    if not separator or "." not in keys:
        raise RecipeError(f"Override {entry!r} is not of the form section.key=value, such as run.batch_size=256.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    _put(table, keys, value, entry)


def _put(table: dict[str, Any], keys: str, value: Any, what: str) -> None:
    *sections, key = keys.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise RecipeError(f"Override {what!r} reaches into {section!r}, which is a value and not a table.")
    table[key] = value


def _build(cls: type[Section], table: Any, where: str) -> Section:
    if not isinstance(table, Mapping):
        raise RecipeError(f"Recipe entry [{where}] must be a table, not {table!r}.")
    hints = get_type_hints(cls)
    dot = f"{where}." if where else ""
    for key in table:
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {dot}{close[0]}?" if close else f"known are {', '.join(hints)}."
            raise RecipeError(f"Recipe key {dot}{key} is unknown; {hint}")
    for entry in dataclasses.fields(cls):  # type: ignore[arg-type]
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and entry.name not in table:
            raise RecipeError(f"Recipe key {dot}{entry.name} is missing; add it.")
    return cls(**{key: _typed(value, hints[key], dot + key) for key, value in table.items()})


def _typed(value: Any, hint: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)  # type: ignore[arg-type]
    origin, args = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, typing.Union):  # only `X | None` is used; TOML has no null
        return _typed(value, args[0], where)
    if origin is Literal:
        if value in args:
            return value
        raise RecipeError(f"Recipe key {where} is {value!r}; it must be one of {', '.join(map(repr, args))}.")
    if origin is tuple:
        if isinstance(value, (list, tuple)) and len(value) == len(args):
            return tuple(_typed(item, arg, where) for item, arg in zip(value, args, strict=True))
        raise RecipeError(f"Recipe key {where} is {value!r}; it must be {len(args)} numbers.")
    kind = origin or hint
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RecipeError(f"Recipe key {where} is {json.dumps(value, default=str)}; it must be a {kind.__name__}.")
    return value


def _check_values(recipe: Recipe) -> None:
    run, schedule = recipe.run, recipe.schedule
    at_least_one = {
        "run.batch_size": run.batch_size,
        "run.accumulation": run.accumulation,
        "run.keep_checkpoints": run.keep_checkpoints,
        "run.eval_interval": run.eval_interval,
        "schedule.epochs": schedule.epochs,
    }
    if run.checkpoint_interval is not None:
        at_least_one["run.checkpoint_interval"] = run.checkpoint_interval
    for name, value in at_least_one.items():
        if value < 1:
            raise RecipeError(f"Recipe key {name} is {value}; it must be at least 1.")
    if recipe.data.workers < 0 or schedule.warmup_epochs < 0 or run.seed < 0:
        raise RecipeError("Recipe keys data.workers, schedule.warmup_epochs and run.seed must not be negative.")
    fraction = recipe.data.val_fraction
    if fraction is not None and not 0 < fraction < 1:
        raise RecipeError(f"Recipe key data.val_fraction is {fraction}; it must lie between 0 and 1.")
    if run.batch_size % run.accumulation:
        raise RecipeError(
            f"Recipe key run.batch_size is {run.batch_size}, not a multiple of run.accumulation ({run.accumulation})."
        )
    if recipe.optimizer.lr <= 0:
        raise RecipeError(f"Recipe key optimizer.lr is {recipe.optimizer.lr}; it must be positive.")
    if run.ema_decay is not None and not 0 < run.ema_decay < 1:
        raise RecipeError(f"Recipe key run.ema_decay is {run.ema_decay}; it must lie between 0 and 1.")
    _check_name("optimizer.name", recipe.optimizer.name, [str(name) for name in list_optimizers()])
    _check_name("schedule.name", schedule.name, ["cosine", "tanh", "poly", "wsd", "rsqrt", "constant"])
    if recipe.model.lam is not None:
        LamConfig.from_dict(recipe.model.lam)
    if ":" not in recipe.model.name:  # what stands before a colon says where else the model is
        find_card(recipe.model.name)
    _check_tune(recipe.model)
    if run.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("Recipe key run.device is 'cuda', and there is no such GPU here; use 'auto' or 'cpu'.")
    if run.precision == "fp16" and (run.device == "cpu" or not torch.cuda.is_available()):
        raise RecipeError("Recipe key run.precision is 'fp16', which needs a GPU; use 'bf16' or 'no' on a CPU.")


def _check_tune(model: ModelSection) -> None:
    if model.tune != "all" and not model.pretrained and model.kwargs.get("checkpoint_path") is None:
        raise RecipeError(
            f"Recipe key model.tune is {model.tune!r}, which keeps the backbone as it is, and this backbone has no "
            "weights; start from the published ones (model.pretrained, --pretrained) or tune all."
        )


def _check_name(key: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3) or known
        raise RecipeError(f"Recipe key {key} is {name!r}, which is unknown; did you mean {', '.join(close)}?")


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in table.items()
        if value is not None
    }
