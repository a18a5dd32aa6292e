"""Results files of dataclass rows: CSV, one column a field, whole or not at all."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import lamzoo
from lamzoo.files import atomic_files

Row = TypeVar("Row")

_KINDS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "float | None": lambda text: float(text) if text else None,
}


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Returns the rows of a results file as a dataclass; none where there is no such file."""
    if not path.exists():
        return []
    kinds = {field.name: _KINDS.get(str(field.type), str) for field in fields(kind)}  # type: ignore[arg-type]
    with path.open(newline="", encoding="utf-8") as file:
        return [kind(**{name: convert(row[name]) for name, convert in kinds.items()}) for row in csv.DictReader(file)]


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Writes the rows, of one dataclass and at least one, to a results file."""
    with atomic_files(lamzoo.LamzooError) as stage, stage(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
