"""Default settings of a recipe, chosen by the size of the data, the weights, and the trained part of the model."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lamzoo.data import select, split_off
from lamzoo.data.splits import synonyms
from lamzoo.errors import MissingSplitError, RecipeError
from lamzoo.registry.factory import create_model
from lamzoo.tasks import find_task
from lamzoo.training.captions.recipe import CaptionRecipe
from lamzoo.training.moments.recipe import MomentRecipe
from lamzoo.training.recipe import Recipe, parse_recipe
from lamzoo.training.recipe_common import Precision, TaskRecipe
from lamzoo.training.retrieval.recipe import RetrievalRecipe
from lamzoo.training.splits import open_roles, open_splits

_VAL_FRACTION = 0.1
_BATCH = 64  # the largest default; the learning rates below are for this batch size
_LEAST_BATCH = 8
_UPDATES_PER_EPOCH = 40


@dataclass(frozen=True)
class Style:
    """Training settings of one kind of run, for AdamW and a cosine schedule.

    Attributes:
        lr: learning rate for batches of 64; scaled with the square root of the batch size, as is usual for AdamW.
        updates: target number of updates, which determines the number of epochs.
        epochs: minimum and maximum number of epochs.
        sections: further entries of the recipe, by section.
    """

    lr: float
    updates: int
    epochs: tuple[int, int]
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """Default settings of a task, as returned by :attr:`lamzoo.tasks.Task.defaults`.

    Attributes:
        inputs: number of training inputs.
        style: training settings.
        data: entries of ``[data]``.
    """

    inputs: int
    style: Style
    data: Mapping[str, Any] = field(default_factory=dict)


_GENTLE = {"scale": (0.5, 1.0), "color_jitter": 0.1, "label_smoothing": 0.1}
_STRONG = {
    "scale": (0.35, 1.0),
    "color_jitter": 0.0,
    "auto_augment": "rand-m6-n2-mstd0.5-inc1",
    "random_erasing": 0.1,
    "label_smoothing": 0.1,
}
_IMAGE_STYLES = {
    "scratch": Style(1e-3, 5000, (50, 300), {"augment": {**_STRONG, "mixup": 0.2, "cutmix": 0.5, "mixup_prob": 0.5}}),
    "all": Style(1.5e-3, 1200, (10, 50), {"optimizer": {"layer_decay": 0.75}, "augment": _STRONG}),
    "lam": Style(6e-3, 1200, (10, 50), {"augment": _GENTLE}),
    "head": Style(1e-2, 1200, (10, 50), {"augment": _GENTLE}),
}
# The learning rates of the published recipes (CLIP4Clip, QD-DETR); from scratch higher, as in the zoo's own recipes.
_VIDEO_STYLES = {
    "scratch": Style(1e-3, 5000, (50, 300)),
    "tuned": Style(1e-4, 1200, (5, 50), {"optimizer": {"weight_decay": 0.2, "tower_lr": 1e-5}}),
}
_MOMENT_STYLES = {
    "scratch": Style(2e-4, 8000, (50, 200), {"optimizer": {"weight_decay": 1e-4, "clip_grad": 0.1}}),
    "tuned": Style(1e-4, 1200, (5, 50), {"optimizer": {"weight_decay": 1e-4, "clip_grad": 0.1}}),
}
_CAPTION_STYLES = {
    "scratch": Style(1e-3, 5000, (30, 200), {"optimizer": {"weight_decay": 0.01}}),
    "tuned": Style(3e-4, 1200, (5, 50), {"optimizer": {"weight_decay": 0.01}}),
}


def complete_recipe(table: Mapping[str, Any]) -> TaskRecipe:
    """Completes a recipe from as little as ``model.name`` and ``data.source``.

    The task is that of the model, unless ``task`` is given. Defaults are AdamW with a cosine schedule and averaged
    weights; epochs, batch size and learning rate depend on the number of training inputs and on the trained part of the
    model (``model.tune``; without weights, training from scratch). The number of frames per video is that of the
    weights. If the data has no validation split, a tenth of the training images or videos is held out; a ``test`` split
    is scored once at the end. Given values are never changed.

    Args:
        table: nested values as in a recipe file; ``run.output`` is optional.

    Returns:
        The recipe, for :func:`lamzoo.training.train`.

    Raises:
        RecipeError: an entry is missing, unknown or invalid, as of :func:`lamzoo.training.parse_recipe`.
        DataError: the data set can't be opened.
    """
    filled: dict[str, Any] = copy.deepcopy(dict(table))
    for section, key in (("model", "name"), ("data", "source")):
        if not isinstance(filled.setdefault(section, {}), dict) or key not in filled[section]:
            raise RecipeError(f"Recipe key {section}.{key} is missing; add it.")
    _fill(filled, "data", {"workers": _workers()})
    _fill(filled, "run", {"output": ""})
    given = parse_recipe(_with_any_batch(filled))  # errors are reported before the data is opened
    filled["task"] = given.task
    task = find_task(given.task)
    task.check_data(given.data.source)
    if task.defaults is None:
        raise RecipeError(f"{task.about} has no default settings; give a complete RECIPE.toml.")
    choice: Choice = task.load("defaults")(given)
    _fill(filled, "data", choice.data)

    inputs, style = choice.inputs, choice.style
    batch = given.run.batch_size if "batch_size" in filled["run"] else _batch(inputs, given.run.accumulation)
    updates = max(1, inputs // batch)
    fewest, most = style.epochs
    _fill(filled, "schedule", {"epochs": min(max(math.ceil(style.updates / updates), fewest), most)})
    epochs = filled["schedule"]["epochs"]
    _fill(filled, "schedule", {"warmup_epochs": math.ceil(epochs / 20) if epochs > 1 else 0})
    for section, values in style.sections.items():
        _fill(filled, section, values)
    _fill(filled, "optimizer", {"lr": style.lr * math.sqrt(batch / _BATCH), "clip_grad": 1.0})
    # The average of the weights covers about the last tenth of the run.
    decay = round(min(max(1 - 10 / (updates * epochs), 0.5), 0.9998), 6)
    _fill(filled, "run", {"batch_size": batch, "ema_decay": decay, "precision": _precision(given)})
    filled["run"]["output"] = given.run.output or str(Path("runs", _run_name(given)))
    return parse_recipe(filled)


def for_images(recipe: Recipe) -> Choice:
    """Chooses defaults for image classification; opens the data."""
    fraction = _VAL_FRACTION if recipe.data.val_fraction is None else recipe.data.val_fraction
    data = replace(recipe.data, val_fraction=fraction)
    splits = open_splits(data)
    images = len(splits.train)
    if splits.evaluation is None:
        train = splits.train  # without images with invalid labels
        usable = select(train, [i for i, label in enumerate(train.source.labels()) if train.is_label(label)])
        images = len(split_off(usable, fraction, recipe.run.seed)[0])
    chosen = {"val_fraction": fraction, **_test_split(recipe, splits.train, splits.evaluation)}
    style = _IMAGE_STYLES["scratch" if _from_scratch(recipe) else recipe.model.tune]
    if recipe.model.kwargs.get("in_chans") == 4:  # timm's policies do not support 4 channels
        augment = {key: value for key, value in style.sections["augment"].items() if key != "auto_augment"}
        style = replace(style, sections={**style.sections, "augment": augment})
    return Choice(images, style, chosen)


def for_videos(recipe: RetrievalRecipe) -> Choice:
    """Chooses defaults for text-video retrieval, including the frames; opens the data and builds the model."""
    with torch.device("meta"):
        model: Any = create_model(recipe.model.name, **recipe.model.kwargs)
    train, data = _open_videos(recipe, val_fraction=True)
    frames = {"max_frames": model.max_frames, "fps": model.sampling.fps or 0.0}
    pairs = len(train.texts) if recipe.data.captions == "all" else len(train)
    return Choice(pairs, _style(_VIDEO_STYLES, recipe), {**frames, **data})


def for_moments(recipe: MomentRecipe) -> Choice:
    """Chooses defaults for moment retrieval; opens the data."""
    train, data = _open_videos(recipe, val_fraction=False)
    return Choice(len(train), _style(_MOMENT_STYLES, recipe), data)


def for_captions(recipe: CaptionRecipe) -> Choice:
    """Chooses defaults for captioning; opens the data."""
    train, data = _open_videos(recipe, val_fraction=True)
    return Choice(len(train), _style(_CAPTION_STYLES, recipe), data)


def _style(styles: Mapping[str, Style], recipe: TaskRecipe) -> Style:
    return styles["scratch" if _from_scratch(recipe) else "tuned"]


def _open_videos(recipe: TaskRecipe, *, val_fraction: bool) -> tuple[Any, dict[str, Any]]:
    """Opens the training split; returns it without held-out items, and entries of ``[data]``."""
    data, chosen = recipe.data, {}
    if val_fraction:
        chosen["val_fraction"] = _VAL_FRACTION if data.val_fraction is None else data.val_fraction
        data = replace(data, **chosen)
    splits, _ = open_roles(find_task(recipe.task), data, recipe.run.seed, roles=("train", "validation"))
    return splits["train"], chosen | _test_split(recipe, *splits.values())


def _test_split(recipe: TaskRecipe, *opened: Any) -> dict[str, str]:
    """Returns an entry of ``[data]`` if the recipe names no test split and the data has one that isn't opened yet."""
    if recipe.data.test_split is not None or "test" in synonyms(recipe.data.eval_split):
        return {}
    try:
        test = find_task(recipe.task).open_split(recipe.data.source, "test")
    except MissingSplitError:
        return {}
    used = [split.split for split in opened if split is not None]
    return {} if test.split in used else {"test_split": "test"}


def _with_any_batch(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a table whose batch size, if not yet chosen, is a multiple of the accumulation steps."""
    run = table["run"]
    accumulation = run.get("accumulation") if isinstance(run, dict) and "batch_size" not in run else None
    if not isinstance(accumulation, int) or accumulation < 1:
        return table
    return {**table, "run": {**run, "batch_size": accumulation}}


def _fill(table: dict[str, Any], section: str, values: Mapping[str, Any]) -> None:
    entries = table.setdefault(section, {})
    if isinstance(entries, dict):  # parse_recipe rejects anything else
        for key, value in values.items():
            entries.setdefault(key, value)


def _batch(inputs: int, accumulation: int) -> int:
    """Returns a power of two that leaves enough updates per epoch, up to half of the inputs, divided evenly.

    Each process's part is even if there are enough inputs, as mixup requires.
    """
    wanted = 2 ** math.floor(math.log2(max(inputs / _UPDATES_PER_EPOCH, 1)))
    batch = min(max(wanted, _LEAST_BATCH), _BATCH, math.ceil(inputs / 2))
    share = accumulation * int(os.environ.get("WORLD_SIZE", "1"))
    if inputs >= 2 * share:
        share *= 2
    return max(batch // share, 1) * share


def _from_scratch(recipe: TaskRecipe) -> bool:
    return not recipe.model.pretrained and recipe.model.kwargs.get("checkpoint_path") is None


def _precision(recipe: TaskRecipe) -> Precision:
    if recipe.run.device == "cpu" or not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _workers() -> int:
    """Returns a small number of worker processes, given the cores and the training processes on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(share // 2, 8)


def _run_name(recipe: TaskRecipe) -> str:
    """Returns ``<model>-<data>``, followed by the tuned part unless all is trained."""
    tune = getattr(recipe.model, "tune", "all")
    return f"{_short(recipe.model.name)}-{_short(recipe.data.source)}{'' if tune == 'all' else f'-{tune}'}"


def _short(name: str) -> str:
    """Returns the last distinctive part of a name or path: the folder above ``model``, without wildcards."""
    parts = [part for part in re.split(r"[/\\:]", name) if part not in ("", ".", "..") and not set(part) & set("*{}?")]
    if len(parts) > 1 and parts[-1] in ("model", "data"):
        parts.pop()
    return re.sub(r"[^\w.+-]+", "-", parts[-1]).strip("-") or "run"
