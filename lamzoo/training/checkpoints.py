"""Checkpoints and logs of a run, written atomically; only the latest checkpoints are kept."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import SAFE_WEIGHTS_PATTERN_NAME
from safetensors import safe_open
from torch import nn

from lamzoo.data.trained import RECIPE_NAME
from lamzoo.errors import LamzooError, RecipeError
from lamzoo.files import atomic_files
from lamzoo.lam import LamConfig
from lamzoo.training.recipe import AnyRecipe, parse_recipe

_logger = logging.getLogger(__name__)


class Checkpoints:
    """The folder of one run: ``recipe.json``, ``metrics.csv`` and ``checkpoints/update-NNNNNNNN/``.

    Args:
        output: the run's folder.
        recipe: the run's recipe. A folder that holds a run of another recipe is rejected.
        resume: whether an existing run may be continued.

    Raises:
        RecipeError: the folder holds a run of another recipe, or any run without ``resume``.
    """

    def __init__(self, output: Path, recipe: AnyRecipe, resume: bool) -> None:
        self.output = output
        self._folder = output / "checkpoints"
        self._keep = recipe.run.keep_checkpoints
        written = output / RECIPE_NAME
        if written.exists():
            if not resume:
                raise RecipeError(
                    f"run.output {output} already holds a run; continue it with --resume, or choose another folder."
                )
            changed = _changed(written, recipe)
            if changed:
                raise RecipeError(
                    f"run.output {output} holds a run of another recipe: {changed}; restore it, or choose "
                    "another folder."
                )
        self._recipe_text = json.dumps(recipe.to_dict(), indent=2, sort_keys=True) + "\n"

    def make_folder(self) -> None:
        """Creates the folder; call it after all other checks.

        Raises:
            RecipeError: the folder can't be created.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"run.output {self.output} can't be created: {error.strerror}"
            raise RecipeError(f"{reason}; choose another folder.") from None

    def save(self, accelerator: Accelerator, state: dict[str, Any]) -> None:
        """Writes model, optimiser and ``state`` (JSON values) as the latest checkpoint; call on every process."""
        name = _name(state)
        unfinished = self._folder / f".{name}"
        accelerator.save_state(str(unfinished))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _write_text(unfinished / "state.json", json.dumps(state))
            target = self._folder / name
            shutil.rmtree(target, ignore_errors=True)
            os.replace(unfinished, target)
            _write_text(self.output / RECIPE_NAME, self._recipe_text)
            for old in self._finished()[: -self._keep]:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()

    def amend(self, accelerator: Accelerator, state: dict[str, Any]) -> None:
        """Replaces the ``state`` of the checkpoint written at the same update; call on every process."""
        if accelerator.is_main_process:
            _write_text(self._folder / _name(state) / "state.json", json.dumps(state))
            _write_text(self.output / RECIPE_NAME, self._recipe_text)
        accelerator.wait_for_everyone()

    def load(self, accelerator: Accelerator, lam: LamConfig | None) -> dict[str, Any] | None:
        """Loads the latest complete checkpoint into the prepared objects and returns its state; None without one.

        Args:
            accelerator: the accelerator that prepared model, optimiser and loaders.
            lam: mask configuration of the model.

        Raises:
            RecipeError: the checkpoint has other masks, or its optimiser has other parameters or groups.
        """
        finished = self._finished()
        if not finished:
            return None
        state: dict[str, Any] = json.loads((finished[-1] / "state.json").read_text(encoding="utf-8"))
        if "lam_config" in state:
            self._check_masks(state["lam_config"], lam)
        elif lam is not None and accelerator.is_main_process:
            _logger.warning("%s does not record its mask configuration; its masks are loaded as %s", finished[-1], lam)
        try:
            with accelerator.register_load_state_pre_hook(partial(_as_saved, accelerator)):
                accelerator.load_state(str(finished[-1]))
        except ValueError as error:
            if "parameter group" not in str(error):
                raise
            raise RecipeError(
                f"{finished[-1]} was written by another version of lamzoo, whose optimiser had other parameters "
                f"({error}); resume it with that version, or start a new run in another folder."
            ) from error
        return state

    def _check_masks(self, fields: dict[str, Any] | None, lam: LamConfig | None) -> None:
        saved = LamConfig.from_dict(fields) if fields is not None else None
        if saved is None or lam is None:
            same = saved is lam
        else:
            same = not saved.differences(lam)
        if not same:
            raise RecipeError(
                f"run.output {self.output} holds a run of a model with masks of {saved}, but the recipe's model now "
                f"has {lam}; choose another folder."
            )

    def write_metrics(self, history: list[dict[str, float]]) -> None:
        """Rewrites ``metrics.csv`` with one line per epoch."""
        columns = list(dict.fromkeys(key for record in history for key in record))
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        _write_text(self.output / "metrics.csv", buffer.getvalue())

    def _finished(self) -> list[Path]:
        return sorted(self._folder.glob("update-*"))


def _name(state: dict[str, Any]) -> str:
    return f"update-{state['update']:08d}"


def _as_saved(accelerator: Accelerator, models: list[nn.Module], folder: str) -> None:
    """Renames the parameters of unwrapped models as in a checkpoint, which may come from wrapped models.

    A pre-hook of :meth:`accelerate.Accelerator.load_state`, which then loads into the contents of ``models``.
    """
    for number, model in enumerate(models):
        path = Path(folder) / SAFE_WEIGHTS_PATTERN_NAME.format(suffix=f"_{number}" if number else "")
        with safe_open(path, "pt") as file:
            wrapped = all(name.startswith("module.") for name in file.keys())  # noqa: SIM118 - no mapping
        bare = accelerator.unwrap_model(model)
        models[number] = nn.ModuleDict({"module": bare}) if wrapped else bare


def _changed(path: Path, recipe: AnyRecipe) -> str:
    """Returns how a stored recipe differs in settings that change the curve; newer keys have their defaults."""
    try:
        written = parse_recipe(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, LamzooError) as error:
        return f"{path} can't be read ({error})"
    before, now = (_flat(_curve(each).to_dict()) for each in (written, recipe))
    keys = [key for key in {**now, **before} if before.get(key) != now.get(key)]
    return " and ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in keys)


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested values to keys such as ``"run.seed"``."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        nested = isinstance(value, dict) and value
        flat |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def _curve(recipe: AnyRecipe) -> AnyRecipe:
    """Returns a recipe without the settings that may change when a run is resumed, such as its epochs."""
    neutral: dict[str, Any] = {
        "output": "",
        "device": "auto",
        "keep_checkpoints": 1,
        "keep": "last",
        "checkpoint_interval": None,
        "tensorboard": False,
        "report": True,
    }
    settings: Any = recipe  # a dataclass, as each task's is
    changes = {"data": replace(recipe.data, workers=0), "schedule": replace(recipe.schedule, epochs=1)}
    curve: AnyRecipe = replace(settings, run=replace(recipe.run, **neutral), **changes)
    return curve


def _write_text(path: Path, text: str) -> None:
    with atomic_files(RecipeError) as stage:
        stage(path).write_text(text, encoding="utf-8")
