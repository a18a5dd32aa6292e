"""Feature files, npz or npy, one per video or clip, and the selection of their rows by time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lamzoo.data.arrays import read_npy
from lamzoo.data.captions.base import Stream
from lamzoo.data.feature_arrays import Features, check_rows, read_features_and_origin, unit
from lamzoo.data.fingerprint import file_sizes
from lamzoo.data.json_files import is_number
from lamzoo.data.paths import existing_file, visible
from lamzoo.errors import DataError

_FOLDERS = {"video": ("video", "clip_features"), "audio": ("audio",)}  # the first one with files is used
_SUFFIXES = (".npz", ".npy")
_KEY = "features"  # the array of an npz file
_SHORTEST, _LONGEST = 1e-3, 1e5  # seconds per row


class FeatureFiles:
    """``video/ID.npz`` and ``audio/ID.npz``, or ``.npy``, below one folder; either modality may be missing.

    The folder ``video`` may also be named ``clip_features``, as by ``lamzoo extract-features``. An npz file contains
    ``features``, ``(N, D)``; an npy file is that array. Each row is normalised to length 1.

    Args:
        root: the folder; it need not exist.
        rate: rows per second of files that don't state it; files of ``lamzoo extract-features`` do.

    Attributes:
        modalities: feature width of each modality that has files, by name.

    Raises:
        DataError: the first file of a modality is damaged, or has another format.
    """

    def __init__(self, root: Path, rate: float | None = None) -> None:
        self._rate = rate
        self._folders: dict[str, Path] = {}
        self.modalities: dict[str, int] = {}
        for modality, names in _FOLDERS.items():
            for folder in (root / name for name in names):
                first = next((path for path in visible(folder) if path.suffix in _SUFFIXES), None)
                if first is not None:
                    self._folders[modality] = folder
                    self.modalities[modality] = _read(first)[0].shape[1]
                    break

    def read(self, name: str, start: float, end: float, duration: float | None = None) -> dict[str, Stream]:
        """Returns the features of a span, at least one row of each modality that has a file.

        Args:
            name: name of the file, without its extension.
            start: start of the span, seconds from the start of the first row.
            end: end of the span.
            duration: duration of all rows, used for files of unknown rate.

        Raises:
            DataError: a file is damaged, has another width than the others, or an unknown rate; names it.
        """
        found = {}
        for modality, folder in self._folders.items():
            path = _file(folder, name)
            if path is None:
                continue
            rows, rate = _read(path)
            if rows.shape[1] != self.modalities[modality]:
                raise DataError(
                    f"{path} has {rows.shape[1]} features per row, and others in its folder have "
                    f"{self.modalities[modality]}; extract all with the same model"
                )
            rate = rate or self._rate or (len(rows) / duration if duration else None)
            if rate is None:
                raise DataError(
                    f"{path} doesn't state its rows per second; append them to the folder, as in "
                    "videos:DIR:FRAMES_PER_SECOND"
                )
            found[modality] = cut_rows(rows, rate, start, end)
        return found

    def sizes(self, names: Iterable[str]) -> list[int]:
        """Returns the sizes of the files of these names in bytes, by modality; -1 for missing ones."""
        unique = dict.fromkeys(names)
        paths = ((folder, name, _file(folder, name)) for folder in self._folders.values() for name in unique)
        return file_sizes([path or folder / name for folder, name, path in paths])


def cut_rows(rows: Features, rate: float, start: float, end: float) -> Stream:
    """Returns the rows of a span, normalised to length 1; see :func:`rows_within`."""
    span = rows_within(len(rows), rate, start, end)
    return Stream(unit(rows[span.start : span.stop]), row_times(span, rate, start))


def rows_within(count: int, rate: float, start: float, end: float) -> range:
    """Returns the rows whose middles are in a span, or the one whose middle is nearest to that of the span.

    Args:
        count: number of rows; row k covers the time from k / rate to (k + 1) / rate.
        rate: rows per second.
        start: start of the span, seconds.
        end: end of the span, seconds.
    """
    first = max(0, math.ceil(start * rate - 0.5))
    last = count if end * rate >= count else min(count, math.floor(end * rate - 0.5) + 1)
    if first < last:
        return range(first, last)
    nearest = min(count - 1, max(0, math.floor((start + end) / 2 * rate)))
    return range(nearest, nearest + 1)


def row_times(rows: range, rate: float, start: float) -> Features:
    """Returns the middles of rows, seconds from ``start``."""
    return ((np.array(rows) + 0.5) / rate - start).astype(np.float32)


def _file(folder: Path, name: str) -> Path | None:
    return next(filter(None, (existing_file(folder, f"{name}{suffix}") for suffix in _SUFFIXES)), None)


def _read(path: Path) -> tuple[Features, float | None]:
    """Returns the rows of a file and their rate, if the file states it."""
    if path.suffix != ".npz":
        return check_rows(read_npy(path), str(path)), None
    rows, origin = read_features_and_origin(path, _KEY)
    seconds = (origin or {}).get("clip_seconds")
    if seconds is None:
        return rows, None
    if not is_number(seconds) or not _SHORTEST <= seconds <= _LONGEST:
        raise DataError(f"{path} has invalid provenance (clips of {seconds!r:.60} s); extract it again")
    return rows, 1 / seconds
