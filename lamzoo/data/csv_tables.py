"""CSV tables that have a line of headings."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lamzoo.data.json_files import reason
from lamzoo.data.paths import nfc
from lamzoo.errors import DataError

_UNCLOSED = "unexpected end of data"  # how csv calls it


@dataclass(frozen=True)
class Table:
    """A CSV file that has a line of headings.

    Attributes:
        path: the file.
        headings: the names of its columns, stripped and in NFC; ``""`` for a column without a name.
        rows: the lines below them: the number of each and its stripped cells, as many as there are headings.
    """

    path: Path
    headings: tuple[str, ...]
    rows: Sequence[tuple[int, Sequence[str]]]

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raises a :class:`DataError` if a column is missing."""
        missing = next((column for column in columns if column not in self.headings), None)
        if missing is not None:
            found = ", ".join(repr(heading) for heading in self.headings if heading) or "none"
            raise DataError(
                f"{self.path} has no column {missing!r}; its first line must name the columns, and names {found}"
            )

    def select(self, columns: Iterable[str]) -> Iterator[tuple[int, dict[str, str]]]:
        """Yields the number of each line and its cells by their headings, in the columns that the file has."""
        places = {column: self.headings.index(column) for column in columns if column in self.headings}
        for number, cells in self.rows:
            yield number, {column: cells[place] for column, place in places.items()}

    def select_filled(self, columns: Iterable[str]) -> Iterator[tuple[int, dict[str, str]]]:
        """Yields as :meth:`select`; raises a :class:`DataError` if there is no line, or a cell is empty."""
        for number, row in self.select(columns):
            empty = next((heading for heading, cell in row.items() if not cell), None)
            if empty is not None:
                raise DataError(f"line {number} of {self.path} has no {empty!r}; write one, or remove it")
            yield number, row
        if not self.rows:
            raise DataError(f"{self.path} has no line below its headings")


def open_table(path: Path) -> Table:
    """Reads a CSV file that has a line of headings.

    Args:
        path: the file, UTF-8. Empty lines are skipped; a line may end early.

    Raises:
        DataError: the file does not exist or is not CSV, two columns have the same name, or a line has more cells than
            there are headings, as from a comma that is not quoted, or a quote that is not closed; names the line.
    """
    rows: list[tuple[int, list[str]]] = []
    begin = 1  # line of the record that is being read, which may have several
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            headings = [nfc(heading.strip()) for heading in next(reader, [])]
            named = max((place for place, heading in enumerate(headings, 1) if heading), default=0)
            begin = reader.line_num + 1
            for cells in map(_stripped, reader):
                if len(cells) > len(headings) or any(cells[named:]):
                    raise DataError(
                        f"line {reader.line_num} of {path} has {len(cells)} cells, and the first line has {named} "
                        "headings; put a text that has a comma into double quotes"
                    )
                if cells:
                    rows.append((reader.line_num, cells + [""] * (len(headings) - len(cells))))
                begin = reader.line_num + 1
    except csv.Error as error:
        if str(error) == _UNCLOSED:
            raise DataError(f"line {begin} of {path} opens a double quote that is never closed; close it") from error
        raise DataError(f"cannot read line {begin} of {path}: {error}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {reason(error)}") from error
    twice = next((heading for heading in headings if heading and headings.count(heading) > 1), None)
    if twice is not None:
        raise DataError(f"{path} has the heading {twice!r} twice; rename or remove one of these columns")
    return Table(path, tuple(headings), rows)


def read_table(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> list[dict[str, str]]:
    """Reads columns of a CSV file that has a line of headings.

    Args:
        path: the file, UTF-8.
        columns: those that must be there.
        optional: those that are read where there are any.

    Returns:
        The stripped cells of each line by their heading; none of them is empty.

    Raises:
        DataError: see :func:`open_table`; or a column is missing, or a cell of one is empty.
    """
    table = open_table(path)
    table.check_columns(columns)
    return [row for _, row in table.select_filled([*columns, *optional])]


def finite_seconds(text: str) -> float:
    """Returns a cell's time, seconds; raises a ValueError if it is no finite number."""
    seconds = float(text)
    if not math.isfinite(seconds):
        raise ValueError(f"{text!r} is not finite")
    return seconds


def _stripped(cells: list[str]) -> list[str]:
    return [cell.strip() for cell in cells]
