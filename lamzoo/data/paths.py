"""Listing of files by extension, in natural order, and comparison of file names."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Collection, Iterable
from pathlib import Path

from lamzoo.errors import DataError


def find_files(paths: Iterable[str | Path], extensions: Collection[str], what: str) -> list[Path]:
    """Lists files: given files, and the files of given folders and their subfolders in natural order.

    Args:
        paths: files and folders. A file is listed whatever its name; in folders, files are selected by extension, and
            hidden ones are skipped.
        extensions: the extensions, in lower case, with the dot.
        what: ``"image"`` or ``"video"``, for messages.

    Returns:
        The files, in the order of the arguments.

    Raises:
        DataError: a path does not exist, or a folder has no such files.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"no such {what} or folder: {path}")
        inside = files_below(path, extensions) if path.is_dir() else [path]
        if not inside:
            raise DataError(f"the folder {path} has no {what} ({', '.join(sorted(extensions))})")
        found += inside
    return found


def files_below(folder: Path, extensions: Collection[str]) -> list[Path]:
    """Lists the files of a folder and its subfolders by extension, in natural order; possibly empty.

    Hidden files and subfolders are skipped; see :func:`is_hidden`.
    """
    found = []
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not is_hidden(name)]
        found += [Path(root, name) for name in names if Path(name).suffix.lower() in extensions and not is_hidden(name)]
    return sorted(found, key=lambda path: natural_key(str(path)))


def visible(folder: Path, pattern: str = "*") -> list[Path]:
    """Lists the entries of a folder that match a wildcard, sorted, without hidden files and folders."""
    return sorted(path for path in folder.glob(pattern) if not is_hidden(path.name))


def natural_key(text: str) -> list[tuple[int, str]]:
    """Sort key for natural order, as in timm: numbers by value, case-insensitive."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text.lower())]


def is_hidden(path: str) -> bool:
    """Returns whether a path below the root of a data set is a hidden file or folder, or is in one.

    Names that begin with a dot, and ``__MACOSX``, are hidden: notebook checkpoints, thumbnails, and files that macOS
    adds to archives and external drives.
    """
    return any(_hidden(part) for part in path.split("/"))


def _hidden(name: str) -> bool:
    return name == "__MACOSX" or (name.startswith(".") and name not in (".", ".."))


def nfc(name: str) -> str:
    """Returns a name in Unicode's composed form, NFC, for comparison.

    The same name has several encodings: macOS decomposes ``é`` into ``e`` and an accent; other systems don't.
    """
    return unicodedata.normalize("NFC", name)


def spellings(name: str) -> tuple[str, ...]:
    """Returns the encodings under which a name may be stored: unchanged, composed (NFC) and decomposed (NFD)."""
    return tuple(dict.fromkeys((name, nfc(name), unicodedata.normalize("NFD", name))))


def existing_file(folder: Path, name: str) -> Path | None:
    """Returns the file with a name in a folder, in any of its :func:`spellings`; None if there is none."""
    paths = (folder / spelling for spelling in spellings(name))
    return next((path for path in paths if path.is_file()), None)


def split_last(text: str) -> tuple[str, str | None]:
    r"""Splits ``DIR:REST`` at its last colon; returns ``text, None`` if it has none.

    The colon of a Windows drive, as in ``C:\photos``, is not a separator.
    """
    head, colon, tail = text.rpartition(":")
    if _DRIVE.search(head) and tail.startswith(("\\", "/") if os.name == "nt" else "\\"):
        tail = f"{head[-1]}:{tail}"
        head, colon = head[:-2], head[-2:-1]
    return (head, tail) if colon else (text, None)


_DRIVE = re.compile(r"(^|:)[A-Za-z]$")
