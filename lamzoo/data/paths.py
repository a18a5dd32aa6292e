"""Finding files in folders by their extensions, in natural order; opens none of them."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from lamzoo.errors import DataError


def find_files(paths: Iterable[str | Path], extensions: Collection[str], what: str) -> list[Path]:
    """Lists files: each file as it is, each folder's with all its subfolders', in natural order.

    Args:
        paths: files and folders. A file is taken whatever its extension, in a folder the extension decides.
        extensions: in small letters, with the dot.
        what: ``"image"`` or ``"video"``, for messages.

    Returns:
        The files, in the order of the arguments.

    Raises:
        DataError: a path does not exist, or a folder holds none.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"no such {what} or folder: {path}")
        inside = files_below(path, extensions) if path.is_dir() else [path]
        if not inside:
            raise DataError(f"the folder {path} holds no {what} ({', '.join(sorted(extensions))})")
        found += inside
    return found


def files_below(folder: Path, extensions: Collection[str]) -> list[Path]:
    """Lists the files of a folder and its subfolders by extension, in natural order; none is an empty list."""
    inside = (Path(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names)
    return sorted(
        (path for path in inside if path.suffix.lower() in extensions), key=lambda path: natural_key(str(path))
    )


def natural_key(text: str) -> list[tuple[int, str]]:
    """Sorts names as timm does: numbers by value, capitals like small letters."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text.lower())]


def is_hidden(path: str) -> bool:
    """Returns whether a relative path leads through a hidden file or folder.

    Hidden are names that begin with a dot, and ``__MACOSX``: thumbnails, checkpoints of notebooks, and what macOS puts
    into archives and on foreign drives.
    """
    return any(_hidden(part) for part in path.split("/"))


def _hidden(name: str) -> bool:
    return name == "__MACOSX" or (name.startswith(".") and name not in (".", ".."))
