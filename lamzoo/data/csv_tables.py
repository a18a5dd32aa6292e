"""CSV tables with a header line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lamzoo.data.paths import nfc
from lamzoo.errors import DataError
from lamzoo.reading import parse_csv, read_text, reason


@dataclass(frozen=True)
class Table:
    """A CSV file with a header line.

    Attributes:
        path: the file.
        headings: the names of its columns, stripped and in NFC; ``""`` for a column without a name.
        rows: line number and stripped cells of each row, as many cells as there are headings.
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
        """Yields line number and cells by heading of each row; columns that the file lacks are omitted."""
        known = {heading: place for place, heading in enumerate(self.headings)}
        places = {column: known[column] for column in columns if column in known}
        for number, cells in self.rows:
            yield number, {column: cells[place] for column, place in places.items()}

    def select_filled(self, columns: Iterable[str]) -> Iterator[tuple[int, dict[str, str]]]:
        """Yields as :meth:`select`; raises a :class:`DataError` if there are no rows, or a cell is empty."""
        for number, row in self.select(columns):
            empty = next((heading for heading, cell in row.items() if not cell), None)
            if empty is not None:
                raise DataError(f"line {number} of {self.path} has no {empty!r}; fill it in, or remove the line")
            yield number, row
        if not self.rows:
            raise DataError(f"{self.path} has no rows after its header line")


def open_table(path: Path) -> Table:
    """Reads a CSV file with a header line.

    Args:
        path: the file, UTF-8. Empty lines are skipped; trailing cells may be missing.

    Raises:
        DataError: the file does not exist or is not CSV, two columns have the same name, a row has more cells than
            there are headings, as with an unquoted comma, or a quote is not closed; names the line.
    """
    try:
        (_, first), *records = parse_csv(read_text(path, keep_line_ends=True)) or [(1, [])]
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {reason(error)}") from error
    headings = [nfc(heading.strip()) for heading in first]
    named = max((place for place, heading in enumerate(headings, 1) if heading), default=0)
    rows = []
    for number, cells in records:
        if len(cells) > len(headings) or any(map(str.strip, cells[named:])):
            raise DataError(
                f"line {number} of {path} has {len(cells)} cells, and the first line has {named} headings; put double "
                "quotes around text with commas"
            )
        if cells:
            rows.append((number, [cell.strip() for cell in cells] + [""] * (len(headings) - len(cells))))
    twice, count = next(iter(Counter(filter(None, headings)).most_common(1)), ("", 1))
    if count > 1:
        raise DataError(f"{path} has the heading {twice!r} twice; rename or remove one of these columns")
    return Table(path, tuple(headings), rows)


def read_table(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> list[dict[str, str]]:
    """Reads columns of a CSV file with a header line.

    Args:
        path: the file, UTF-8.
        columns: required columns.
        optional: columns to read if present.

    Returns:
        The stripped cells of each row by heading, none of them empty.

    Raises:
        DataError: as for :func:`open_table`; or a column is missing, or one of its cells is empty.
    """
    table = open_table(path)
    table.check_columns(columns)
    return [row for _, row in table.select_filled([*columns, *optional])]
