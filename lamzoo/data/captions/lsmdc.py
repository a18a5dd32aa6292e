"""LSMDC and tables in its format: movie clips with one sentence and one feature file each."""

from __future__ import annotations

import re
from pathlib import Path

from lamzoo.data.captions.base import CaptionItem, CaptionSource, Stream
from lamzoo.data.captions.feature_files import FeatureFiles
from lamzoo.data.json_files import read_lines
from lamzoo.data.paths import check_folder, visible
from lamzoo.data.splits import find_split
from lamzoo.errors import DataError
from lamzoo.reading import parse_float

_TIME = r"([0-9]{1,4})\.([0-9]{2})\.([0-9]{2})\.([0-9]{3})"
_CLIP = re.compile(r"(?P<movie>.+)_[\d.]+-[\d.]+")


class LsmdcSource(CaptionSource):
    """``LSMDC16_annos_{training,val,test}.csv``, or ``{train,val,test}.csv``, and features of each clip.

    The tables have no headings. Their columns, separated by tabs: id of the clip, start and end of the described span,
    start and end of the clip (these two are optional), and the sentence. Times are ``01.02.27.034`` or in seconds. A
    clip on several lines has several captions. Clip ids are ``MOVIE_START-END``; a clip with another id counts as a
    movie of its own.

    Args:
        root: the folder with the tables, and ``features``; see :class:`FeatureFiles`. Rows of unknown times are
            distributed evenly over the clip.
        split: suffix of the table's name.

    Raises:
        DataError: there is no such folder, table or split, a line is invalid, or there are no features.
    """

    def __init__(self, root: Path, split: str) -> None:
        check_folder(root)
        tables = {path.stem.rpartition("annos_")[2]: path for path in visible(root, "*.csv")}
        self.split = find_split(split, tables, str(root))
        self._features = FeatureFiles(root / "features")
        if not self._features.modalities:
            raise DataError(
                f"{root / 'features'} has no features in video or audio; `lamzoo extract-features` makes the former"
            )
        self.modalities = self._features.modalities
        self._durations: dict[str, float] = {}
        items: dict[str, CaptionItem] = {}
        path = tables[self.split]
        for number, line in enumerate(read_lines(path), start=1):
            if not line.strip():
                continue
            item, duration = _read(line, f"line {number} of {path}")
            if item.id in items:
                first = items[item.id]
                item = CaptionItem(first.id, first.video, first.start, first.end, first.captions + item.captions)
            items[item.id] = item
            self._durations.setdefault(item.id, duration)
        self.items = list(items.values())

    def place(self, index: int) -> tuple[str, float, float]:
        clip = self.items[index].id  # each clip is a file
        return clip, 0.0, self._durations[clip]

    def sizes(self) -> list[int]:
        return self._features.sizes([item.id for item in self.items])

    def streams(self, index: int) -> dict[str, Stream]:
        clip = self.items[index].id
        duration = self._durations[clip]
        return self._features.read(clip, 0.0, float("inf"), duration)


def _read(line: str, where: str) -> tuple[CaptionItem, float]:
    """Returns an item and the duration of its clip."""
    fields = [field.strip() for field in line.split("\t")]
    if len(fields) not in (4, 6) or not fields[0]:
        raise DataError(
            f"{where} has {len(fields)} tab-separated fields; it must have a clip id, a start and an end (or four "
            "times), and a sentence"
        )
    clip, *times, sentence = fields
    start, end, *cut = (_seconds(time, where) for time in times)
    first, last = cut or (start, end)
    if not first < last:
        raise DataError(f"{where} has a clip from {first:g} to {last:g} s; its start must be before its end")
    found = _CLIP.fullmatch(clip)
    return CaptionItem(clip, clip if found is None else found["movie"], start, end, (sentence,)), last - first


def _seconds(text: str, where: str) -> float:
    found = re.fullmatch(_TIME, text)
    if found is not None:
        hours, minutes, seconds, thousandths = map(int, found.groups())
        return 3600 * hours + 60 * minutes + seconds + thousandths / 1000
    try:
        return parse_float(text)
    except ValueError:
        raise DataError(f"{where} has the time {text!r}; it must be in the form 01.02.27.034, or seconds") from None
