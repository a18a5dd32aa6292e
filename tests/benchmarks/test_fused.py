"""The measurement by which fused models choose their form: its rows are those that the library reads."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from benchmarks import speed
from benchmarks.fused import Row, measure, step_table, table
from benchmarks.rows import read_rows, write_rows
from lamzoo.lam import fused

ROW = Row(
    model="lam_vit_tiny", rank=7, width=192, columns=8, tokens=197, batch=1, unfused=1.2, unfused_q1=1.1,
    unfused_q3=1.3, fused=1.06, fused_q1=1.05, fused_q3=1.07, form="fused", ms=7.25, rounds=9, device="cpu (a CPU)",
    threads=2, torch="2.15",
)  # fmt: skip


def test_a_row_says_what_was_timed() -> None:
    row = measure("lam_vit_tiny_patch8_64", 7, 2, seconds=0.0, device=torch.device("cpu"))
    assert (row.model, row.rank, row.width, row.columns, row.tokens, row.batch) == (
        "lam_vit_tiny_patch8_64", 7, 192, 8, 65, 2,
    )  # fmt: skip
    assert row.form == ("fused" if row.fused <= row.unfused else "unfused")
    assert row.fused_q1 <= row.fused <= row.fused_q3
    assert row.rounds == 6


def test_the_library_reads_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "MEASURED", tmp_path / "fused.csv")
    write_rows(fused.MEASURED, [ROW, replace(ROW, batch=32, unfused=1.0)])
    for cached in (fused._measured, fused.faster):
        cached.cache_clear()
    try:
        assert fused.faster("cpu", 192, 8, 0, 197, 1)
        assert not fused.faster("cpu", 192, 8, 0, 197, 32)
    finally:
        for cached in (fused._measured, fused.faster):
            cached.cache_clear()


def test_the_stored_rows_have_the_columns_of_the_measurement() -> None:
    assert fused.MEASURED.read_text().splitlines()[0].split(",") == [field.name for field in fields(Row)]
    for row in read_rows(fused.MEASURED, Row):
        assert row.form == ("fused" if row.fused <= row.unfused else "unfused")


def test_the_table_names_the_form_that_is_taken() -> None:
    assert table([ROW]).splitlines()[2:] == [
        "| `lam_vit_tiny` | 7 | 1 | 1.20 (1.10-1.30) | 1.06 (1.05-1.07) | fused | 7.2 |",
        "",
        "Measured on: cpu (a CPU), 2 threads, float32, torch 2.15.",
    ]


def test_training_steps_have_a_table() -> None:
    row = speed.Row(
        "lam_vit_tiny", "zoo default", "train", 16, 1.01, 1.07, 1.06, 1.08, 700.0, 6, "cpu (a CPU)", 2, "2.15"
    )  # fmt: skip
    assert step_table([row]).splitlines()[2:] == [
        "| `lam_vit_tiny` | 16 | 1.07 (1.06-1.08) | 700.0 |",
        "",
        "Measured on: cpu (a CPU), 2 threads, float32, torch 2.15.",
    ]
