"""The fine-tuning table: every mode of both models, from what the runs report."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import lamzoo
from benchmarks import finetuning
from tests.images import write_folder


def test_seeds_of_a_line_are_averaged() -> None:
    row = finetuning.Row("m", "head", 0, "d", "test", 80.0, 2570, 9999, 90, 1, "cpu", 1, "2", "1", "lamzoo train")
    text = finetuning.table([row, replace(row, seed=1, top1=82.0), replace(row, tune="all", top1=9.0)])
    assert "| `m` | head | 0.003 | 81.00 ± 1.41 (2 seeds) | 1.5 |" in text
    assert "| `m` | all | 0.003 | 9.00 | 1.5 |" in text


@pytest.mark.slow
def test_every_line_is_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    for name in ("lam_vit_micro", "vit_micro"):
        lamzoo.save_pretrained(lamzoo.create_model(name, embed_dim=16, depth=1, num_classes=2), tmp_path / name)
    data = write_folder(tmp_path / "photos", splits=("train", "val", "test"))
    models = [f"local-dir:{tmp_path / name}" for name in ("lam_vit_micro", "vit_micro")]
    results = tmp_path / "results.csv"
    line = [*models, "--data", str(data), "--out", str(tmp_path / "runs"), "--results", str(results)]
    monkeypatch.setattr(sys, "argv", ["finetuning.py", *line, "--", "--epochs", "1", "--workers", "0"])
    finetuning.main()
    rows = list(csv.DictReader(results.open()))
    assert [(row["model"], row["tune"]) for row in rows] == [
        *((models[0], tune) for tune in ("all", "lam", "head")),
        *((models[1], tune) for tune in ("all", "head")),
    ]
    trained = [int(row["trained_params"]) for row in rows]
    assert trained[0] > trained[1] > trained[2] == trained[4] < trained[3]
    assert all(row["split"] == "test" for row in rows)
    monkeypatch.setattr(finetuning.subprocess, "run", lambda *args, **kwargs: pytest.fail("it is run again"))
    finetuning.main()
