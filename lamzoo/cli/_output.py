"""Printing on the command line: tables, JSON, progress bars, log lines and one-line errors."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TextIO

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from lamzoo.errors import LamzooError, MissingExtraError
from lamzoo.escaping import printable
from lamzoo.reading import to_json

if TYPE_CHECKING:
    from lamzoo.tasks import ScoreTable

_NARROW = 40  # width of a terminal below which columns would be cut to single letters
_DEFAULT_WIDTH = 80  # width of a terminal that states none
_PIPE_WIDTH = 200  # width of a table that is written to a file or a pipe
_LINE_SECONDS = 15.0  # initial interval of progress lines without a terminal
_LINE_SHARE = 0.1  # later interval, as a fraction of the elapsed time
_BAR_WIDTH = 20
_LONGEST_WORD = 500  # characters of one word of a message, such as a path
_LONGEST_LINE = 4000
_logger = logging.getLogger(__name__)

_bar_console: Console | None = None  # console of the current progress bar


class Advance(Protocol):
    """Moves a progress bar to ``done`` of ``total`` and shows ``note`` beside it."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    title: str | None = None,
    numbers: Collection[int] = (),
    compact: bool = False,
) -> None:
    """Prints a table to stdout; columns of numbers are right-aligned.

    On a terminal of less than 40 characters, each row is a list of its cells, one per line.

    Args:
        columns: headings.
        rows: values; None prints as an empty cell. Strings are not parsed as rich markup.
        title: above the table.
        numbers: indices of columns of numbers written as text, which are right-aligned too, never wrapped, and may have
            several lines.
        compact: draw no lines and separate columns by one space.
    """
    if (console := _stdout()).width < _NARROW:
        _print_cells(columns, rows, title)
        return
    lines: dict[str, Any] = {"box": None, "padding": (0, 1, 0, 0), "pad_edge": False} if compact else {}
    table = Table(title=_text(title) if title else None, title_justify="left", header_style="bold", **lines)
    for index, heading in enumerate(columns):
        values = [row[index] for row in rows if row[index] is not None]
        numeric = index in numbers or (bool(values) and all(isinstance(value, (int, float)) for value in values))
        justify: Literal["left", "right"] = "right" if numeric else "left"
        table.add_column(_text(heading, keep="\n"), justify=justify, overflow="fold", no_wrap=index in numbers)
    for row in rows:
        table.add_row(*(_text(_cell(value), keep="\n" if i in numbers else "") for i, value in enumerate(row)))
    console.print(table)


def _print_cells(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None) -> None:
    if title:
        print_line(title)
    for row in rows:
        for heading, value in zip(columns, row, strict=True):
            if cell := _cell(value):
                print_line(": ".join(filter(None, (" ".join(heading.split()), " ".join(cell.split())))))
        print_line("")


def print_scores(table: ScoreTable, title: str) -> None:
    """Prints scores, as of :meth:`lamzoo.tasks.Task.score_table`, below a title."""
    print_line(title)  # the title of a narrow table would be wrapped
    texts = {0, *(index for index, heading in enumerate(table.columns) if not heading)}
    numbers = [index for index in range(len(table.columns)) if index not in texts]
    print_table(table.columns, table.rows, numbers=numbers)


def terminal_width() -> int:
    """Returns the width of stdout in characters."""
    return _stdout().width


def print_text(text: str) -> None:
    """Writes a document to stdout: as it is to a file or pipe, and :func:`printable` to a terminal."""
    sys.stdout.write(printable(text, keep="\n\t") if sys.stdout.isatty() else text)


def print_json(value: Any) -> None:
    """Prints one JSON document to stdout, in which hidden characters are escaped."""
    text = to_json(value, indent=2) + "\n"  # the line ends of the document itself are its only control characters
    sys.stdout.write(printable(text, keep="\n", escape=lambda letter: json.dumps(letter)[1:-1]))


def write_json(path: Path, value: Any) -> None:
    """Writes one JSON document to a file, atomically.

    Raises:
        WeightsError: the file cannot be written.
    """
    from lamzoo.files import atomic_files

    with atomic_files() as stage:
        stage(path).write_text(to_json(value, indent=2) + "\n", encoding="utf-8", newline="\n")


def is_main_process() -> bool:
    """Returns whether this is the main process of ``torchrun`` or ``accelerate launch``, the one that prints."""
    return os.environ.get("RANK", "0") == "0"


def print_line(text: str) -> None:
    """Prints one line to stdout, unwrapped."""
    _stdout().print(_text(text), soft_wrap=True)


def drawable(path: Path | None, default: Path, what: str) -> Path | None:
    """Returns the path of a picture of frames after a check that it can be drawn.

    Args:
        path: as requested; None if it was not.
        default: the path if it was not requested.
        what: name of the picture in messages: ``"contact sheet"``.

    Returns:
        ``path`` or ``default``; None, with a warning, if it was not requested and matplotlib is not installed.

    Raises:
        DataError: as of :func:`lamzoo.report.frame_rows.check_rows`.
        MissingExtraError: the picture was requested, and matplotlib is not installed.
    """
    from lamzoo.report.frame_rows import check_rows

    try:
        check_rows(path or default, what)
    except MissingExtraError as error:
        if path is not None:
            raise
        _logger.warning("no %s is drawn: %s", what, error)
        return None
    return path or default


def print_error(*lines: str) -> None:
    """Prints red lines to stderr, each text on one line, unwrapped."""
    text = "\n".join(map(_one_line, lines))
    _stderr().print(_text(f"lamzoo: {text}", keep="\n", style="red"), soft_wrap=True)


def print_traceback(error: BaseException) -> None:
    """Prints the traceback of an error to stderr."""
    sys.stderr.write(printable("".join(traceback.format_exception(error)), keep="\n"))


@contextmanager
def safe_streams() -> Iterator[None]:
    """Replaces ``sys.stdout`` and ``sys.stderr`` by :class:`_Stream`, and escapes the warnings of other libraries."""
    before, written = (sys.stdout, sys.stderr), warnings.formatwarning

    def escaped(*facts: Any, **more: Any) -> str:
        return printable(written(*facts, **more), keep="\n")

    sys.stdout, sys.stderr = _Stream(sys.stdout, required=True), _Stream(sys.stderr, required=False)
    warnings.formatwarning = escaped
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        warnings.formatwarning = written


class _Stream(io.TextIOBase):
    """A standard stream that a full disk or a reader that has gone turns into the null device.

    After a closed pipe, as of ``head``, the command goes on and writes its files.

    Args:
        stream: the stream.
        required: after other errors than a closed pipe, :meth:`flush` raises a :class:`LamzooError`.
    """

    def __init__(self, stream: TextIO, *, required: bool) -> None:
        self._stream, self._required = stream, required
        self._failure: OSError | None = None
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for names outside the terminal's encoding

    def close(self) -> None:  # called when the object is deleted; the stream itself stays open
        self._failure = None
        super().close()

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._discard(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._discard(error)
        if self._failure is not None:
            reason = self._failure.strerror
            raise LamzooError(f"cannot write to the standard output ({reason}); redirect it to a place with free space")

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self._stream.errors

    @property
    def buffer(self) -> Any:
        return self._stream.buffer

    def _discard(self, error: OSError) -> None:
        with contextlib.suppress(io.UnsupportedOperation), open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), self._stream.fileno())  # also for what is buffered
        if self._required and error.errno not in (errno.EPIPE, errno.EINVAL):  # the latter on Windows
            self._failure = error


def path_text(path: str | os.PathLike[str]) -> str:
    """Returns a file name as text, even if its bytes are not UTF-8."""
    return os.fsencode(path).decode("utf-8", "replace")


@contextmanager
def progress_bar(title: str, *, hidden: bool = False, ends: bool = False) -> Iterator[Advance]:
    """Shows progress on stderr: a bar on a terminal, otherwise a line from time to time.

    Args:
        title: text before the bar.
        hidden: show nothing.
        ends: without a terminal, also write a line at the end.

    Yields:
        The function that updates the progress.
    """
    global _bar_console
    console = _stderr()
    if hidden or not console.is_terminal:
        yield _lines(title, hidden, ends)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # 0.1 s

    uncut = partial(Column, no_wrap=True)
    cut = partial(uncut, overflow="ellipsis")
    columns = (
        TextColumn("{task.description}", markup=False, table_column=cut(max_width=console.width // 3)),
        BarColumn(bar_width=_BAR_WIDTH),
        MofNCompleteColumn(table_column=uncut()),
        TextColumn("{task.fields[note]}", markup=False, table_column=cut(ratio=1)),
        TimeRemainingColumn(table_column=uncut()),
    )
    with Progress(*columns, console=console, transient=True, expand=True) as progress:
        task = progress.add_task(printable(title), total=None, note="")

        def advance(done: int, total: int, note: str = "") -> None:
            progress.update(task, completed=done, total=total, note=printable(note))

        _bar_console, outer = console, _bar_console
        try:
            yield advance
        finally:
            _bar_console = outer


def log_to_stderr(verbose: bool) -> None:
    """Writes the library's log to stderr, one line per record: warnings and errors, with ``verbose`` also infos."""
    logger = logging.getLogger("lamzoo")
    for handler in [handler for handler in logger.handlers if isinstance(handler, _LogLines)]:
        logger.removeHandler(handler)
    logger.addHandler(_LogLines())
    logger.setLevel(logging.INFO if verbose else logging.WARNING)


def show_log(name: str) -> None:
    """Also shows the infos of one module, independently of the level of the others."""
    logging.getLogger(name).setLevel(logging.INFO)


class _LogLines(logging.Handler):
    """Writes log records to stderr, unwrapped, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        style = "yellow" if level else ""
        _stderr().print(_text(f"{level}{_one_line(record.getMessage())}", style=style), soft_wrap=True)


def _lines(title: str, hidden: bool, ends: bool) -> Advance:
    started = last = time.monotonic()

    def advance(done: int, total: int, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        due = now - last >= max(_LINE_SECONDS, _LINE_SHARE * (now - started))
        if hidden or not (due or (ends and done == total)):
            return
        last = now
        _stderr().print(_text(f"{title}: {done:,} of {total:,}{note and f', {note}'}"), soft_wrap=True)

    return advance


def _one_line(message: str) -> str:
    """Returns a message as one line; of a name of endless length, it shows the ends, and so does the whole line."""
    line = " ".join(_shortened(word, _LONGEST_WORD) for word in message.split())
    return _shortened(line, _LONGEST_LINE)


def _shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest // 2]}...{text[-longest // 4 :]}"


def _text(text: str, *, keep: str = "", style: str = "") -> Text:
    return Text(printable(text, keep=keep), style=style)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _stdout() -> Console:
    console = _console()
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console


def _stderr() -> Console:
    """Returns the console for stderr; during progress, that of the bar, which redraws the bar below each line."""
    return _bar_console or _console(stderr=True)


def _console(*, stderr: bool = False) -> Console:
    console = Console(stderr=stderr, highlight=False, emoji=False)
    if console.width < 1:  # with COLUMNS=0, rich would print nothing
        console.width = _DEFAULT_WIDTH
    return console
