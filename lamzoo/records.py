"""Dataclasses from TOML, JSON and CSV, with each value checked against its annotation, and back to CSV and TOML."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from lamzoo.errors import DataError, LamzooError
from lamzoo.escaping import csv_line, from_spreadsheet_cell
from lamzoo.files import atomic_files, shortened
from lamzoo.reading import parse_csv, parse_float, parse_int, parse_json, parse_toml, read_text, reason

Record = TypeVar("Record")

_LARGEST_FLOAT = 1e30  # computed with in float32
_LARGEST = 2**63 - 1  # integer of TOML, C and torch


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a number, as metadata of a field's annotation: ``Annotated[int, Limits(least=1)]``.

    Attributes:
        least: the smallest value.
        most: the largest value.
        above: exclusive lower limit.
        below: exclusive upper limit.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def problem(self, value: float) -> str:
        """Returns the rule that a value breaks, such as ``"it must be at least 1"``; empty if it breaks none."""
        low = self.above if self.least is None else self.least
        high = self.below if self.most is None else self.most
        if (low is None or value > low or value == self.least) and (high is None or value < high or value == self.most):
            return ""
        if low is None:
            return f"it must be {'below' if self.most is None else 'at most'} {high}"
        if high is not None:
            return f"it must lie between {low} and {high}"
        if low == 0:
            return "it must be positive" if self.least is None else "it must not be negative"
        return f"it must be {'above' if self.least is None else 'at least'} {low}"


def read_table(path: str | Path, *, what: str, error: type[LamzooError] = DataError) -> dict[str, Any]:
    """Reads nested values from a TOML file, or from JSON if the name ends in ``.json``, without checking them.

    Args:
        path: the file, UTF-8.
        what: the kind of file, for messages: ``"Recipe"``.
        error: the exception to raise.

    Raises:
        LamzooError: ``error``: the file does not exist, is not valid TOML (JSON), or does not hold a table.
    """
    path = Path(path)
    kind = "JSON" if path.suffix.lower() == ".json" else "TOML"
    try:
        text = read_text(path)
        table = parse_json(text, file_names=True) if kind == "JSON" else parse_toml(text)
    except OSError as cause:
        raise error(f"{what} {path} can't be read: {reason(cause)}; give the path of a {kind} file.") from None
    except ValueError as cause:
        raise error(f"{what} {path} is not valid {kind}: {cause}; correct or restore the file.") from None
    if not isinstance(table, dict):
        raise error(f"{what} {path} is not valid: it must hold a table; correct or restore the file.")
    return table


def build(
    cls: type[Record], table: Any, where: str = "", *, source: str, error: type[LamzooError] = DataError
) -> Record:
    """Builds a dataclass from nested values.

    Args:
        cls: a dataclass whose fields are plain values, ``Literal``, ``X | None``, tuples, lists and dictionaries of
            these, or dataclasses. Numbers must be finite, integers have at most 64 bits, and ``Annotated`` ones must
            keep their :class:`Limits`.
        table: the values as TOML or JSON represent them: integers are accepted for floats, lists for tuples.
        where: the keys that lead to the table, for messages: ``"model.kwargs"``.
        source: the origin of the values, for messages: ``"Recipe"``, or the file name with a colon.
        error: the exception to raise.

    Raises:
        LamzooError: ``error``: a key is unknown, missing or mistyped, or a number is out of range; names it, and the
            closest or the allowed ones.
    """
    if not isinstance(table, Mapping):
        raise error(f"{source} entry [{where}] must be a table, not {shortened(repr(table))}.")
    hints = get_type_hints(cls, include_extras=True)
    entries = dataclasses.fields(cls)  # type: ignore[arg-type]
    names = [entry.name for entry in entries]
    dot = f"{where}." if where else ""
    for key in table:
        if key not in names:
            raise error(f"{source} key {dot}{key:.60} is unknown; {_closest(key, names, dot)}")
    for entry in entries:
        if entry.name not in table and not _has_default(entry):
            raise error(f"{source} key {dot}{entry.name} is missing; add it.")
    return cls(**{key: _typed(value, hints[key], dot + key, source, error) for key, value in table.items()})


def _typed(value: Any, hint: Any, where: str, source: str, error: type[LamzooError]) -> Any:
    def each(item: Any, kind: Any) -> Any:
        return _typed(item, kind, where, source, error)

    if hint is Any:
        if isinstance(value, Mapping):
            return {key: _typed(item, Any, f"{where}.{key}", source, error) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(each(item, Any) for item in value)
        if type(value) not in (int, float, str):
            return value
        hint = type(value)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where, source=source, error=error)  # type: ignore[arg-type]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        number = each(value, args[0])
        problem = next((limits.problem(number) for limits in args[1:] if isinstance(limits, Limits)), "")
        if problem:
            raise error(f"{source} key {where} is {number}; {problem}.")
        return number
    if origin in (types.UnionType, typing.Union):  # such as `X | None` or `str | tuple[str, ...]`; TOML has no null
        if value is None and type(None) in args:
            return None
        kinds = (list, tuple) if isinstance(value, (list, tuple)) else (type(value),)
        return each(value, next((arg for arg in args if _class_of(arg) in kinds), args[0]))
    if origin is Literal:
        if value in args:
            return value
        raise error(
            f"{source} key {where} is {shortened(repr(value))}; it must be one of {', '.join(map(repr, args))}."
        )
    if origin is tuple and args[-1] is not Ellipsis:
        if isinstance(value, (list, tuple)) and len(value) == len(args):
            return tuple(map(each, value, args))
        raise error(f"{source} key {where} is {shortened(repr(value))}; it must be {len(args)} numbers.")
    kind = origin or hint
    if kind in (int, float) and isinstance(value, int) and abs(value) > _LARGEST:
        raise error(f"{source} key {where} is {_shown(value)}; it must be below 2**63.")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise error(f"{source} key {where} is {value}; it must be a finite number.")
    if kind is float and isinstance(value, float) and abs(value) > _LARGEST_FLOAT:
        raise error(f"{source} key {where} is {value}; it must be at most {_LARGEST_FLOAT:g}.")
    if isinstance(value, str) and "\0" in value:
        raise error(f"{source} key {where} is {_shown(value)}; it must not contain a NUL character.")
    allowed = (list, tuple) if kind in (list, tuple) else kind
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        name = {list: "list", tuple: "list", Mapping: "table", dict: "table"}.get(kind) or kind.__name__
        raise error(
            f"{source} key {where} is {_shown(value)}; it must be {'an' if name[0] in 'aeiou' else 'a'} {name}."
        )
    if kind in (list, tuple) and args:
        return kind(each(item, args[0]) for item in value)
    if isinstance(value, Mapping) and args:
        return {key: _typed(item, args[1], f"{where}.{key}", source, error) for key, item in value.items()}
    return value


def _class_of(hint: Any) -> Any:
    """Returns the class of an annotation's values, without limits and arguments."""
    hint = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return get_origin(hint) or hint


def _shown(value: Any) -> str:
    return shortened(json.dumps(value, default=str, ensure_ascii=False))


def read_lines(path: str | Path, *, what: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Reads a CSV file with a header.

    Args:
        path: the file, UTF-8.
        what: the kind of file, for messages: ``"results table"``.

    Returns:
        The column names, and for each record the number of its last line in the file and its cells.

    Raises:
        DataError: the file can't be read, is empty or not CSV, repeats a column, or has a record with more or fewer
            cells than columns; names file and line.
    """
    try:
        found = parse_csv(read_text(path, keep_line_ends=True))
    except (OSError, ValueError) as cause:
        raise DataError(f"The {what} {path} cannot be read: {reason(cause)}.") from cause
    lines = [(number, [from_spreadsheet_cell(cell) for cell in cells]) for number, cells in found]
    if not lines:
        raise DataError(f"The {what} {path} is empty; its first line must name the columns.")
    (_, columns), *records = lines
    twice, count = next(iter(Counter(columns).most_common(1)), ("", 1))
    if count > 1:
        raise DataError(f"{path} has the column {twice!r} twice; remove one.")
    for number, cells in records:
        if len(cells) != len(columns):
            raise DataError(f"{path}, line {number}: {len(cells)} cells instead of {len(columns)}; fix or remove it.")
    return columns, records


def read_csv(path: str | Path, cls: type[Record], *, optional: Collection[str] = ()) -> list[Record]:
    """Reads a results table, a CSV file, into a list of dataclasses, one per record.

    Args:
        path: the file; its columns are the fields, in any order. An empty cell is None, or "" for a ``str`` with a
            default.
        cls: a dataclass whose fields are ``str``, ``int``, ``float``, ``bool``, ``Literal`` of strings or one of
            these ``| None``.
        optional: columns that older files lack; they get the field's default.

    Raises:
        DataError: as of :func:`read_lines`; a column is missing or unknown, or a cell has the wrong type; names file,
            line and column.
    """
    columns, records = read_lines(path, what="results table")
    hints = get_type_hints(cls)
    entries = {entry.name: entry for entry in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for column in columns:
        if column not in entries:
            raise DataError(f"{path} has an unknown column {column!r}; {_closest(column, list(entries), quote=True)}")
    for name in entries:
        if name not in columns and name not in optional:
            raise DataError(f"{path} has no column {name!r}; add it, or write the results table again.")

    def parse(cell: str, column: str, number: int) -> Any:
        hint = hints[column]
        args = () if get_origin(hint) is Literal else get_args(hint)
        kind = next((each for each in args if each is not type(None)), hint)
        if not cell and (type(None) in args or (kind is str and _has_default(entries[column]))):
            return None if type(None) in args else ""
        place = f"{path}, line {number}: {column} is {cell!r:.60}"
        if get_origin(kind) is Literal or kind is bool:
            choices = {str(choice): choice for choice in get_args(kind) or (False, True)}
            if cell in choices:
                return choices[cell]
            raise DataError(f"{place}; it must be {' or '.join(choices)}.")
        if not cell:
            raise DataError(f"{place}; it must be a {'name' if kind is str else 'number'}.")
        try:
            return _PARSERS[kind](cell)
        except ValueError as cause:
            raise DataError(f"{place}, which is not {_NAMES[kind]}; fix or remove the line.") from cause

    return [
        cls(**{column: parse(cell, column, number) for column, cell in zip(columns, cells, strict=True)})
        for number, cells in records
    ]


_PARSERS: dict[Any, Callable[[str], Any]] = {str: str, int: parse_int, float: parse_float}
_NAMES = {int: "a whole number", float: "a number"}


def write_csv(
    path: str | Path,
    columns: Sequence[str],
    rows: Iterable[Mapping[str, Any] | Any],
    *,
    cell: Callable[[str, Any], Any] = lambda column, value: value,
    error: type[LamzooError] = DataError,
) -> None:
    """Writes a CSV file atomically; an existing file is replaced.

    Text that a spreadsheet would run as a formula begins with an apostrophe, which :func:`read_lines` removes.

    Args:
        path: the file.
        columns: names of the columns, the header.
        rows: dataclasses or mappings; missing and None values become empty cells.
        cell: formats a value other than None, given its column.
        error: the exception to raise.

    Raises:
        LamzooError: ``error``: the file cannot be written.
    """
    with atomic_files(error) as stage, stage(Path(path)).open("w", newline="", encoding="utf-8") as file:
        file.write(csv_line(columns))
        for row in rows:
            values = row if isinstance(row, Mapping) else vars(row)
            found = ((column, values.get(column)) for column in columns)
            file.write(csv_line(None if value is None else cell(column, value) for column, value in found))


def to_toml(table: Mapping[str, Any], prefix: str = "") -> str:
    """Writes nested plain values as TOML, one table per mapping; None entries are left out.

    Args:
        table: the values; mappings inside lists are written inline.
        prefix: the keys that lead to the table.
    """
    plain = {key: value for key, value in table.items() if not isinstance(value, Mapping) and value is not None}
    tables = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    lines = [f"[{prefix}]\n"] if prefix and (plain or not tables) else []
    lines += [f"{_key(key)} = {_toml_value(value)}\n" for key, value in plain.items()]
    parts = ["".join(lines)] if lines else []
    parts += [to_toml(value, f"{prefix}.{_key(key)}" if prefix else _key(key)) for key, value in tables.items()]
    return "\n".join(parts)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def _toml_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{_key(key)} = {_toml_value(inner)}' for key, inner in value.items())} }}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, str):  # TOML and JSON escapes agree, except for the delete character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _has_default(entry: dataclasses.Field[Any]) -> bool:
    return entry.default is not dataclasses.MISSING or entry.default_factory is not dataclasses.MISSING


def _closest(key: str, known: Sequence[str], dot: str = "", *, quote: bool = False) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f"did you mean {repr(close[0]) if quote else dot + close[0]}?"
    return f"use one of {', '.join(known)}."
