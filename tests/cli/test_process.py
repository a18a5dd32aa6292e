"""The process of a command: closed and full streams, signals, and exceptions that are not errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lamzoo.cli._process import Stopped, exit_code, stop_on_signals
from tests.forked import run_code


def test_streams_that_are_closed_are_no_error_and_no_file_takes_their_place(tmp_path: Path) -> None:
    code = f"""
from lamzoo.cli import main
try:
    main(["--version"])
finally:
    with open({str(tmp_path / "file")!r}, "w") as file:
        number = file.fileno()
        file.write(str(number))
"""
    shell = 'exec "$0" -c "$1" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", shell, sys.executable, code], timeout=60).returncode == 0
    assert int((tmp_path / "file").read_text()) > 2


@pytest.mark.parametrize("arguments", [["--version"], ["--help"]], ids=" ".join)
def test_a_full_disk_behind_stdout_is_one_sentence(arguments: list[str]) -> None:
    code = f"""
import os
os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
from lamzoo.cli import main
main({arguments!r})
"""
    done = run_code(code)
    assert done.returncode == 2
    assert done.stderr == (
        "lamzoo: cannot write to the standard output (No space left on device); redirect it to a place with free "
        "space\n"
    )


def test_a_signal_ends_a_command_as_ctrl_c_does_with_its_own_exit_code(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
import lamzoo.cli.app

def wait():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    finally:
        os.kill(os.getpid(), signal.SIGTERM)  # a second signal does not keep what follows from being done
        Path({str(tmp_path / "clean")!r}).touch()

lamzoo.cli.app.app.command("wait")(wait)
lamzoo.cli.main(["wait"])
"""
    done = run_code(code)
    assert (done.returncode, done.stdout) == (143, "")
    assert done.stderr == "\nlamzoo: stopping; once more stops without cleaning up\nlamzoo: stopped by SIGTERM\n"
    assert (tmp_path / "clean").exists()


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_signals_are_exceptions_while_a_command_runs_and_what_they_were_afterwards(name: str, code: int) -> None:
    number = signal.Signals[name]
    before = signal.signal(number, signal.default_int_handler)  # nohup has it ignored
    try:
        with pytest.raises(Stopped) as caught, stop_on_signals():
            signal.raise_signal(number)
        assert exit_code(caught.value) == code
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_a_signal_that_comes_while_python_forks_is_not_lost() -> None:
    code = """
import os, signal, time
from lamzoo.cli._process import Stopped, stop_on_signals

os.register_at_fork(before=lambda: os.kill(os.getpid(), signal.SIGTERM))  # where Python ignores exceptions
try:
    with stop_on_signals():
        if os.fork() == 0:
            os._exit(0)
        time.sleep(20)
        print("went on")
except Stopped as stopped:
    print(stopped.number)
"""
    assert run_code(code) == (0, f"{signal.SIGTERM.value}\n", "")


def test_a_forked_worker_that_is_stopped_is_no_error_of_its_own() -> None:
    code = """
import os, signal
from lamzoo.cli._process import stop_on_signals

with stop_on_signals():
    if (worker := os.fork()) == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    print(os.waitpid(worker, 0)[1])
"""
    assert run_code(code).stdout == "0\n"


def test_a_signal_that_the_process_ignores_stays_ignored() -> None:  # as after nohup
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (EOFError("gone"), 1, "EOFError: gone (unexpected; --debug shows where)"),
        (SystemExit(0), 1, "a library ended the command with sys.exit(0) (unexpected; --debug shows where)"),
        (GeneratorExit(), 1, "GeneratorExit (unexpected; --debug shows where)"),
        (RecursionError("too deep"), 1, "RecursionError: too deep (unexpected; --debug shows where)"),
        (MemoryError(), 2, "memory ran out; use a smaller batch size or model, or end other programs"),
        (
            RuntimeError("DataLoader worker (pid(s) 13441) exited unexpectedly"),
            2,
            "a process that reads the data was ended by the system, as when memory or /dev/shm runs out",
        ),
        (
            ImportError("libtorch.so: failed to map segment from shared object"),
            2,
            "memory ran out (libtorch.so: failed",
        ),
        (
            OSError(24, "Too many open files", "a.npz"),
            2,
            "Too many open files for a.npz; raise the limit of `ulimit -n`",
        ),
        (OSError(28, "No space left on device"), 2, "No space left on device; free some space, or set TMPDIR"),
        (KeyboardInterrupt(), 130, None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_ctrl_c_ends_without_a_sentence(
    run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str | None
) -> None:
    import lamzoo.registry.catalog

    def broken(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(lamzoo.registry.catalog, "list_models", broken)
    done = run("list")
    assert (done.code, done.out) == (code, "")
    if message is None:
        assert done.err == ""
    else:
        assert done.err.startswith(f"lamzoo: {message}") and done.err.count("\n") == 1


def test_a_current_folder_that_was_deleted_is_named(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    done = run("list")
    assert (done.code, done.out) == (2, "")
    assert done.err == ("lamzoo: the current folder can't be used (No such file or directory); change to another one\n")
