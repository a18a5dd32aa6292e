"""The page on new tasks: its code, put into one module, is a task that is trained, scored and measured."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamzoo.profiling import bench, read_rows
from lamzoo.profiling.worker import measured_row
from lamzoo.registry import catalog
from lamzoo.tasks import TASKS

PAGE = Path(__file__).parents[2] / "docs" / "contributing" / "new-task.md"


@pytest.fixture(autouse=True)
def _plugin(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The module of the page, registered as a plug-in would be, and forgotten afterwards."""
    folder = tmp_path_factory.mktemp("plugin")
    blocks = re.findall(r"```py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    (folder / "sums_task.py").write_text("\n\n".join(blocks))
    catalog.list_models()
    monkeypatch.setattr(catalog, "_specs", dict(catalog._specs))
    for name, task in TASKS.items():
        monkeypatch.setitem(TASKS, name, task)
    monkeypatch.syspath_prepend(folder)
    module = importlib.import_module("sums_task")
    yield
    del TASKS[module.SUMS.name]
    del sys.modules["sums_task"]


def test_a_new_task_is_trained_scored_and_measured(run, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("train", "--model", "sum_net", "--data", "sums:64", "--epochs", 2, "--device", "cpu", "--workers", 0)
    assert done.code == 0, done.err
    assert "mean absolute error" in done.out
    report = json.loads(Path("runs/sum_net-64/report/report.json").read_text())
    assert (report["training_rows"], set(report["scores"])) == (64, {"validation"})

    done = run("eval", "local-dir:runs/sum_net-64", "--data", "sums:16", "--split", "validation", "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert (record["task"], record["rows"]) == ("sums", 16)

    monkeypatch.setitem(bench.bench.__kwdefaults__, "runner", lambda job, timeout=None: measured_row(job))
    options = ("--out", "r.csv", "--batch", 2, "--repeats", 2, "--threads", 1)
    done = run("bench", "local-dir:runs/sum_net-64", "--data", "sums:16", "--split", "validation", *options)
    assert done.code == 0, done.err
    (row,) = read_rows("r.csv")
    assert (row.task, row.metric) == ("sums", "error")
    assert row.value == pytest.approx(record["metrics"]["error"], abs=1e-3)
    assert "mean absolute error" in done.out and "rows/s" in done.out


def test_a_new_task_refuses_data_and_options_of_others(run) -> None:
    done = run("eval", "sum_net", "--data", "npz:x")
    assert done.code == 2
    assert "'npz:x' is data for image classification, not for adding up numbers" in done.err
    done = run("eval", "sum_net", "--data", "sums:4", "--beams", 2)
    assert "--beams does not apply to the task sums" in done.err
