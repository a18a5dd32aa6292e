"""Results files of dataclass rows: CSV, one column a field, whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from lamzoo import records

Row = TypeVar("Row")


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Returns the rows of a results file as a dataclass; none where there is no such file."""
    return records.read_csv(path, kind) if path.exists() else []


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Writes the rows, of one dataclass and at least one, to a results file."""
    records.write_csv(path, [field.name for field in fields(rows[0])], rows)
