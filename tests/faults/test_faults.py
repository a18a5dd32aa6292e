"""Damaged, hostile, missing and odd input: each row of the tables ends as it says, in one sentence if in an error."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from lamzoo.export import trust
from tests.faults import checkpoints, configs, hub, inputs, process, programs, readers, text
from tests.faults.driver import Row, check
from tests.faults.stock import Stock

TABLES = (checkpoints, configs, hub, inputs, process, programs, readers, text)
ROWS = [row for table in TABLES for row in table.ROWS]


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    import lamzoo.registry.factory  # takes seconds, which are not those of a row

    assert lamzoo.registry.factory
    return Stock(tmp_path_factory.mktemp("stock"))


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.name, marks=pytest.mark.slow if row.slow else ()) for row in ROWS]
)
def test_a_fault_ends_as_its_row_says(
    row: Row, stock: Stock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "work"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    monkeypatch.setattr(trust, "_trusted_here", set())  # other tests in this process may have trusted the same program
    for name, value in row.env.items():
        monkeypatch.setenv(name, value)
    check(row, place, stock, capfd)


def test_the_table_is_as_long_as_promised_and_names_each_row_once() -> None:
    names = Counter(row.name for row in ROWS)
    assert len(names) >= 150
    assert not [name for name, count in names.items() if count > 1]
