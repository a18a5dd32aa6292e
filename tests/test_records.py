"""Dataclasses read from TOML, JSON and CSV: what is read is typed, and what can't be read is named."""

from __future__ import annotations

import csv
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lamzoo.errors import ConfigError, DataError
from lamzoo.records import build, read_csv, read_lines, read_table, write_csv


@dataclass(frozen=True)
class Part:
    size: tuple[int, float] = (1, 1.0)
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Whole:
    name: str
    share: float = 0.5
    parts: dict[str, Part] = field(default_factory=dict)
    at: list[int] | None = None
    on: bool = False


def test_nested_values_become_the_annotated_types() -> None:
    table = {"name": "x", "share": 1, "parts": {"one": {"size": [2, 3]}}, "at": [4], "on": True}
    whole = build(Whole, table, source="The file:")
    assert whole == Whole("x", 1.0, {"one": Part((2, 3.0))}, [4], True)
    assert isinstance(whole.share, float)
    assert build(Whole, {"name": "x", "at": None}, source="The file:") == Whole("x")


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"nam": "x"}, "key nam is unknown; did you mean name?"),
        ({"name": "x", "zzz": 1}, "key zzz is unknown; use one of name, share, parts, at, on."),
        ({}, "key name is missing; add it."),
        ({"name": 3}, "key name is 3; it must be a str."),
        ({"name": "x", "on": 1}, "key on is 1; it must be a bool."),
        ({"name": "x", "share": True}, "key share is true; it must be a float."),
        ({"name": "x", "at": [1, "2"]}, 'key at is "2"; it must be an int.'),
        ({"name": "x", "parts": 1}, "key parts is 1; it must be a table."),
        ({"name": "x", "parts": {"one": 1}}, "entry [parts.one] must be a table, not 1."),
        ({"name": "x", "parts": {"one": {"sise": 1}}}, "key parts.one.sise is unknown; did you mean parts.one.size?"),
        ({"name": "x", "parts": {"one": {"size": [1]}}}, "key parts.one.size is [1]; it must be 2 numbers."),
        ({"name": "x", "parts": {"one": {"kind": "c"}}}, "key parts.one.kind is 'c'; it must be one of 'a', 'b'."),
    ],
)
def test_a_wrong_key_is_named_with_what_is_allowed(table: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"The file: {says}")):
        build(Whole, table, source="The file:", error=ConfigError)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("x.toml", "a = ", "is not valid TOML"),
        ("x.json", "[1]", "it must hold a table"),
        ("x.json", "{", "not valid JSON"),
    ],
)
def test_a_file_without_a_table_is_named(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=f"Plan {re.escape(str(tmp_path / name))} .*{says}"):
        read_table(tmp_path / name, what="Plan")


@dataclass(frozen=True)
class Line:
    name: str
    count: int | None
    fast: bool
    note: str = ""


def test_lines_are_read_back_and_new_columns_are_optional(tmp_path: Path) -> None:
    lines = [Line("a", 1, True, "x,\ny"), Line("b", None, False)]
    write_csv(tmp_path / "r.csv", ["name", "count", "fast", "note"], lines)
    assert read_csv(tmp_path / "r.csv", Line) == lines
    write_csv(tmp_path / "r.csv", ["fast", "name", "count"], lines)
    assert read_csv(tmp_path / "r.csv", Line, optional=("note",)) == [Line("a", 1, True), Line("b", None, False)]
    with pytest.raises(DataError, match="no column 'note'"):
        read_csv(tmp_path / "r.csv", Line)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("a,x,True,", "line 2: count is 'x', which is not a whole number"),
        ("a,1,yes,", "line 2: fast is 'yes'; it must be False or True"),
        (",1,True,", "line 2: name is ''; it must be a name"),
        ("a,1", "line 2: 2 cells instead of 4"),
    ],
)
def test_a_wrong_cell_is_named_with_file_and_line(tmp_path: Path, line: str, says: str) -> None:
    (tmp_path / "r.csv").write_text(f"name,count,fast,note\n{line}\n")
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'r.csv'}, {says}")):
        read_csv(tmp_path / "r.csv", Line)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20))  # text has no NUL
@settings(max_examples=10)
@example("=cmd|' /C calc'!A0")
@example("-1.5")
@example("\t@SUM(A1)")
@example("\r\t")  # a tab that begins a line of the cell, and not the cell
def test_text_reads_back_the_same_and_begins_no_formula(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        write_csv(path, ["model", "error"], [{"model": text, "error": text}])
        _, ((_, cells),) = read_lines(path, what="table")
        assert cells == [text, text]
        with path.open(newline="", encoding="utf-8") as file:
            assert not any(cell.startswith(("=", "@", "\t")) for line in csv.reader(file) for cell in line)
