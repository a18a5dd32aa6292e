"""The driver of the suite of faults: the rows of its tables, and what holds whenever a command meets a fault."""

from __future__ import annotations

import ctypes
import fnmatch
import hashlib
import io
import json
import os
import resource
import shlex
import shutil
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lamzoo.cli import app as cli
from lamzoo.errors import HubUnreachableError, LamzooError
from tests.faults.stock import Stock

SECONDS = float(
    os.environ.get("FAULT_SECONDS", "60")
)  # what a row may take on the slowest machine, before it counts as a hang
CANARY = "CANARY"  # the file that is written by code in a data file, if anything executes it


class Run(NamedTuple):
    """What a command or a call left: exit code, output and errors."""

    code: int | None
    out: str
    err: str


@dataclass(frozen=True)
class Row:
    """One fault, and how it must end.

    Attributes:
        name: of the row, unique.
        call: a command line without ``lamzoo``, or a Python call that raises a :class:`LamzooError`, returns nothing,
            or returns the :class:`Run` of a process that it started.
        says: words of the error, which name the culprit; with exit code 0, of stdout and stderr together.
        needs: names of valid things, which :class:`Stock` copies into the working folder.
        make: makes the fault, in the working folder.
        code: the exit code.
        within: a context in which the command runs, such as that of a limit.
        writes: patterns of files, relative to the working folder, that may appear, change or go away, besides those of
            the user's cache, ``cache/``.
        leaves: patterns of files that must exist at the end.
        out: whether there may be output on stdout.
        lines: lines of the error; three if a hub is out of reach.
        env: changes of the environment.
        then: a second call, which must succeed: the way out that the error names.
        slow: runs with ``-m slow`` alone, because other rows and tests are like it.
    """

    name: str
    call: str | Callable[[], Run | None]
    says: str | tuple[str, ...] = ()
    needs: str = ""
    make: Callable[[], Any] | None = None
    code: int = 2
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    writes: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    out: bool = False
    lines: int = 1
    env: Mapping[str, str] = field(default_factory=dict)
    then: str | Callable[[], Any] | None = None
    slow: bool = False

    @property
    def words(self) -> tuple[str, ...]:
        return (self.says,) if isinstance(self.says, str) else self.says


class _Hang(BaseException):
    """No answer in time; not an Exception, so that nothing turns it into an error of its own."""


def check(row: Row, place: Path, stock: Stock, capture: pytest.CaptureFixture[str]) -> None:
    """Makes the fault of a row in ``place``, the working directory, runs its command and checks how it ends."""
    stock.copy(row.needs, place)
    if row.make is not None:
        row.make()
    before = _snapshot(place)
    capture.readouterr()
    with row.within(), _deadline(row.name):
        done = _run(row.call, capture)
    shown = f"exit code {done.code}, stderr {done.err[-1500:]!r}, stdout {done.out[-500:]!r}"
    assert done.code == row.code, shown
    _check_text(done, shown)
    if row.code == 0:
        assert not _errors(done.err), shown
        missing = [word for word in row.words if word not in f"{done.out} {' '.join(done.err.split())}"]
    else:
        missing = _check_error(row, done, shown)
    assert not missing, f"{missing} not in {shown}"
    if "--json" in str(row.call) and done.out:
        json.loads(done.out, parse_constant=_refuse)
    _check_files(row, place, before)
    if row.then is not None:
        with _deadline(row.name):
            again = _run(row.then, capture)
        assert again.code == 0, f"the way out fails with {again.err}"


def _run(call: str | Callable[[], Run | None], capture: pytest.CaptureFixture[str]) -> Run:
    try:
        if isinstance(call, str):
            with pytest.raises(SystemExit) as ended:
                cli.main(shlex.split(call))
            code = ended.value.code
        else:
            done = call()
            if done is not None:
                return done
            code = 0
    except HubUnreachableError as error:
        return Run(2, "", f"lamzoo: {error}")
    except LamzooError as error:
        return Run(2, "", f"lamzoo: {' '.join(str(error).split())}")
    assert isinstance(code, int)
    return Run(code, *capture.readouterr())


def _errors(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("lamzoo: ")]


def _check_text(done: Run, shown: str) -> None:
    """Nothing unexpected, no traceback, and nothing that would steer a terminal."""
    for text in (done.out, done.err):
        assert "Traceback (most recent call last)" not in text, shown
        assert "(unexpected;" not in text, shown
        odd = sorted({f"U+{ord(char):04X}" for char in text if char != "\n" and _steers(char)})
        assert not odd, f"{odd} in {shown}"


def _check_error(row: Row, done: Run, shown: str) -> list[str]:
    """One sentence, at the end of stderr; returns the words that it lacks."""
    assert len(_errors(done.err)) == 1, f"not one error in {shown}"
    lines = done.err.rstrip("\n").splitlines()
    assert lines[-row.lines].startswith("lamzoo: "), f"the error is not the end of {shown}"
    error = " ".join(lines[-row.lines :]).removeprefix("lamzoo: ")
    assert error.strip(), shown
    assert error[-1] not in ":,;(-", f"half a sentence in {shown}"
    assert " object at 0x" not in error, shown
    assert len(error) < 1500 + 2 * len(str(row.call)), f"{len(error)} characters in {shown}"
    assert row.out or not done.out, f"output in {shown}"
    return [word for word in row.words if word not in error]


def _check_files(row: Row, place: Path, before: dict[str, str]) -> None:
    after = _snapshot(place)
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    assert CANARY not in {Path(name).name for name in after}, "code in a file was executed"
    allowed = ("cache*", *row.writes)
    unexpected = [name for name in changed if not any(fnmatch.fnmatch(name, pattern) for pattern in allowed)]
    assert not unexpected, f"written or changed: {unexpected}"
    halves = [name for name in after if name not in before and _is_half_written(name)]
    assert not halves, f"left half-written: {halves}"
    for pattern in row.leaves:
        assert fnmatch.filter(after, pattern), f"no {pattern} among {sorted(after)}"


def _is_half_written(name: str) -> bool:
    parts = name.split("/")
    return any(part.endswith((".tmp", ".incomplete")) or part.startswith((".update-", "tmp_")) for part in parts)


def _snapshot(place: Path) -> dict[str, str]:
    """Kind and content of everything below a folder, by name."""
    found: dict[str, str] = {}
    for folder, folders, files in os.walk(place):
        for name in (*folders, *files):
            path = Path(folder, name)
            key = os.fsencode(path.relative_to(place)).decode("utf-8", "backslashreplace")
            if path.is_symlink():
                found[key] = f"link to {os.readlink(path)}"
            elif path.is_dir():
                found[key] = "folder"
            elif path.is_file():
                found[key] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                found[key] = "special"
    return found


def _steers(char: str) -> bool:
    return (
        unicodedata.category(char) in ("Cc", "Cs") or char in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    )


def _refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} in JSON")


@contextmanager
def _deadline(name: str) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _Hang(f"{name}: no answer in {SECONDS} seconds")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


# What makes faults.


class Canary:
    """An object whose unpickling writes a file."""

    def __reduce__(self) -> Any:
        return (io.open, (CANARY, "w"))


def put(path: str | Path, content: bytes | str = b"") -> Path:
    """Writes a file, with its folders."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)
    return path


def cut(path: str, share: float = 0.5) -> None:
    """Truncates a file."""
    os.truncate(path, int(os.path.getsize(path) * share))


def flip(path: str, at: float = 0.7) -> None:
    """Flips a bit of a file."""
    content = bytearray(Path(path).read_bytes())
    content[int(len(content) * at)] ^= 1
    Path(path).write_bytes(content)


def edit(path: str, changes: Mapping[str, Any]) -> None:
    """Changes values of a JSON file, by keys such as ``"pretrained_cfg.std"``; ``...`` removes one."""
    content = json.loads(Path(path).read_text("utf-8"))
    for key, value in changes.items():
        *outer, last = key.split("/") if "/" in key else key.split(".")
        inner = content
        for part in outer:
            inner = inner.setdefault(part, {})
        if value is ...:
            del inner[last]
        else:
            inner[last] = value
    Path(path).write_text(json.dumps(content), encoding="utf-8")


def pipe(path: str) -> None:
    """Puts a named pipe in the place of a file."""
    Path(path).unlink(missing_ok=True)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)


def move(path: str, target: str) -> None:
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(path, target)


@contextmanager
def without_rights() -> Iterator[None]:
    """Modes of files count, also for root, which otherwise no mode stops."""
    if os.geteuid() != 0:
        yield
        return
    if not sys.platform.startswith("linux"):
        pytest.skip("root on another system than Linux")
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    before = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    after = (ctypes.c_uint32 * 6)(*before)
    after[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    if libc.capset(header, after):
        pytest.skip("the capabilities of the process can't be changed")
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


@contextmanager
def limited(kind: int, value: int) -> Iterator[None]:
    """A limit of the process, as of the size of the files that it writes."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))
