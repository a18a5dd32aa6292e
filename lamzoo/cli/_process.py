"""The process of a command: standard streams that are closed, and signals; imports the standard library only."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_AGAIN = b"\nlamzoo: stopping; once more stops without cleaning up\n"


class Stopped(KeyboardInterrupt):
    """A signal that ends the process: code that cleans up after Ctrl-C does the same for SIGTERM and SIGHUP.

    Args:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def exit_code(error: KeyboardInterrupt) -> int:
    """Returns the exit code of a stopped process, as shells report it: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + (error.number if isinstance(error, Stopped) else signal.SIGINT)


def open_streams() -> None:
    """Connects standard streams that were closed, as by ``>&-``, to the null device.

    Otherwise the next file that is opened takes their descriptor, and output is written into it.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is this one
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raises :class:`Stopped` in the main thread on SIGINT, SIGTERM and SIGHUP, unless the process ignores them.

    A second signal does not interrupt the cleaning up after the first one; a third one ends the process at once. Python
    ignores an exception that a handler raises in a callback, such as those of a fork; the signal then comes once more.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process, received = os.getpid(), 0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal received
        if os.getpid() != process:  # a forked worker, which inherits the handler
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            os._exit(0)  # in the parent, torch makes an error of a worker that a signal ends
        received += 1
        if received == 1:
            raise Stopped(number)
        if received == 2:
            os.write(2, _AGAIN)
        else:
            _end_by(number)

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if os.getpid() == process or not isinstance(error, (ConnectionError, EOFError)):
            hook(kind, error, trace)  # otherwise a thread of a loader's worker, whose parent has stopped

    def again(unraisable: sys.UnraisableHookArgs) -> None:
        nonlocal received
        error = unraisable.exc_value
        if not (isinstance(error, Stopped) and os.getpid() == process and hasattr(signal, "setitimer")):
            ignored(unraisable)
            return
        received, lost = 0, error.number
        signal.signal(signal.SIGALRM, lambda number, frame: stop(lost, frame))
        signal.setitimer(signal.ITIMER_REAL, 0.01)  # raised here, it would be ignored too

    hook, sys.excepthook = sys.excepthook, report
    ignored, sys.unraisablehook = sys.unraisablehook, again
    before: dict[int, Any] = {}
    for number in _SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        sys.excepthook, sys.unraisablehook = hook, ignored
        for number, handler in before.items():
            signal.signal(number, handler)
        # Code that runs at exit must not be interrupted by an exception, which would be printed as a traceback.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)


def _end_by(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
