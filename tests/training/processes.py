"""Training in two processes, and training that is killed and goes on, as a user starts them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lamzoo.errors import DataError
from lamzoo.training import Progress, TrainResult, parse_recipe, train
from lamzoo.training.trainer import TrainingRun
from tests.forked import Done, run_module_in_two


def train_killed(
    table: dict[str, Any], output: Path, killed_at: int, between: Callable[[Path], None] | None = None
) -> TrainResult:
    """Trains a recipe, given as nested values, kills the run behind an update, and resumes it to its end.

    ``between`` is called with the run's folder before it is resumed.
    """

    def kill(progress: Progress) -> None:
        if progress.update == killed_at:
            raise KeyboardInterrupt

    recipe = parse_recipe({**table, "run": {**table["run"], "output": str(output)}})
    with pytest.raises(KeyboardInterrupt):
        train(recipe, progress=kill)
    if between is not None:
        between(output)
    return train(recipe, resume=True)


def train_failed(
    table: dict[str, Any], output: Path, task: type[TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> TrainResult:
    """Trains a recipe, given as nested values, whose first evaluation fails; resumes it and does no update twice."""
    updates: list[int] = []

    def fail(_: TrainingRun) -> dict[str, float]:
        raise DataError("no such file")

    recipe = parse_recipe({**table, "run": {**table["run"], "output": str(output)}})
    with monkeypatch.context() as patch:
        patch.setattr(task, "evaluate", fail)
        with pytest.raises(DataError, match="no such file"):
            train(recipe, progress=lambda progress: updates.append(progress.update))
    weights = {file: file.stat().st_mtime_ns for file in output.glob("checkpoints/*/model.safetensors")}
    assert weights
    result = train(recipe, resume=True, progress=lambda progress: updates.append(progress.update))
    assert all(file.stat().st_mtime_ns == written for file, written in weights.items())
    assert updates == sorted(updates)
    assert updates[-1] == result.history[-1]["update"]
    return result


def train_in_two(table: dict[str, Any], output: Path, *options: str) -> list[dict[str, Any]]:
    """Trains a recipe in two processes, on the CPU by default; returns the rows of its ``metrics.csv``.

    Args:
        table: the recipe, as nested values; its device is replaced.
        output: folder of the run.
        options: further options of ``lamzoo train``.
    """
    for done in start_in_two(table, output, *options):
        assert done.returncode == 0, done.stderr
    return list(csv.DictReader((output / "metrics.csv").open()))


def start_in_two(table: dict[str, Any], output: Path, *options: str) -> list[Done]:
    """Does :func:`train_in_two`; returns what became of each process, which may have failed."""
    recipe = output.with_suffix(".json")
    recipe.write_text(json.dumps({**table, "run": {**table["run"], "output": str(output), "device": "auto"}}))
    return run_module_in_two("lamzoo", "train", str(recipe), *options)
