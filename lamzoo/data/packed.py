"""Many images in one file: npz archives of JPEG bytes, and webdataset tar shards."""

from __future__ import annotations

import glob
import io
import json
import re
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from lamzoo.data.images import IMAGE_EXTENSIONS
from lamzoo.data.labelled import ImageSource
from lamzoo.data.splits import SPLIT_NAMES, find_split, synonyms
from lamzoo.errors import DataError, MissingSplitError


def npz_splits(folder: Path) -> list[str]:
    """Returns the names of the npz files in a folder, without the extension."""
    return sorted(path.stem for path in folder.glob("*.npz"))


class NpzSource(ImageSource):
    """``root/<split>.npz`` with the arrays ``jpeg``, ``offsets`` and ``labels``, and ``root/classes.json``.

    Args:
        root: the folder.
        split: which file.

    Raises:
        DataError: no such folder or split, or the arrays do not fit each other or the classes.
    """

    def __init__(self, root: Path, split: str) -> None:
        if not root.is_dir():
            raise DataError(f"no such folder: {root}")
        self.split = find_split(split, npz_splits(root), str(root))
        self._path = root / f"{self.split}.npz"
        self.classes, self.identifiers = read_classes(root / "classes.json")
        self._bytes, self._offsets, self._labels = self._arrays()

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> tuple[BinaryIO, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, stop = self._offsets[index : index + 2]
        return io.BytesIO(self._bytes[start:stop].tobytes()), int(self._labels[index])

    def name(self, index: int) -> str:
        return f"{self._path}[{index}]"

    def labels(self) -> list[int]:
        return self._labels.tolist()

    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        try:
            with np.load(self._path, allow_pickle=False) as archive:
                missing = {"jpeg", "offsets", "labels"} - set(archive.files)
                if missing:
                    found = ", ".join(archive.files)
                    raise DataError(f"{self._path} has no array {' and '.join(sorted(missing))}; it has {found}")
                jpeg, offsets, labels = archive["jpeg"], archive["offsets"], archive["labels"]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError) as error:
            raise DataError(f"{self._path} is no whole npz archive of plain arrays: {error}") from error
        for name, array, kind in (("jpeg", jpeg, "u"), ("offsets", offsets, "iu"), ("labels", labels, "iu")):
            if array.ndim != 1 or array.dtype.kind not in kind or (name == "jpeg" and array.dtype != np.uint8):
                raise DataError(f"{self._path}: {name} is {array.dtype} {array.shape}, not a row of integers")
        if (
            len(offsets) != len(labels) + 1
            or offsets[0] != 0
            or offsets[-1] != len(jpeg)
            or (np.diff(offsets) < 0).any()
        ):
            raise DataError(
                f"{self._path}: the offsets must rise from 0 to the {len(jpeg)} bytes of jpeg, "
                f"in {len(labels) + 1} steps for {len(labels)} labels"
            )
        highest = np.inf if self.classes is None else len(self.classes) - 1
        wrong = np.flatnonzero((labels < 0) | (labels > highest))
        if len(wrong):
            known = "" if self.classes is None else f", but classes.json has {len(self.classes)} classes"
            raise DataError(f"{self._path}: label {labels[wrong[0]]} of image {wrong[0]} is out of range{known}")
        return jpeg, offsets, labels


class _Member(NamedTuple):
    shard: Path
    key: str
    start: int
    size: int
    label: int


class TarSource(ImageSource):
    """Local webdataset shards, read at random: every sample is ``KEY.jpg`` (or png, ...) with ``KEY.cls``.

    The shards' headers are read once, at the start, so that a data set has a length, an order and a place to resume
    from. ``classes.json`` or ``classnames.txt`` beside the shards names the classes.

    Args:
        pattern: a path with ``*``, ``{000..012}``, ``{a,b}`` and ``{split}``; see :func:`create_dataset`.
        split: replaces ``{split}``.

    Raises:
        DataError: no such shard, a remote one, a broken one, or a sample without image or label.
    """

    def __init__(self, pattern: str, split: str) -> None:
        shards, self.split = find_shards(pattern, split)
        beside = shards[0].parent
        self.classes, self.identifiers = read_classes(beside / "classes.json")
        self.classes = self.classes or _read_lines(beside / "classnames.txt")
        self._members = [member for shard in shards for member in _index(shard)]

    def __len__(self) -> int:
        return len(self._members)

    def read(self, index: int) -> tuple[BinaryIO, int]:
        member = self._members[index]
        try:
            with member.shard.open("rb") as file:
                file.seek(member.start)
                return io.BytesIO(file.read(member.size)), member.label
        except OSError as error:
            raise DataError(f"cannot read {member.shard}: {error.strerror}") from error

    def name(self, index: int) -> str:
        return f"{self._members[index].shard}[{self._members[index].key}]"

    def labels(self) -> list[int]:
        return [member.label for member in self._members]


def find_shards(pattern: str, split: str) -> tuple[list[Path], str | None]:
    """Finds the tar files that a pattern means.

    Returns:
        The shards, and the split's own name where the pattern has ``{split}``.

    Raises:
        DataError: they are remote, or one of them or all are missing.
        MissingSplitError: there are shards of other splits only; lists those.
    """
    if re.match(r"(pipe:|[a-z0-9]+://)", pattern):
        raise DataError(f"the shards {pattern!r} are not local; download them and give their path")
    if "{split}" not in pattern:
        shards = _expand(pattern)
        if not shards:
            raise DataError(f"there is no shard {pattern}; give tar files, such as wds:DIR/*.tar")
        return shards, None
    for name in synonyms(split):
        shards = _expand(pattern.replace("{split}", name))
        if shards:
            return shards, name
    others = sorted(name for name in SPLIT_NAMES if _expand(pattern.replace("{split}", name)))
    raise MissingSplitError(f"the shards {pattern!r} have no split {split!r}; they have {', '.join(others) or 'none'}")


def read_classes(path: Path) -> tuple[list[str] | None, list[str] | None]:
    """Reads the classes' names and identifiers from JSON, a list of names or of ``[identifier, name]``.

    Returns:
        The names, and the identifiers where there are any; ``None`` where there is no file.

    Raises:
        DataError: the file holds something else.
    """
    if not path.exists():
        return None, None
    try:
        entries = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no readable JSON: {error}") from error
    pairs = [entry if isinstance(entry, list) else [None, entry] for entry in _as_list(entries)]
    if not pairs or not all(len(pair) == 2 and isinstance(pair[1], str) for pair in pairs):
        raise DataError(f"{path} must be a list of class names or of [identifier, name]")
    identifiers = [pair[0] for pair in pairs]
    whole = all(isinstance(identifier, str) for identifier in identifiers)
    return [pair[1] for pair in pairs], identifiers if whole else None


def _as_list(value: object) -> list:
    return value if isinstance(value, list) else []


def _read_lines(path: Path) -> list[str] | None:
    return path.read_text("utf-8").splitlines() if path.exists() else None


def _expand(pattern: str) -> list[Path]:
    """Expands braces as a shell does, then wildcards; only existing files, and all of a brace's."""
    found: list[Path] = []
    for plain in _braces(pattern):
        paths = sorted(glob.glob(plain)) if glob.has_magic(plain) else [plain]
        found += (Path(path) for path in paths)
    existing = [path for path in found if path.is_file()]
    if existing and len(existing) < len(found):
        missing = next(path for path in found if not path.is_file())
        raise DataError(f"the shard {missing} is missing")
    return existing


def _braces(pattern: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        width = len(span[1])
        parts = [str(number).zfill(width) for number in range(int(span[1]), int(span[2]) + 1)]
    else:
        parts = match[1].split(",")
    return [whole for part in parts for whole in _braces(pattern[: match.start()] + part + pattern[match.end() :])]


def _index(shard: Path) -> list[_Member]:
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for entry in archive:
                folder, _, name = entry.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if not entry.isfile():
                    continue
                if f"{dot}{extension}".lower() in IMAGE_EXTENSIONS:
                    images[key] = (entry.offset_data, entry.size)
                elif extension == "cls":
                    text = archive.extractfile(entry)
                    labels[key] = int(text.read()) if text is not None else -1
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise DataError(f"{shard} is no whole, uncompressed webdataset shard: {error}") from error
    if images.keys() != labels.keys():
        odd = sorted(images.keys() ^ labels.keys())[0]
        raise DataError(f"{shard}: the sample {odd!r} has no {'.cls label' if odd in images else 'image'}")
    return [_Member(shard, key, *place, labels[key]) for key, place in images.items()]
