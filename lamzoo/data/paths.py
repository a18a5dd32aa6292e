"""Listing of files by extension, in natural order, access checks, and comparison of file names."""

from __future__ import annotations

import fnmatch
import glob
import logging
import os
import re
import stat
import unicodedata
from collections.abc import Collection, Iterable
from contextlib import suppress
from heapq import heappop, heappush
from pathlib import Path
from typing import BinaryIO, NamedTuple

from lamzoo.errors import DataError
from lamzoo.files import is_inner_path
from lamzoo.reading import SPECIAL, open_regular

_logger = logging.getLogger(__name__)

_DANGLING = "it is a link that leads nowhere"


class Listing(NamedTuple):
    """The files of a folder and its subfolders.

    Attributes:
        files: the files in natural order, including the lost entries.
        lost: entries that can't be read, each with the reason: folders that can't be listed, links that lead nowhere,
            and pipes, sockets and devices with the name of a file.
    """

    files: list[Path]
    lost: dict[Path, str]


def list_files(folder: Path, extensions: Collection[str]) -> Listing:
    """Lists the files of a folder and its subfolders by extension.

    Links are followed. Each folder is listed once, under its own path rather than that of a link, so a link to a folder
    that is listed elsewhere, or that contains the link, adds nothing; a warning names it. Hidden entries are skipped;
    see :func:`is_hidden`.

    Args:
        folder: the folder; if it can't be listed itself, it is the only entry. It need not exist.
        extensions: the extensions, in lower case, with the dot.
    """
    files: list[Path] = []
    lost: dict[Path, str] = {}
    if not folder_exists(folder):
        return Listing(files, lost)
    above = os.path.realpath(folder)
    seen = set()
    while (parent := os.path.dirname(above)) != above:
        above = parent
        with suppress(OSError):
            seen.add(_identity(above))
    pending, links = [folder], list[tuple[list[tuple[int, str]], Path]]()  # links to folders are a heap
    while pending or links:
        place = pending.pop() if pending else heappop(links)[1]
        try:
            if (identity := _identity(place)) in seen:
                _logger.warning("left out %s: the same folder is listed elsewhere, or contains this one", place)
                continue
            seen.add(identity)
            with os.scandir(place) as entries:
                visible_entries = [entry for entry in entries if not is_hidden(entry.name)]
        except OSError as error:
            lost[place] = _unlisted(error)
            continue
        for entry in visible_entries:
            path = place / entry.name
            wanted = os.path.splitext(entry.name)[1].lower() in extensions
            try:
                if entry.is_dir():
                    if entry.is_symlink():
                        heappush(links, (natural_key(str(path)), path))
                    else:
                        pending.append(path)
                elif entry.is_file():
                    if wanted:
                        files.append(path)
                elif entry.is_symlink() and not os.path.exists(path):
                    lost[path] = _DANGLING
                elif wanted:
                    lost[path] = SPECIAL
            except OSError as error:
                lost[path] = str(error.strerror)
    return Listing(sorted([*files, *lost], key=lambda path: natural_key(str(path))), lost)


def find_files(paths: Iterable[str | Path], extensions: Collection[str], what: str) -> list[Path]:
    """Lists files: given files, and the files of given folders and their subfolders in natural order.

    Args:
        paths: files and folders. A file is listed whatever its name; folders are listed by :func:`list_files`,
            including the lost entries, which can't be read later.
        extensions: the extensions, in lower case, with the dot.
        what: ``"image"`` or ``"video"``, for messages.

    Returns:
        The files, in the order of the arguments.

    Raises:
        DataError: a path does not exist or can't be accessed, or a folder has no such files.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not (folder_exists(path) or file_exists(path)):
            raise DataError(f"no such {what} or folder: {path}")
        inside, lost = list_files(path, extensions) if folder_exists(path) else ([path], {})
        if path in lost:
            raise DataError(f"cannot read the folder {path}: {lost[path]}")
        if not inside:
            raise DataError(f"the folder {path} has no {what} ({', '.join(sorted(extensions))})")
        found += inside
    return found


def open_listed(path: Path) -> BinaryIO:
    """Opens a file of a :class:`Listing`.

    Raises:
        OSError: it can't be read; ``strerror`` is the reason, as in :attr:`Listing.lost`.
    """
    try:
        return open_regular(path)
    except IsADirectoryError:
        try:
            os.scandir(path).close()
        except OSError as error:
            raise OSError(error.errno, _unlisted(error), str(path)) from None
        raise


def visible(folder: Path, pattern: str = "*") -> list[Path]:
    """Lists the entries of a folder that match a wildcard, sorted, without hidden files and folders.

    Returns:
        The paths; none if there is no such folder.

    Raises:
        DataError: the folder can't be listed.
    """
    names = [entry.name for entry in _entries(folder)] if folder_exists(folder) else []
    return sorted(folder / name for name in fnmatch.filter(names, pattern) if not is_hidden(name))


def expand_wildcards(pattern: str) -> list[Path]:
    """Lists the paths that match a pattern with ``*``, ``?`` and ``[...]``, sorted; names with a dot first are hidden.

    Raises:
        DataError: a folder can't be listed.
    """
    parts = Path(pattern).parts
    found = [Path(parts[0] if Path(pattern).is_absolute() else "")] if parts else []
    for part in parts[1:] if Path(pattern).is_absolute() else parts:
        if glob.has_magic(part):
            found = [path for folder in found for path in visible(folder, part)]
        else:
            found = [path / part for path in found]
    return sorted((path for path in found if _mode(path) is not None or path.is_symlink()), key=str)


def subfolders(root: Path) -> list[str]:
    """Returns the names of the subfolders of a folder, sorted, without hidden ones; links are followed.

    Raises:
        DataError: the folder can't be listed, or an entry that may be a folder can't be accessed.
    """
    names = []
    for entry in _entries(root):
        if is_hidden(entry.name):
            continue
        try:
            if entry.is_dir():
                names.append(entry.name)
            elif entry.is_symlink():
                os.stat(entry.path)
        except FileNotFoundError:
            raise DataError(f"{entry.path} is a link that leads nowhere; restore its target, or remove it") from None
        except OSError as error:
            raise DataError(f"cannot access {entry.path}: {error.strerror}; make it readable, or remove it") from error
    return sorted(names)


def check_folder(folder: Path) -> None:
    """Raises a :class:`DataError` if a folder does not exist or can't be accessed."""
    if not folder_exists(folder):
        raise DataError(f"no such folder: {folder}")


def folder_exists(path: str | Path) -> bool:
    """Returns whether a path is a folder; links are followed.

    Raises:
        DataError: the path can't be accessed, which pathlib reports as an ``OSError`` or as a missing file.
    """
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def file_exists(path: str | Path) -> bool:
    """Returns whether a path exists and is not a folder; raises as :func:`folder_exists`.

    It may be a pipe or device, which :func:`lamzoo.reading.open_regular` refuses with the reason.
    """
    mode = _mode(path)
    return mode is not None and not stat.S_ISDIR(mode)


def natural_key(text: str) -> list[tuple[int, str]]:
    """Sort key for natural order, as in timm: numbers by value, case-insensitive."""
    parts = re.split(r"(\d{1,1000})", text.lower())  # int() refuses more digits than 4300
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


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
    """Returns the file with a name below a folder, in any of its :func:`spellings`; None if there is none.

    Raises:
        DataError: the name, which an annotation file states, leads out of the folder.
    """
    if not is_inner_path(name):
        raise DataError(f"{name!r} does not name a file below {folder}; correct the name where it is listed")
    paths = (folder / spelling for spelling in spellings(name))
    return next((path for path in paths if file_exists(path)), None)


def split_last(text: str) -> tuple[str, str | None]:
    r"""Splits ``DIR:REST`` at its last colon; returns ``text, None`` if it has none.

    The colon of a Windows drive, as in ``C:\photos``, is not a separator.
    """
    head, colon, tail = text.rpartition(":")
    if _DRIVE.search(head) and tail.startswith(("\\", "/") if os.name == "nt" else "\\"):
        tail = f"{head[-1]}:{tail}"
        head, colon = head[:-2], head[-2:-1]
    return (head, tail) if colon else (text, None)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {_unlisted(error)}; make it readable") from error


def _mode(path: str | Path) -> int | None:
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # no permission, a circle of links, an overlong name; a null byte
        raise DataError(f"cannot access {path}: {getattr(error, 'strerror', None) or error}") from error


def _identity(folder: str | Path) -> tuple[int, int | str]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino or os.path.realpath(folder)  # some network drives have no file numbers


def _unlisted(error: OSError) -> str:
    return f"its files cannot be listed ({error.strerror})"


_DRIVE = re.compile(r"(^|:)[A-Za-z]$")
