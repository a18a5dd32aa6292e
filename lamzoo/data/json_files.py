"""Reading of JSON, JSON-lines and other text files, optionally gzipped, and checks of their values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from types import UnionType
from typing import Any

from lamzoo.errors import DataError
from lamzoo.reading import parse_json, read_text, reason


def read_json(path: Path, *, file_names: bool = False) -> Any:
    """Reads a JSON file, UTF-8 with or without a byte order mark; gzipped if its name ends in ``.gz``.

    Args:
        path: the file.
        file_names: as of :func:`lamzoo.reading.parse_json`.

    Raises:
        DataError: the file does not exist or is damaged.
    """
    try:
        return parse_json(read_text(path), file_names=file_names)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not readable JSON: {reason(error)}") from error


def read_json_lines(path: Path) -> list[tuple[dict[str, Any], str]]:
    """Reads a file with one JSON object per line, as for :func:`read_json`; blank lines are skipped.

    Returns:
        Each object, and its line for messages, such as ``"line 3 of data.jsonl"``.

    Raises:
        DataError: the file does not exist or is damaged, or a line is not a JSON object; names the line.
    """
    found = []
    for number, text in enumerate(read_lines(path), start=1):
        if not text.strip():
            continue
        where = f"line {number} of {path}"
        try:
            line = parse_json(text)
        except ValueError as error:
            raise DataError(f"{where} is not JSON: {error}") from error
        if not isinstance(line, dict):
            raise DataError(f"{where} is not a JSON object")
        found.append((line, where))
    return found


def read_lines(path: Path) -> list[str]:
    """Reads the lines of a text file, UTF-8 with or without a byte order mark; gzipped if its name ends in ``.gz``.

    Raises:
        DataError: the file does not exist, is damaged, or is not UTF-8.
    """
    try:
        return read_text(path).removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {reason(error)}") from error


def check_fields(line: Mapping[str, Any], fields: Mapping[str, type | UnionType], where: str) -> None:
    """Checks that an object has fields of these types; booleans, NaN and infinity don't count as numbers.

    Raises:
        DataError: a field is missing, has another type or is not finite; names it.
    """
    for name, kind in fields.items():
        value = line.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            found = f", but {value!r:.60}" if name in line else ""
            raise DataError(f"{where} has no {name!r} of type {getattr(kind, '__name__', kind)}{found}")
        if isinstance(value, (int, float)) and not is_number(value):
            raise DataError(f"{where} has the {name} {value!r:.60}; it must be a finite number")


def is_number(value: Any) -> bool:
    """Returns whether a value is a finite number and not a boolean."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:  # of a whole number
        return False


def is_row(value: Any, length: int | None = None) -> bool:
    """Returns whether a value is a list of finite numbers, of the length given if any."""
    return isinstance(value, list) and all(map(is_number, value)) and length in (None, len(value))


def is_grid(value: Any) -> bool:
    """Returns whether a value is a non-empty list of lists of finite numbers, all of the same length, at least 1."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(is_row(row) and row for row in value)
        and (len({len(row) for row in value}) == 1)
    )
