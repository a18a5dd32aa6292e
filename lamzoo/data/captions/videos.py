"""Custom folders of videos with a table of captions, with the sound of the videos and precomputed features."""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image

from lamzoo.data.captions.base import CaptionItem, CaptionSource, Stream
from lamzoo.data.captions.feature_files import FeatureFiles
from lamzoo.data.captions.sound import PAIR, read_sound_stream
from lamzoo.data.csv_tables import read_table
from lamzoo.data.fingerprint import file_sizes
from lamzoo.data.grid_tokens import BANDS
from lamzoo.data.paths import check_folder, file_exists, nfc
from lamzoo.data.retrieval.caption_folder import Files
from lamzoo.data.splits import find_split
from lamzoo.data.video.instants import Instants, middles
from lamzoo.data.video.reader import probe_video, read_video
from lamzoo.errors import DataError
from lamzoo.reading import parse_float


class VideoFolder(CaptionSource):
    """A folder of videos and ``captions.csv``, with the columns ``video``, ``caption`` and optional others.

    ``video`` is a path relative to the folder, with or without extension; paths are compared in NFC. ``start`` and
    ``end`` are the described span, seconds in the video; without these columns it is the whole video. A span on several
    lines has several captions. Without the column ``split`` there are no splits.

    Features of the frames, ``video``, are files in ``features`` with the name of the video; see :class:`FeatureFiles`.
    Features of the sound, ``audio``, may be files too; otherwise they are computed from the videos: 50 tokens per
    second, each two spectra of 64 mel bands, minus the mean of each band and divided by their standard deviation in the
    clip, as for GRID. A silent video, or one without sound, has no ``audio``.

    Args:
        root: the folder.
        rate: rows per second of feature files that don't state it; files of ``lamzoo extract-features`` do.
        split: value of the column ``split``.

    Raises:
        DataError: there is no such folder, table or split, a column is missing, a time is invalid, a video has no file
            or several, two videos would have the same feature file, or the rate is 0.
    """

    how_to_split = "add a column split to captions.csv"

    def __init__(self, root: Path, rate: float | None, split: str) -> None:
        check_folder(root)
        if rate == 0:
            raise DataError(f"the features of {root} can't have 0 rows per second; set another rate, or omit it")
        table = root / "captions.csv"
        if not file_exists(table):
            raise DataError(
                f"{root} has no captions.csv; add one with the columns video,caption or video,start,end,caption,split"
            )
        rows = read_table(table, ("video", "caption"), ("start", "end", "split"))
        self.split = None
        if "split" in rows[0]:
            self.split = find_split(split, dict.fromkeys(row["split"] for row in rows), str(table))
            rows = [row for row in rows if row["split"] == self.split]
        if ("start" in rows[0]) != ("end" in rows[0]):
            raise DataError(f"{table} has only one of the columns start and end; it must have both, or neither")
        self._features = FeatureFiles(root / "features", rate)
        self.modalities = {**self._features.modalities}
        self.modalities.setdefault("audio", PAIR * BANDS)
        self._paths: list[Path] = []
        self.items = self._list(rows, root, table)

    def _list(self, rows: list[dict[str, str]], root: Path, table: Path) -> list[CaptionItem]:
        files = Files(root, table)
        captions: dict[tuple[Path, float, float], list[str]] = {}
        for row in rows:
            start, end = _span(row, table)
            captions.setdefault((files.find(row["video"]), start, end), []).append(row["caption"])
        by_stem: dict[str, Path] = {}
        items = []
        for (path, start, end), texts in captions.items():
            first = by_stem.setdefault(nfc(path.stem), path)
            if first != path and self._features.modalities:
                raise DataError(f"{first} and {path} would have the same feature file; rename one of them")
            video = path.relative_to(root).as_posix()
            name = video if math.isinf(end) else f"{video}[{start:g}-{end:g}]"
            items.append(CaptionItem(name, video, start, end, tuple(texts)))
            self._paths.append(path)
        return items

    def sizes(self) -> list[int]:
        names = [path.stem for path in self._paths]
        return [*file_sizes(self._paths), *self._features.sizes(names)]

    def frames(self, index: int, count: int) -> list[Image.Image]:
        item, path = self.items[index], self._paths[index]
        end = probe_video(path).duration if math.isinf(item.end) else item.end
        return read_video(path, Instants(at=middles(item.start, end, count))).frames

    def streams(self, index: int) -> dict[str, Stream]:
        item, path = self.items[index], self._paths[index]
        found = self._features.read(path.stem, item.start, item.end)
        if "audio" not in self._features.modalities:
            sound = read_sound_stream(path, item.start, item.end)
            if sound is not None:
                found["audio"] = sound
        return found


def _span(row: dict[str, str], table: Path) -> tuple[float, float]:
    if "start" not in row:
        return 0.0, math.inf
    try:
        start, end = parse_float(row["start"]), parse_float(row["end"])
    except ValueError:
        start = end = math.nan
    if not 0 <= start < end < math.inf:
        raise DataError(
            f"{table} describes {row['video']!r} from {row['start']} to {row['end']}; both must be seconds, the start "
            "before the end"
        )
    return start, end
