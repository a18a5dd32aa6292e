"""The timing of whole backbones: every variant runs, costs what it says, and fills its place in the table."""

from dataclasses import replace

import pytest
import torch

from benchmarks.speed import VARIANTS, Row, measure, table

MODEL = "lam_vit_tiny_patch8_64"
ROW = Row(
    model="lam", variant="zoo default", mode="forward", batch=1, gmacs_ratio=1.01, ratio=1.04, ratio_q1=1.03,
    ratio_q3=1.06, ms=230.0, pairs=40, device="cpu", threads=2, torch="2.15",
)  # fmt: skip


# Each builds and times a whole backbone, and most search for a setting by counting pass after pass: one of each kind.
_QUICK = (
    "zoo default",
    "zoo default, fused",
    "mask, drop to 0.59 of the GMACs",
    "merged to 0.63 of the GMACs",
    "ToMe, r = 13",
)


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[] if name in _QUICK else [pytest.mark.slow]) for name in VARIANTS]
)
def test_a_row_says_what_was_timed(variant: str) -> None:
    row = measure(MODEL, variant, "forward", 1, seconds=0.0, device=torch.device("cpu"))
    assert (row.model, row.variant, row.mode, row.batch, row.pairs) == (MODEL, variant, "forward", 1, 6)
    assert 0 < row.ratio_q1 <= row.ratio <= row.ratio_q3
    budget = next((share for share in (0.63, 0.59, 0.47) if str(share) in variant), None)
    if budget is not None:
        assert budget - 0.1 < row.gmacs_ratio <= budget
    else:
        assert (row.gmacs_ratio > 1) == ("ToMe" not in variant)


@pytest.mark.parametrize("variant", ["zoo default", "ToMe, r = 13"])
def test_a_training_step_is_timed(variant: str) -> None:
    row = measure(MODEL, variant, "train", 1, seconds=0.0, device=torch.device("cpu"))
    assert row.mode == "train"
    assert row.ms > 0


def test_the_table_has_a_line_for_each_variant() -> None:
    rows = [
        ROW,
        replace(ROW, batch=16, ratio=1.06),
        replace(ROW, variant="ToMe", mode="compile", ratio=1.5, pairs=1, gmacs_ratio=0.6),
    ]
    assert table(rows).splitlines() == [
        "| | GMACs | forward, 1 image | forward, 16 images | compile, 1 image |",
        "|---|---|---|---|---|",
        "| zoo default | 1.01 | 1.04 (1.03-1.06) | 1.06 (1.03-1.06) |  |",
        "| ToMe | 0.60 |  |  | 1.50 |",
        "",
        "Measured on: lam, cpu, 2 threads, float32, torch 2.15.",
    ]
