"""Atomic writing of files, and the user's cache folder."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from lamzoo.errors import LamzooError, WeightsError


@contextlib.contextmanager
def atomic_files(failure: type[LamzooError] = WeightsError) -> Iterator[Callable[[Path], Path]]:
    """Writes one or several files atomically.

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

    def stage(path: Path) -> Path:
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "a pipe, socket or device"
            raise failure(f"{path} is {kind} and can't be written as a file; choose another path.")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        staged.append((Path(name), path))
        return Path(name)

    try:
        yield stage
        umask = os.umask(0)
        os.umask(umask)
        for temporary, _ in staged:
            with temporary.open("r+b") as file:  # Windows flushes only what is open for writing
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 would keep others from reading the file
        for temporary, path in staged:
            temporary.replace(path)
    except (OSError, SafetensorError) as error:
        if isinstance(error, LamzooError):
            raise
        where = staged[-1][1] if staged else getattr(error, "filename", None)
        raise failure(
            f"{where} cannot be written ({error}); nothing was changed: free some space or choose another folder."
        ) from error
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Returns lamzoo's folder in the user's cache: ``$XDG_CACHE_HOME/lamzoo``, or ``~/.cache/lamzoo``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lamzoo"
