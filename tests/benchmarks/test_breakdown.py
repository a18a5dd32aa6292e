"""Where the time of a backbone goes: every operator belongs to one part, and the table says each part's share."""

import pytest

from benchmarks.breakdown import ORDER, Row, measure, table

MODEL = "lam_vit_tiny_patch8_64"


def row(part: str, share: float, plain_share: float) -> Row:
    return Row("lam", "zoo default", 1, part, share, plain_share, 90, 100, "cpu", 2, "2.15")


@pytest.mark.parametrize("variant", ["additive, rank 16", "ToMe to 0.59 of the GMACs"])
def test_a_pass_is_divided_into_its_parts(variant: str) -> None:
    rows = {row.part: row for row in measure(MODEL, variant, 1, passes=1)}
    assert tuple(rows) == ORDER
    for part in ("matrix products", "attention", "copies, gathers, sorting", "norms, activations, sums"):
        assert rows[part].share > 0
        assert rows[part].plain_share > 0
    masks = rows["mask networks"]
    assert (masks.share > 0) == (variant == "additive, rank 16")
    assert masks.plain_share == 0
    assert rows["matrix products"].plain_gflops > 0
    assert sum(row.plain_share for row in rows.values()) == pytest.approx(1, abs=1e-3)


def test_the_table_shows_parts_as_shares_of_plain() -> None:
    rows = [
        row(part, share, plain)
        for part, share, plain in zip(ORDER, (0.6, 0.2, 0.1, 0.1, 0.2), (0.5, 0.2, 0.1, 0.2, 0.0), strict=True)
    ]
    assert table(rows).splitlines() == [
        "| | zoo default, 1 image |",
        "|---|---|",
        "| matrix products | 0.600 for 0.500, 90 for 100 GFLOP/s |",
        "| attention | 0.200 for 0.200 |",
        "| copies, gathers, sorting | 0.100 for 0.100 |",
        "| norms, activations, sums | 0.100 for 0.200 |",
        "| mask networks | 0.200 for 0.000 |",
        "| all | 1.200 |",
        "",
        "Measured on: lam, cpu, 2 threads, float32, torch 2.15.",
    ]
