"""Files are opened only if they are regular, and JSON and TOML are read and written strictly."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lamzoo.errors import WeightsError
from lamzoo.files import atomic_files
from lamzoo.reading import open_regular, parse_json, parse_toml, read_text, to_json


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
    "text", ["NaN", "[Infinity]", '{"a": -Infinity}', "1e999", "[" * 100_000, "", b"\xff", "1" * 5000]
)
def test_what_is_not_strict_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match="."):
        parse_json(text)


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a", "a = 1" + "0" * 5000])
def test_what_is_not_toml_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="."):
        parse_toml(text)


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
