"""Atomic writing of files, locks between processes, names that come from a file, and the user's cache folder."""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath

from safetensors import SafetensorError

from lamzoo.errors import ConfigError, DataError, LamzooError, WeightsError
from lamzoo.reading import reason

_SHOWN = 100  # characters of a long path in a message

if sys.platform != "win32":
    import fcntl

_SUFFIX = ".lamzoo.tmp"  # of temporary files
_LOCK = ".lock"  # of the file beside a temporary one that is locked while it is written
_swept: set[Path] = set()  # folders that this process has cleared of leftovers
_locks: set[int] = set()  # descriptors of the locks that this process holds


@contextlib.contextmanager
def atomic_files(failure: type[LamzooError] = WeightsError) -> Iterator[Callable[[Path], Path]]:
    """Writes one or several files atomically.

    The first write to a folder also removes the temporary files of killed processes there; those of running ones are
    locked.

    Args:
        failure: class of the error to raise.

    Yields:
        A function that returns a temporary path for a file's path, in the same folder. On exit the temporary files
        are renamed in the order of the calls; after an exception they are removed.

    Raises:
        LamzooError: ``failure``, after an ``OSError`` such as a full disk, missing permissions or a missing folder, or
            for a path that is a folder, pipe or device.
    """
    staged: list[tuple[Path, Path]] = []
    target: Path | None = None  # the file that is being written

    with contextlib.ExitStack() as locks:

        def stage(path: Path) -> Path:
            nonlocal target
            target = path
            if path.exists() and not path.is_file():
                kind = "a folder" if path.is_dir() else "a pipe, socket or device"
                raise failure(f"{path} is {kind} and can't be written as a file; choose another path.")
            path.parent.mkdir(parents=True, exist_ok=True)
            _sweep(path.parent)
            temporary = locks.enter_context(_temporary_for(path))
            staged.append((temporary, path))
            return temporary

        try:
            yield stage
            umask = os.umask(0)
            os.umask(umask)
            for temporary, target in staged:  # noqa: B007 - the error names the target
                with temporary.open("r+b") as file:  # Windows flushes only what is open for writing
                    os.fsync(file.fileno())
                temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 would keep others from reading the file
            for temporary, target in staged:
                temporary.replace(target)
        except (OSError, SafetensorError) as error:
            if isinstance(error, LamzooError):
                raise
            raise failure(
                f"{target} cannot be written ({reason(error)}); nothing was changed: free some space or choose another "
                "folder."
            ) from error
        finally:
            for temporary, _ in staged:
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def file_lock(path: Path, *, wait: bool = False) -> Iterator[bool | None]:
    """Holds an exclusive lock between processes, which the system releases if this one is killed.

    Args:
        path: the file to lock; created if needed, with its folder, and removed at the end.
        wait: wait while another process has the lock.

    Yields:
        Whether the lock is held: False if another process has it; None if the file can't be created or locked there, as
        on Windows and on some network file systems.
    """
    owner = os.getpid()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, held = _open_locked(path, wait)
    except OSError:
        descriptor, held = -1, None
    else:
        _locks.add(descriptor)
    try:
        yield held
    finally:
        if descriptor in _locks and os.getpid() == owner:  # a forked process has closed it
            if held:
                with contextlib.suppress(OSError):  # a lock file that stays is locked again by the next process
                    path.unlink()
            _locks.discard(descriptor)
            os.close(descriptor)
            if held is None:
                with contextlib.suppress(OSError):  # Windows refuses while another process has it open
                    path.unlink()


def write_data(path: str | Path, data: bytes) -> None:
    """Writes a data file atomically, gzipped if its name ends in ``.gz``.

    Raises:
        DataError: the file can't be written.
    """
    path = Path(path)
    with atomic_files(DataError) as stage:
        stage(path).write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def make_folder(folder: Path) -> None:
    """Creates a folder for the output of a command, with those above it, if it does not exist.

    Raises:
        DataError: it can't be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"the folder {folder} can't be created ({error.strerror}); choose another with --out"
        ) from error


def is_sha256(value: object) -> bool:
    """Whether a value read from a file is a sha256: 64 lower-case hexadecimal digits."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def is_plain_name(name: object) -> bool:
    """Whether a value read from a file names a file of the same folder, on every system: no path, drive or ``..``."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and name == PurePosixPath(name).name == PureWindowsPath(name).name
        and not PureWindowsPath(name).drive
        and name.isprintable()
        and len(name.encode(errors="replace")) <= 255
    )


def is_inner_path(path: object) -> bool:
    """Whether a value read from a file leads from a folder to a file below it: a relative path without ``..``."""
    return isinstance(path, str) and not PurePath(path).anchor and ".." not in PurePath(path).parts


def check_target(
    path: Path, what: str, *, suffix: str = "", makes_folder: bool = False, failure: type[LamzooError] = DataError
) -> None:
    """Checks in advance that a file can be written, before long work for it; nothing is left behind.

    Args:
        path: the file.
        what: name of the file in messages: ``"picture"``.
        suffix: required suffix, in lower case.
        makes_folder: whether a missing folder will be created, as by :func:`atomic_files`.
        failure: class of the error to raise.

    Raises:
        LamzooError: ``failure``: the name has another suffix or is too long, its folder does not exist or can't be
            written to, or it is a folder, pipe or device itself.
    """
    if suffix and path.suffix.lower() != suffix:
        raise failure(f"The {what} {path} is written as {suffix[1:].upper()}; its name must end in {suffix}.")
    folder = path.absolute().parent
    try:
        if path.exists() and not path.is_file():
            kind = "folder" if path.is_dir() else "pipe, socket or device"
            raise failure(f"The {what} can't be written over the {kind} {path}; choose another name.")
        while makes_folder and not folder.exists():
            folder = folder.parent
        if not folder.exists():
            raise failure(f"The folder {path.parent} of the {what} does not exist; create it first.")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise failure(
            f"The {what} {shortened(path)} can't be written ({error.strerror}); choose another path."
        ) from None


def shortened(text: object) -> str:
    """Returns a path or another text for a message, cut if it is too long."""
    text = str(text).replace("\0", "\\0")
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def cache_folder() -> Path:
    """Returns lamzoo's folder in the user's cache: ``$XDG_CACHE_HOME/lamzoo``, or ``~/.cache/lamzoo``.

    Raises:
        ConfigError: the user has no home folder, and ``XDG_CACHE_HOME`` is not set.
    """
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "lamzoo"
    try:
        return Path.home() / ".cache" / "lamzoo"
    except RuntimeError:
        raise ConfigError("this user has no home folder; set XDG_CACHE_HOME to a folder that can be written") from None


def _open_locked(path: Path, wait: bool) -> tuple[int, bool | None]:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        held = _lock(descriptor, wait)
        if not held or _is_at(descriptor, path):
            return descriptor, held
        os.close(descriptor)  # its last holder has just removed it


@contextlib.contextmanager
def _temporary_for(path: Path) -> Iterator[Path]:
    """Creates a temporary file in the folder of ``path``, and holds a lock against :func:`_sweep`.

    The locked file is one beside it, because writers such as safetensors put a new file in the place of the temporary
    one.
    """
    while True:
        # The name does not contain that of the file, which may have the full length already.
        descriptor, lock = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=_SUFFIX + _LOCK)
        if _lock(descriptor) is not False and _is_at(descriptor, lock):
            break
        os.close(descriptor)  # another process removed it before it was locked
    temporary = Path(lock.removesuffix(_LOCK))
    try:
        temporary.touch(mode=0o600, exist_ok=False)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        if sys.platform == "win32":  # which doesn't remove open files
            os.close(descriptor)
        Path(lock).unlink(missing_ok=True)
        if sys.platform != "win32":
            os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Removes the temporary files of killed processes: those that nobody has locked."""
    folder = folder.resolve()
    if folder in _swept:
        return
    _swept.add(folder)
    with contextlib.suppress(OSError), os.scandir(folder) as entries:  # what can't be removed is left there
        for entry in entries:
            if not entry.name.endswith((_SUFFIX, _SUFFIX + _LOCK)) or not entry.is_file(follow_symlinks=False):
                continue
            if os.path.exists(entry.path + _LOCK):  # removed with its lock
                continue
            descriptor = os.open(entry.path, os.O_RDWR)
            try:
                if _lock(descriptor):
                    for left in (entry.path.removesuffix(_LOCK), entry.path):
                        Path(left).unlink(missing_ok=True)
            finally:
                os.close(descriptor)


def _lock(descriptor: int, wait: bool = False) -> bool | None:
    """Locks an open file; returns False if another process holds the lock, None without support for locks."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(descriptor: int, path: str | Path) -> bool:
    """Returns whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _close_locks() -> None:
    while _locks:
        os.close(_locks.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_locks)  # or a forked worker would hold the lock of a killed process
