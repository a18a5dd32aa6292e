"""Results files of dataclass rows: CSV with one column per field, written atomically."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from lamzoo import records

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "benchmarks" / "results"  # folder of the results files

Row = TypeVar("Row")


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Reads the rows of a results file into a dataclass; returns none if the file does not exist.

    Columns of fields with a default may be missing.
    """
    optional = [field.name for field in fields(kind) if field.default is not MISSING]  # type: ignore[arg-type]
    return records.read_csv(path, kind, optional=optional) if path.exists() else []


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Writes rows of one dataclass, at least one, to a results file."""
    records.write_csv(path, [field.name for field in fields(rows[0])], rows)


def markdown(heads: Sequence[str], lines: Iterable[Iterable[object]]) -> str:
    """Returns a Markdown table of headings and lines of cells."""
    head, *rest = (f"| {' | '.join(map(str, cells))} |\n" for cells in (heads, *lines))
    return "".join([head, "|" + "---|" * len(heads) + "\n", *rest])


def measured_on(conditions: Iterable[str]) -> str:
    """Returns the line below a table that names each condition of its rows once; nothing if there are no rows."""
    found = sorted(set(conditions))
    return f"\nMeasured on: {'; '.join(found)}.\n" if found else ""


def with_quartiles(ratio: float, first: float, third: float) -> str:
    """Returns a cell with a median ratio and its first and third quartile."""
    return f"{ratio:.2f} ({first:.2f}-{third:.2f})"
