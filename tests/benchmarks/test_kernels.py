"""The timing of attention layers: what a row says, and that a results file gives back its rows."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import Layer, Problem, Row, fits, measure, rules, table
from benchmarks.rows import read_rows, write_rows

PROBLEM = Problem("sdpa", "add", 3, "shared", tokens=5, batch=2, mode="train", dtype="float32", device="cpu")


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("backend", ["eager", "sdpa", "chunked"])
def test_a_row_says_what_was_timed(backend: str, mode: str) -> None:
    problem = replace(PROBLEM, backend=backend, mode=mode)
    row = measure(problem, 0.0, (2.5, None))
    assert asdict(row).items() >= asdict(problem).items()
    assert 0 < row.first_quartile <= row.ratio <= row.third_quartile
    assert row.ms > 0
    assert (row.peak_mib, row.plain_peak_mib, row.threads) == (2.5, None, torch.get_num_threads())


def test_rows_survive_their_file(tmp_path: Path) -> None:
    rows = [measure(PROBLEM, 0.0, peaks) for peaks in ((None, None), (1.5, 2.0))]
    write_rows(tmp_path / "rows.csv", rows)
    assert read_rows(tmp_path / "rows.csv", Row) == rows
    assert read_rows(tmp_path / "none.csv", Row) == []


def test_only_the_masked_layer_has_a_mask() -> None:
    tokens = torch.randn(2, 5, 768)
    plain, masked = Layer(PROBLEM, masked=False), Layer(PROBLEM, masked=True)
    assert masked(tokens).shape == plain(tokens).shape == tokens.shape
    extra = {name for name, _ in masked.named_parameters()} - {name for name, _ in plain.named_parameters()}
    assert extra == {"left", "right"}


def test_a_dense_mask_that_does_not_fit_is_left_out() -> None:
    huge = replace(PROBLEM, tokens=10**7)
    assert not fits(replace(huge, backend="eager"))
    assert fits(huge)
    assert fits(replace(PROBLEM, backend="eager"))


def test_the_table_has_what_memory_was_measured_of() -> None:
    row = Row(
        **asdict(PROBLEM), ratio=1.25, first_quartile=1.2, third_quartile=1.3, ms=3.0, peak_mib=65.4,
        plain_peak_mib=49.0, hardware="cpu", threads=2, torch="2.15",
    )  # fmt: skip
    assert table([row, replace(row, tokens=9, mode="forward"), replace(row, op="mul", peak_mib=None)]).splitlines() == [
        "| mask | factors' columns | backend | train, 5 tokens x 2 | forward, 9 tokens x 2 |",
        "|---|---|---|---|---|",
        "| none | | | 49 MiB | 49 MiB |",
        "| add, shared | 3 | `sdpa` | 1.25 (1.20-1.30), 65 MiB | 1.25 (1.20-1.30), 65 MiB |",
        "",
        "Measured on: cpu, 2 threads, float32, torch 2.15.",
    ]


def test_rules_sort_backends_that_were_timed_in_both_modes() -> None:
    slow = Row(
        **asdict(PROBLEM), ratio=3.0, first_quartile=2.0, third_quartile=4.0, ms=3.0, peak_mib=None,
        plain_peak_mib=None, hardware="cpu", threads=2, torch="2.15",
    )  # fmt: skip
    fast = replace(slow, backend="chunked", ratio=1.5)
    rows = [slow, replace(slow, mode="forward", ratio=1.25), fast, replace(fast, mode="forward"), replace(slow, rank=9)]
    assert rules(rows).splitlines()[2:] == [
        "| cpu | add, shared | 3 | 5**2 x 2 | `chunked` 1.50, 1.50; `sdpa` 1.25, 3.00 |",
        "| cpu | add, shared | 9 | 5**2 x 2 |  |",
    ]
