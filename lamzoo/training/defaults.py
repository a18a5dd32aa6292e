"""Fills in what a recipe leaves open, by the size of the data and what of the model is trained."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lamzoo.data import select, split_off
from lamzoo.errors import RecipeError
from lamzoo.training.recipe import Recipe, parse_recipe
from lamzoo.training.recipe_common import Precision
from lamzoo.training.splits import has_split, open_splits

_VAL_FRACTION = 0.1
_BATCH = 64  # the largest that is chosen, and the one that the learning rates below are for
_LEAST_BATCH = 8
_UPDATES_PER_EPOCH = 40


@dataclass(frozen=True)
class _Style:
    """How one kind of run is trained.

    Attributes:
        lr: at batches of 64; scaled with the square root of the batch, as suits AdamW.
        layer_decay: factor of the learning rate from one layer to the one below it.
        updates: what the number of epochs aims at.
        epochs: the fewest and the most of them.
        augment: entries of ``[augment]``.
    """

    lr: float
    layer_decay: float | None
    updates: int
    epochs: tuple[int, int]
    augment: Mapping[str, Any]


_GENTLE = {"scale": (0.5, 1.0), "color_jitter": 0.1, "label_smoothing": 0.1}
_STRONG = {
    "scale": (0.35, 1.0),
    "color_jitter": 0.0,
    "auto_augment": "rand-m6-n2-mstd0.5-inc1",
    "random_erasing": 0.1,
    "label_smoothing": 0.1,
}
_STYLES = {
    "scratch": _Style(1e-3, None, 5000, (50, 300), {**_STRONG, "mixup": 0.2, "cutmix": 0.5, "mixup_prob": 0.5}),
    "all": _Style(1.5e-3, 0.75, 1200, (10, 50), _STRONG),
    "lam": _Style(6e-3, None, 1200, (10, 50), _GENTLE),
    "head": _Style(1e-2, None, 1200, (10, 50), _GENTLE),
}


def complete_recipe(table: Mapping[str, Any]) -> Recipe:
    """Makes a recipe of a table that says as little as ``model.name`` and ``data.source``.

    What is left open is chosen for AdamW with a cosine schedule and averaged weights: epochs, batch and learning rate
    by the number of training images and by what is trained (``model.tune``; from scratch without weights). Where the
    data has no validation split, a tenth of the training images becomes one; a ``test`` split is scored at the end.
    What the table says stays as it is.

    Args:
        table: nested values as in a recipe file; ``run.output`` may be missing too.

    Returns:
        The recipe, as :func:`lamzoo.training.train` takes it.

    Raises:
        RecipeError: an entry that is missing, unknown or impossible, as of :func:`lamzoo.training.parse_recipe`.
        DataError: the data set can't be opened.
    """
    filled: dict[str, Any] = copy.deepcopy(dict(table))
    for section, key in (("model", "name"), ("data", "source")):
        if not isinstance(filled.setdefault(section, {}), dict) or key not in filled[section]:
            raise RecipeError(f"Recipe key {section}.{key} is missing; add it.")
    _fill(filled, "data", {"val_fraction": _VAL_FRACTION, "workers": _workers()})
    _fill(filled, "run", {"output": ""})
    given = _classifiers(_with_any_batch(filled))  # what is wrong is said before the data is opened
    images = _training_images(given)
    if "test_split" not in filled["data"] and given.data.eval_split != "test" and has_split(given.data, "test"):
        filled["data"]["test_split"] = "test"

    batch = given.run.batch_size if "batch_size" in filled["run"] else _batch(images, given.run.accumulation)
    updates = max(1, images // batch)
    style = _STYLES["scratch" if _from_scratch(given) else given.model.tune]
    fewest, most = style.epochs
    _fill(filled, "schedule", {"epochs": min(max(math.ceil(style.updates / updates), fewest), most)})
    epochs = filled["schedule"]["epochs"]
    _fill(filled, "schedule", {"warmup_epochs": math.ceil(epochs / 20) if epochs > 1 else 0})
    augment = dict(style.augment)
    if given.model.kwargs.get("in_chans") == 4:
        augment.pop("auto_augment", None)  # timm's policies can't change images of 4 channels
    _fill(filled, "augment", augment)
    _fill(filled, "optimizer", {"lr": style.lr * math.sqrt(batch / _BATCH), "clip_grad": 1.0})
    if style.layer_decay is not None:
        _fill(filled, "optimizer", {"layer_decay": style.layer_decay})
    # The average of the weights reaches back over the last tenth of the run.
    decay = round(min(max(1 - 10 / (updates * epochs), 0.5), 0.9998), 6)
    _fill(filled, "run", {"batch_size": batch, "ema_decay": decay, "precision": _precision(given)})
    filled["run"]["output"] = given.run.output or str(Path("runs", _run_name(given)))
    return _classifiers(filled)


def _with_any_batch(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a table whose batch, where it is still to be chosen, fits the accumulation."""
    run = table["run"]
    accumulation = run.get("accumulation") if isinstance(run, dict) and "batch_size" not in run else None
    if not isinstance(accumulation, int) or accumulation < 1:
        return table
    return {**table, "run": {**run, "batch_size": accumulation}}


def _classifiers(table: Mapping[str, Any]) -> Recipe:
    recipe = parse_recipe(table)
    if isinstance(recipe, Recipe):
        return recipe
    raise RecipeError(
        f"Recipe key task is {recipe.task!r}, whose settings are not chosen by the data yet; give a whole RECIPE.toml."
    )


def _fill(table: dict[str, Any], section: str, values: Mapping[str, Any]) -> None:
    entries = table.setdefault(section, {})
    if isinstance(entries, dict):  # parse_recipe refuses anything else
        for key, value in values.items():
            entries.setdefault(key, value)


def _training_images(recipe: Recipe) -> int:
    splits = open_splits(recipe.data)
    if splits.evaluation is not None or recipe.data.val_fraction is None:
        return len(splits.train)
    train = splits.train  # without the images whose labels a scan would find wrong
    usable = select(train, [i for i, label in enumerate(train.source.labels()) if train.is_label(label)])
    return len(split_off(usable, recipe.data.val_fraction, recipe.run.seed)[0])


def _batch(images: int, accumulation: int) -> int:
    """A power of two that leaves enough updates in an epoch, at most half of the images, shared out evenly.

    Each share is even, as mixup needs it, where there are images enough for pairs.
    """
    wanted = 2 ** math.floor(math.log2(max(images / _UPDATES_PER_EPOCH, 1)))
    batch = min(max(wanted, _LEAST_BATCH), _BATCH, math.ceil(images / 2))
    share = accumulation * int(os.environ.get("WORLD_SIZE", "1"))
    if images >= 2 * share:
        share *= 2
    return max(batch // share, 1) * share


def _from_scratch(recipe: Recipe) -> bool:
    return not recipe.model.pretrained and recipe.model.kwargs.get("checkpoint_path") is None


def _precision(recipe: Recipe) -> Precision:
    if recipe.run.device == "cpu" or not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _workers() -> int:
    """A few processes that read images, and the cores shared with those that train beside this one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(share // 2, 8)


def _run_name(recipe: Recipe) -> str:
    """``<model>-<data>``, and what is tuned where it isn't all."""
    tune = "" if recipe.model.tune == "all" else f"-{recipe.model.tune}"
    return f"{_short(recipe.model.name)}-{_short(recipe.data.source)}{tune}"


def _short(name: str) -> str:
    """The last part of a name or path that tells anything: the folder above ``model``, no wildcards."""
    parts = [part for part in re.split(r"[/\\:]", name) if part not in ("", ".", "..") and not set(part) & set("*{}?")]
    if len(parts) > 1 and parts[-1] in ("model", "data"):
        parts.pop()
    return re.sub(r"[^\w.+-]+", "-", parts[-1]).strip("-") or "run"
