"""Files are opened only if they are regular, and JSON and TOML are read and written strictly."""

from __future__ import annotations

import ast
import gzip
import json
import os
import re
from pathlib import Path

import pytest

from lamzoo.errors import WeightsError
from lamzoo.files import atomic_files
from lamzoo.reading import open_regular, parse_csv, parse_float, parse_int, parse_json, parse_toml, read_text, to_json


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read_text(tmp_path / "text") == "one\ntwo\nthree\n"
    (tmp_path / "link").symlink_to("text")
    with open_regular(tmp_path / "link") as file:
        assert file.read(3) == b"\xef\xbb\xbf"
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    for path, says in ((tmp_path / "pipe", "pipe"), (Path("/dev/null"), "device"), (tmp_path, "folder")):
        with pytest.raises(OSError, match=says):
            open_regular(path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="save it as UTF-8"):
        read_text(tmp_path / "latin")


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        "[Infinity]",
        '{"a": -Infinity}',
        "1e999",
        "[" * 100_000,
        "",
        b"\xff",
        "1" * 5000,
        "[" * 101 + "]" * 101,
        '{"a": 1, "b": 2, "a": 3}',
        '"\\ud800"',
        '["\\udcff"]',
        b"\xff\xfe[\0]\0",
        "\ufeff1",
        "1_000",
        "[1,]",
    ],
)
def test_what_is_not_strict_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match="."):
        parse_json(text)


@pytest.mark.parametrize(
    "text",
    ["a = " + "[" * 100_000, "a", "a = 1" + "0" * 5000, ".".join("a" * 200) + " = 1", "a = nan", "a = 2024-01-31"],
)
def test_what_is_not_toml_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="."):
        parse_toml(text)


def test_documents_of_older_versions_may_have_nan() -> None:
    assert str(parse_json('{"a": [NaN, -Infinity]}', not_finite=True)) == "{'a': [nan, -inf]}"


def test_names_of_files_that_are_not_utf8_are_read_back() -> None:
    name = os.fsdecode(b"\xff.png")
    assert parse_json(to_json({name: 1}), file_names=True) == {name: 1}
    with pytest.raises(ValueError, match=r"an incomplete character, \\udcff"):
        parse_json(to_json({name: 1}))


def test_text_is_decompressed_unless_it_is_a_bomb(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"one\r\n" * 3))
    assert read_text(path) == "one\n" * 3
    assert read_text(path, keep_line_ends=True) == "one\r\n" * 3
    whole = path.read_bytes()
    bomb = gzip.compress(bytes(2**20)) * 20
    for content, says in (
        (whole[:-1], "damaged"),
        (whole[:-5] + b"12345", "damaged"),
        (b"no", "damaged"),
        (bomb, "grow"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=says):
            read_text(path)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_csv_may_have_any_line_ends(end: str) -> None:
    lines = ["a,b", "", '1,"2', '3"', "4,5"]
    assert parse_csv(end.join(lines)) == [(1, ["a", "b"]), (2, []), (4, ["1", f"2{end}3"]), (5, ["4", "5"])]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('a,b\n1,"2\n3,4\n', "line 2 has a double quote that is not closed"),
        ('a\n"1"2\n', "line 2 is not CSV"),
        ("a\n" + "1" * 200_000, "line 2 has a cell of more than 131072 characters"),
    ],
)
def test_a_fault_in_csv_is_named_by_its_line(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_csv(text)


def test_numbers_have_ascii_digits_only() -> None:
    assert [parse_int(text) for text in ("0", "-12", "+7", "007")] == [0, -12, 7, 7]
    assert [parse_float(text) for text in ("1", "-.5", "2.", "1e-3", "+1.5E+2")] == [1.0, -0.5, 2.0, 1e-3, 150.0]
    for text in ("", " 1", "1 ", "1_000", "١٢", "²", "１", "0x1", "- 1"):
        with pytest.raises(ValueError, match="is not a whole number"):
            parse_int(text)
        with pytest.raises(ValueError, match="is not a (finite )?number"):
            parse_float(text)
    for text in ("nan", "inf", "-Infinity", "1e400", "1,5"):
        with pytest.raises(ValueError, match="is not a (finite )?number"):
            parse_float(text)


def test_json_is_written_without_nan_and_without_broken_text() -> None:
    nan, inf = float("nan"), float("inf")
    assert parse_json(to_json({"é": [nan, (1.5, -inf)], "b": {"c": inf}})) == {
        "é": [None, [1.5, None]],
        "b": {"c": None},
    }
    assert to_json("é") == '"é"'
    name = os.fsdecode(b"\xff.png")
    assert json.loads(to_json([name, "é"]).encode()) == [name, "é"]


def test_a_device_or_folder_is_never_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, says in (("pipe", "pipe, socket or device"), ("folder", "a folder")):
        with pytest.raises(WeightsError, match=says), atomic_files() as stage:
            stage(tmp_path / name).write_text("text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]


# Calls that read a file or text without the guards of lamzoo.reading and lamzoo.data.arrays, and who may make them.
UNGUARDED = {
    "json.load", "json.loads", "tomllib.load", "tomllib.loads", "np.load", "np.loadtxt", "np.genfromtxt", "np.fromfile",
    "csv.reader", "csv.DictReader", "gzip.open", "gzip.decompress", "zipfile.ZipFile", "read_text", "open",
}  # fmt: skip
GUARDS = {"lamzoo/reading.py", "lamzoo/data/arrays.py"}
ALLOWED = {
    "lamzoo/profiling/worker.py: json.loads": "a line of the process that started it",
    "lamzoo/profiling/job.py: json.loads": "a line of the process that it started",
    "lamzoo/profiling/latency.py: read_text": "/proc/cpuinfo",
    "lamzoo/profiling/memory.py: read_text": "/proc/meminfo and the like",
    "lamzoo/weights/files.py: json.loads": "the header of a file that it has just written",
    "lamzoo/report/compare/page.py: read_text": "files of packages",
    "lamzoo/report/explorer/document.py: read_text": "files of packages",
    "benchmarks/focus_vit.py: zipfile.ZipFile": "a member of a known sha256",
    "lamzoo/cli/_output.py: open": "the null device",
    "lamzoo/cli/_process.py: open": "a standard stream",
}


def unguarded(path: Path) -> set[str]:
    """The calls of UNGUARDED in a module; for ``path.read_text()`` that is ``read_text``."""
    text = path.read_text(encoding="utf-8")
    if not any(re.search(rf"\b{re.escape(name)}\(", text) for name in UNGUARDED):
        return set()
    functions = [ast.unparse(node.func) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    found = {name for name in functions if name in UNGUARDED and name != "read_text"}
    return found | {"read_text" for name in functions if name.endswith(".read_text")}


def test_files_are_read_through_the_guards() -> None:
    root = Path(__file__).resolve().parents[1]
    paths = {
        path.relative_to(root).as_posix(): path
        for name in ("lamzoo", "benchmarks")
        for path in (root / name).rglob("*.py")
    }
    found = {f"{name}: {call}" for name, path in paths.items() if name not in GUARDS for call in unguarded(path)}
    new, gone = (", ".join(sorted(names)) for names in (found - set(ALLOWED), set(ALLOWED) - found))
    assert not new, f"read these with lamzoo.reading or lamzoo.data.arrays: {new}"
    assert not gone, f"remove these from ALLOWED: {gone}"


def test_a_hundred_levels_are_read_and_brackets_in_text_are_none() -> None:
    parse_json("[" * 100 + "1" + "]" * 100)
    assert parse_json(json.dumps("[" * 1000)) == "[" * 1000
