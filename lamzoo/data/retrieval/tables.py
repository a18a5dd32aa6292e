"""The small text files that say which caption belongs to which video: CSV tables, JSON and JSON lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lamzoo.errors import DataError


def read_table(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> list[dict[str, str]]:
    """Reads columns of a CSV file that has a line of headings.

    Args:
        path: the file, UTF-8.
        columns: those that must be there.
        optional: those that are read where there are any.

    Returns:
        The stripped cells of each line by their heading; none of them is empty.

    Raises:
        DataError: there is no such file, it is no CSV, a column is missing, or a cell of one is empty.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            headings = {heading.strip(): heading for heading in reader.fieldnames or ()}
            wanted = _wanted(path, columns, optional, headings)
            rows = []
            for cells in reader:
                row = {heading: (cells[headings[heading]] or "").strip() for heading in wanted}
                empty = [heading for heading, cell in row.items() if not cell]
                if empty:
                    raise DataError(f"line {reader.line_num} of {path} has no {empty[0]!r}; write one, or remove it")
                rows.append(row)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {_reason(error)}") from error
    if not rows:
        raise DataError(f"{path} has no line below its headings")
    return rows


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        DataError: there is no such file, or it is not whole.
    """
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no readable JSON: {_reason(error)}") from error


def read_json_lines(path: Path, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    """Reads a file with one JSON object a line.

    Args:
        path: the file, UTF-8; empty lines are passed over.
        fields: what each object must have, and of which type.

    Raises:
        DataError: there is no such file, or a line is not as it should be; names the line.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {_reason(error)}") from error
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"line {number} of {path} is no JSON: {error}") from error
        for field, kind in fields.items():
            if not isinstance(record, dict) or not isinstance(record.get(field), kind):
                raise DataError(f"line {number} of {path} has no {field!r} of type {kind.__name__}")
        records.append(record)
    return records


def _wanted(path: Path, columns: Sequence[str], optional: Sequence[str], headings: Mapping[str, str]) -> list[str]:
    missing = [column for column in columns if column not in headings]
    if missing:
        found = ", ".join(map(repr, headings)) or "none"
        raise DataError(f"{path} has no column {missing[0]!r}; its first line must name the columns, and names {found}")
    return [*columns, *(column for column in optional if column in headings)]


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
