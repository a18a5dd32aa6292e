"""Tables of the README and the docs: filled from the results, up to date, and never without the masks' cost."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.rows import ROOT, STORED
from lamzoo.profiling.results import BenchRow, read_rows, write_rows

PAGES = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in tables.PAGES}


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "<!-- table: " in text])
def test_a_page_has_the_tables_of_the_results(page: str) -> None:
    assert tables.fill(PAGES[page]) == PAGES[page], "run `python -m benchmarks.tables`"


@pytest.mark.parametrize("name", sorted(tables.TABLES))
def test_every_table_is_shown_once(name: str) -> None:
    assert "\n".join(PAGES.values()).count(f"<!-- table: {name} -->\n| ") == 1


@pytest.mark.parametrize("name", ["zoo.csv", "cost.csv"])
def test_no_lam_in_the_results_is_free(name: str) -> None:
    every = read_rows(STORED / name)
    rows = {row.name: row for row in every if row.form is None}
    lams = [row for row in every if row.name.startswith("lam_")]
    assert lams
    for row in lams:
        plain = rows[row.plain or ""]
        assert row.ok
        assert row.gmacs > plain.gmacs
        assert row.lam_gmacs == pytest.approx(row.gmacs - plain.gmacs, rel=1e-3)
        assert row.latency_ratio is not None


def test_a_table_shows_masks_cost_apart_and_leaves_failed_rows_out(tmp_path: Path) -> None:
    row = BenchRow("lam_a", "t", "npz:x/cifar10", "test", "top1", 90.0, 1.5, 0.25, 0.5, 0.125, 4.0, 1.2, threads=2)
    write_rows(tmp_path / "zoo.csv", [row, BenchRow("lam_b", status="failed", error="out of memory")])
    text = tables.zoo(tmp_path / "zoo.csv")
    assert "| `lam_a.t` | cifar10 | 90.00 | 1.500 | 0.250 | 0.5000 | 0.1250 |" in text
    assert "lam_b" not in text


def test_a_fused_form_follows_its_model(tmp_path: Path) -> None:
    names = [("lam_a", None), ("a", None), ("lam_a", "fused")]
    write_rows(tmp_path / "zoo.csv", [BenchRow(name, params_m=1.0, form=form) for name, form in names])
    cells = [line.split(" | ")[0] for line in tables.zoo(tmp_path / "zoo.csv").splitlines()[2:5]]
    assert cells == ["| `lam_a`", "| `lam_a`, fused", "| `a`"]


def test_the_overview_has_a_models_score_beside_its_twins() -> None:
    text = tables.overview()
    assert "| images, CIFAR-10 | `lam_vit_micro.cifar10` | top-1 86.50 % | 86.29 % | 0.0757 | bundled |" in text
    assert "| `lam_qd_detr` |  |  | 0.3752 | none, to be trained |" in text


def test_an_unknown_table_is_named() -> None:
    with pytest.raises(KeyError, match="costs"):
        tables.fill("<!-- table: costs -->\n<!-- end of table -->")
