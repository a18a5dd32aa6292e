"""What is seen while a command works: lines in a pipe, a bar on a terminal, and a log of one line a record."""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from collections.abc import Callable

import pytest

from lamzoo.cli import _output as out


def test_without_a_terminal_progress_is_a_line_from_time_to_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(out.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(out, "_LINE_SECONDS", 15.0)
    with out.progress_bar("a model", ends=True) as advance:
        for done in range(1, 1001):
            now[0] += 1.0
            advance(done, 1000, "top-1 5 %")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "a model: 15 of 1,000, top-1 5 %"
    assert lines[-1] == "a model: 1,000 of 1,000, top-1 5 %"
    assert 20 < len(lines) < 40  # rarer the longer it takes


def test_hidden_progress_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with out.progress_bar("a model", hidden=True, ends=True) as advance:
        advance(3, 3)
    assert capsys.readouterr().err == ""


def test_on_a_terminal_progress_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with out.progress_bar("a model", ends=True) as advance:
        advance(1, 2, "half")
    shown = capsys.readouterr().err
    assert "\x1b[" in shown and "1/2" in shown and "half" in shown
    assert "1 of 2" not in shown


@pytest.mark.parametrize("write", [logging.getLogger("lamzoo.registry.saving").warning, out.print_error])
def test_a_line_during_progress_replaces_the_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], write: Callable[[str], None]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    out.log_to_stderr(verbose=False)
    with out.progress_bar("a model") as advance:
        advance(1, 2)
        write("a line")
        shown = capsys.readouterr().err
        before, _, after = shown.partition("a line")
        assert re.search(r"\r(\x1b\[2K)(\x1b\[[\d;]*m|warning: |lamzoo: )*$", before)  # the bar is erased
        assert after.startswith(("\n", "\x1b[0m\n")) and "a model" in after  # and drawn again below the line
    write("a last line")
    assert "\x1b[2K" not in capsys.readouterr().err.partition("a last line")[2]


def test_at_80_columns_count_note_and_time_are_beside_the_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "80")
    with out.progress_bar("lam_clip4clip_tiny on grid:/a/long/path/to/some/videos") as advance:
        advance(5, 2000, "epoch 1 of 10, loss 2.345, t2v_R1 12.34, v2t_R1 12.34, t2v_R5 45.67")
    line = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", capsys.readouterr().err).rstrip().splitlines()[-1]
    assert len(line) <= 80
    assert re.search(r"^lam_clip4clip_tiny on.*… [━╸╺ -]{20} +5/2000 epoch 1 of.*… -:--:--$", line)


@pytest.mark.parametrize(("level", "prefix"), [(logging.INFO, ""), (logging.WARNING, "warning: ")])
def test_a_log_record_is_one_line_however_long(capsys: pytest.CaptureFixture[str], level: int, prefix: str) -> None:
    out.log_to_stderr(verbose=True)
    text = "loaded " + ", ".join(f"blocks.{number}.attn [dropped]" for number in range(20))
    logging.getLogger("lamzoo.registry.saving").log(level, "%s", text)
    assert capsys.readouterr().err == f"{prefix}{text}\n"


@pytest.mark.parametrize("show", [out.print_error, logging.getLogger("lamzoo.registry.saving").warning])
def test_a_name_of_endless_length_leaves_the_way_out_readable(
    capsys: pytest.CaptureFixture[str], show: Callable[[str], None]
) -> None:
    out.log_to_stderr(verbose=False)
    path = "/".join(["folder"] * 60)
    for name in ("a" * 100_000, "a " * 50_000):
        show(f"cannot read {path}/{name}; use a shorter name than {name}, or another folder than {path}")
        error = capsys.readouterr().err
        assert len(error) < 5000
        assert "cannot read folder/" in error
        assert error.endswith(f", or another folder than {path}\n")


@pytest.mark.parametrize(
    "show",
    [
        out.print_line,
        out.print_error,
        logging.getLogger("lamzoo.registry.saving").warning,
        lambda text: out.print_table((text, "b"), [(text, text)], title=text),
        lambda text: out.print_table(("a", "b"), [(text, text)], compact=True),
        out.print_json,
    ],
    ids=["line", "error", "log", "table", "compact", "json"],
)
def test_what_is_shown_holds_no_character_that_a_terminal_obeys(
    capsys: pytest.CaptureFixture[str], show: Callable[[str], None]
) -> None:
    out.log_to_stderr(verbose=False)
    show("a\x1b]8;;http://x\x07b\x9b2J\u202ec\r\bd")
    shown = "".join(capsys.readouterr())
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown)
    assert "http://x" in shown and ("x1b" in shown or "u001b" in shown)


def test_json_with_hidden_characters_holds_the_same_values(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"a\x1b\x9b": ["\u202e\U000e0041\u200b", "é 👩\u200d👧", 1.5]}
    out.print_json(value)
    shown = capsys.readouterr().out
    assert json.loads(shown) == value
    assert "é 👩\u200d👧" in shown and not re.search("[\x80-\x9f\u202e\U000e0041\u200b]", shown)


def test_the_bar_shows_no_control_character_of_a_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with out.progress_bar("a\x9b2J") as advance:
        advance(1, 2, "b\x07")
    shown = capsys.readouterr().err
    assert r"a\x9b2J" in shown and r"b\x07" in shown and not re.search("[\x07\x9b]", shown)


@pytest.mark.parametrize("columns", ["20", "1", "0"])
def test_on_a_very_narrow_terminal_no_word_of_a_table_is_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: str
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", columns)
    out.print_table(
        ("model", "GMACs"), [("lam_vit_micro.cifar10", 0.1), ("vit_micro", None)], title="the zoo, all of it"
    )
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert "lam_vit_micro.cifar10" in shown
    if columns != "0":  # which means that the width is unknown
        assert shown == "the zoo, all of it\nmodel: lam_vit_micro.cifar10\nGMACs: 0.10\n\nmodel: vit_micro\n\n"
    with out.progress_bar("a model") as advance:
        advance(1, 2, "half")
    out.print_error("an error")
    assert "an error\n" in capsys.readouterr().err


def test_warnings_of_other_libraries_are_escaped() -> None:
    with out.safe_streams():
        text = warnings.formatwarning("a\x1b[2J", UserWarning, "file.py", 1, "")
    assert r"UserWarning: a\x1b[2J" in text and "\x1b" not in text


def test_a_document_is_escaped_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for terminal, shown in ((False, 'a = "\x9b"\n'), (True, 'a = "\\x9b"\n')):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        out.print_text('a = "\x9b"\n')
        assert capsys.readouterr().out == shown
