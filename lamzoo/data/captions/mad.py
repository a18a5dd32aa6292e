"""MAD and MADv2 in their official layouts: audio descriptions of movies, and CLIP features at 5 frames per second."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from lamzoo.data.captions.base import CaptionItem, CaptionSource, Stream
from lamzoo.data.captions.feature_files import row_times, rows_within
from lamzoo.data.csv_tables import open_table
from lamzoo.data.feature_arrays import check_rows, unit
from lamzoo.data.fingerprint import file_sizes
from lamzoo.data.json_files import is_row, read_json
from lamzoo.data.paths import check_folder, file_exists, spellings, visible
from lamzoo.data.splits import find_split
from lamzoo.errors import DataError, MissingExtraError
from lamzoo.reading import open_regular, parse_float, reason

_logger = logging.getLogger(__name__)

Line = tuple[str, str, float, float, str]  # id, movie, start, end, sentence

_FRAME_RATE = 5.0
_FRAMES = (
    "CLIP_L14_frames_features_5fps.h5",
    "CLIP_B32_frames_features_5fps.h5",
    "CLIP_frames_features_5fps.h5",  # the first name of the B/32 file
)
_SOUND = re.compile(r".*audio.*_(\d+(?:\.\d+)?)fps\.h5", re.IGNORECASE)
_UNNAMED, _NAMED, _EVALUATION = "train-unnamed", "train-named", "mad-eval"
# Movies that AutoAD evaluates on: in MAD's validation and test splits, and not in LSMDC's training split.
_EVALUATED = frozenset(
    {
        "1005_Signs",
        "1026_Legion",
        "1027_Les_Miserables",
        "1051_Harry_Potter_and_the_goblet_of_fire",
        "3009_BATTLE_LOS_ANGELES",
        "3015_CHARLIE_ST_CLOUD",
        "3031_HANSEL_GRETEL_WITCH_HUNTERS",
        "3032_HOW_DO_YOU_KNOW",
        "3034_IDES_OF_MARCH",
        "3074_THE_ROOMMATE",
    }
)


class MadSource(CaptionSource):
    """Audio descriptions, each with the frames that are shown during the described span.

    Files are found in the folder itself and in their official locations:

    - ``annotations/MAD_{train,val,test}.json``, or in ``annotations/MAD-v1``: the splits of MAD.
    - ``annotations/MAD-v2/mad-v2-ad-{unnamed,named}.csv``, or in ``annotations``: MADv2's training sentences, in which
      characters are "someone" or have their names; the splits ``train-unnamed`` and ``train-named``.
    - the split ``mad-eval``, the benchmark of MADv2's models: the sentences of ten movies of MAD's validation and test
      splits.
    - ``features/CLIP_{L14,B32}_frames_features_5fps.h5``: one HDF5 data set per movie; of several files that of the
      larger model. This is the modality ``video``.
    - ``features/*audio*_Rfps.h5``, R rows per second, likewise: the modality ``audio``, if the file exists.

    Each row is normalised to length 1. The few sentences that are empty, or end before they start, are dropped, which
    is logged. Sentences after the last frame of their movie get that frame.

    Args:
        root: the folder.
        split: one of the splits above.
        seconds: minimum duration of a clip; a shorter item is in the middle of its clip. MAD's own extended times
            correspond to 2 seconds.

    Raises:
        DataError: there is no such folder, file or split, or a file is invalid.
        MissingExtraError: h5py is not installed.
    """

    def __init__(self, root: Path, split: str, seconds: float) -> None:
        check_folder(root)
        _import_h5py()
        self._seconds = seconds
        self.split, lines = _annotations(root, split)
        items = [
            CaptionItem(name, movie, max(0.0, start), end, (text.strip(),)) for name, movie, start, end, text in lines
        ]
        self.items = [item for item in items if item.captions[0] and item.start < item.end]
        if len(self.items) < len(items):
            _logger.info(
                "dropped %d of the %d sentences of %s: they are empty, or end before they start",
                len(items) - len(self.items), len(items), root,
            )  # fmt: skip
        self._files = _features(root)
        self.modalities = {name: _width(path) for name, (path, _) in self._files.items()}

    def place(self, index: int) -> tuple[str, float, float]:
        item = self.items[index]
        middle = (item.start + item.end) / 2
        start = max(0.0, min(item.start, middle - self._seconds / 2))
        return item.video, start, max(item.end, middle + self._seconds / 2)

    def sizes(self) -> list[int]:
        return file_sizes([path for path, _ in self._files.values()])

    def streams(self, index: int) -> dict[str, Stream]:
        video, start, end = self.place(index)
        found = {}
        for modality, (path, rate) in self._files.items():
            with _opened(path) as file:
                names = set(file)  # `in file` would follow links
                name = next((name for name in spellings(video) if name in names), None)
                if name is not None:
                    movie = _rows(file, name, path)
                    span = rows_within(len(movie), rate, start, end)
                    rows = check_rows(movie[span.start : span.stop], f"{video} in {path}")
                    found[modality] = Stream(unit(rows), row_times(span, rate, start))
        return found


def _annotations(root: Path, split: str) -> tuple[str, list[Line]]:
    """Returns the name of the split in the data, and its lines."""
    tables = {
        **{name: f"MAD_{name}.json" for name in ("train", "val", "test")},
        **{name: f"mad-v2-ad-{name.removeprefix('train-')}.csv" for name in (_UNNAMED, _NAMED)},
    }
    places = [root / "annotations" / "MAD-v1", root / "annotations" / "MAD-v2", root / "annotations", root]
    there = {name: path for name, table in tables.items() if (path := _first(places, table)) is not None}
    evaluation = [_EVALUATION] if {"val", "test"} <= set(there) else []
    found = find_split(split, [*there, *evaluation], str(root))
    if found in (_UNNAMED, _NAMED):
        return found, list(_read_table(there[found], found))
    if found != _EVALUATION:
        return found, list(_read_json(there[found]))
    lines = [*_read_json(there["val"]), *_read_json(there["test"])]
    return found, [line for line in lines if line[1] in _EVALUATED]


def _first(places: list[Path], name: str) -> Path | None:
    return next((place / name for place in places if file_exists(place / name)), None)


def _read_json(path: Path) -> Iterator[Line]:
    lines = read_json(path)
    if not isinstance(lines, dict):
        raise DataError(f"{path} must be a JSON object of sentences by id")
    for name, line in lines.items():
        fields: Any = line if isinstance(line, dict) else {}
        movie, sentence, times = (fields.get(key) for key in ("movie", "sentence", "timestamps"))
        if not isinstance(movie, (str, int)) or not isinstance(sentence, str) or not is_row(times, 2):
            raise DataError(
                f"the sentence {name!r} of {path} must have movie, sentence and timestamps, a start and an end"
            )
        yield name, str(movie), float(times[0]), float(times[1]), sentence


def _read_table(path: Path, split: str) -> Iterator[Line]:
    table = open_table(path)
    # The table without names also has a column of the sentences with names.
    text = "text_unnamed" if split == _UNNAMED and "text_unnamed" in table.headings else "text"
    columns = ("movie", "start", "end", text)
    table.check_columns(columns)
    for index, (number, row) in enumerate(table.select(columns)):
        try:
            start, end = parse_float(row["start"]), parse_float(row["end"])
        except ValueError as error:
            raise DataError(f"line {number} of {path} has no start and end in seconds: {error}") from error
        yield f"{split}{index}", row["movie"], start, end, row[text]


def _features(root: Path) -> dict[str, tuple[Path, float]]:
    """Returns the file of each modality, and its rows per second."""
    places = [root / "features", root]
    found: dict[str, tuple[Path, float]] = {}
    frames = next((path for name in _FRAMES if (path := _first(places, name)) is not None), None)
    if frames is not None:
        found["video"] = (frames, _FRAME_RATE)
    sounds = [path for place in places for path in visible(place, "*.h5") if _SOUND.fullmatch(path.name)]
    if len(sounds) > 1:
        raise DataError(f"{sounds[0]} and {sounds[1]} are both features of sound; move one of them away")
    for path in sounds:
        found["audio"] = (path, float(_SOUND.fullmatch(path.name)[1]))  # type: ignore[index]  # it was among these
    if not found:
        raise DataError(f"{root} has no {' or '.join(_FRAMES[:2])}, nor {root / 'features'}; put one there")
    return found


def _width(path: Path) -> int:
    with _opened(path) as file:
        movie = next(iter(file), None)
        if movie is None:
            raise DataError(f"{path} must have one data set per movie, with one row per frame")
        return _rows(file, movie, path).shape[1]


def _rows(file: Any, movie: str, path: Path) -> Any:
    """Returns the data set of a movie if it is in this file: an HDF5 file can refer to data in others."""
    h5py = _import_h5py()
    found = file[movie] if isinstance(file.get(movie, getlink=True), h5py.HardLink) else None
    if not isinstance(found, h5py.Dataset) or found.is_virtual or found.external or len(found.shape or ()) != 2:
        raise DataError(f"{path} must have one data set per movie, with one row per frame; {movie!r:.60} is none")
    return found


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Opens a file for a single read, because handles don't survive a fork."""
    try:
        open_regular(path).close()  # HDF5 would wait for the other end of a pipe
        with _import_h5py().File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise DataError(f"{path} is not a complete HDF5 file: {reason(error)}") from error


def _import_h5py() -> ModuleType:
    try:
        import h5py
    except ImportError:
        raise MissingExtraError(
            "Reading MAD's features needs h5py, which is not installed; pip install 'lamzoo[captions]'."
        ) from None
    return h5py
