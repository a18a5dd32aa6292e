"""QVHighlights, TVSum and Charades-STA in their official layouts, with a folder of features."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lamzoo.data.csv_tables import open_table
from lamzoo.data.feature_arrays import Features
from lamzoo.data.json_files import check_fields, is_grid, is_row, read_json_lines, read_lines
from lamzoo.data.moments.base import MomentQuery, MomentSource
from lamzoo.data.moments.feature_folder import FeatureFolder
from lamzoo.data.paths import check_folder, file_exists
from lamzoo.data.splits import find_split
from lamzoo.errors import DataError
from lamzoo.reading import parse_float

_CLIP_SECONDS = 2.0
_HIGHEST = 1e6  # a grade; published ones are at most 5
_LONGEST = 7 * 24 * 3600.0  # maximum duration of a video, seconds: a week


class FolderSource(MomentSource):
    """Queries with features in files.

    Args:
        split: name of the split in the data.
        queries: the queries.
        root: the folder of the features, which is accessed when features are read.
    """

    clip_seconds = _CLIP_SECONDS

    def __init__(self, split: str, queries: list[MomentQuery], root: Path) -> None:
        self.split, self.queries, self._root = split, queries, root

    @cached_property
    def _features(self) -> FeatureFolder:
        return FeatureFolder(self._root)

    def video(self, index: int) -> Features:
        return self._features.video(self.queries[index].video)

    def text(self, index: int) -> Features:
        return self._features.text(self.queries[index].qid)

    def sizes(self) -> list[int]:
        return self._features.sizes([query.video for query in self.queries], [query.qid for query in self.queries])


def qvhighlights(root: Path, split: str) -> FolderSource:
    """Opens QVHighlights: ``highlight_{train,val,test}_release.jsonl`` (or ``.jsonl.gz``).

    The moments of the test split, released in 2026 as ``highlight_test_with_gt.jsonl``, are used if that file exists.

    Args:
        root: the folder with the annotations and, in ``features`` or next to them, the features.
        split: ``train``, ``validation`` or ``test``.

    Raises:
        DataError: there is no such folder, file or split, or a line is invalid.
    """
    check_folder(root)
    names = {
        "train": ("highlight_train_release",),
        "val": ("highlight_val_release",),
        "test": ("highlight_test_with_gt", "highlight_test_release"),
    }
    there = {name: path for name, stems in names.items() if (path := _first(root, stems)) is not None}
    found = find_split(split, there, str(root))
    queries = [_qvhighlights_query(line, where) for line, where in read_json_lines(there[found])]
    return FolderSource(found, queries, root)


def _qvhighlights_query(line: Mapping[str, Any], where: str) -> MomentQuery:
    check_fields(line, {"qid": int, "query": str, "vid": str, "duration": int | float}, where)
    windows, duration = line.get("relevant_windows") or [], _duration(line["duration"], where)
    if not isinstance(windows, list) or not all(is_row(window, 2) for window in windows):
        raise DataError(f"{where} has the relevant_windows {windows!r:.60}; each must be [start, end], in seconds")
    spans = tuple((float(start), float(end)) for start, end in windows)
    return MomentQuery(line["qid"], line["query"], line["vid"], duration, spans, _grades(line, duration, where))


def _grades(line: Mapping[str, Any], duration: float, where: str) -> Features | None:
    """Returns the grades of each clip, ``(clips, annotators)``; None if there are none."""
    clips, scores = line.get("relevant_clip_ids"), line.get("saliency_scores")
    if clips is None or scores is None or clips == scores == []:
        return None
    total = int(duration / _CLIP_SECONDS)
    if not is_row(clips) or not all(isinstance(clip, int) for clip in clips):
        raise DataError(f"{where} has the relevant_clip_ids {clips!r:.60}; they must be whole numbers from 0")
    if not isinstance(scores, list) or (scores and not is_grid(scores)):
        raise DataError(f"{where} has the saliency_scores {scores!r:.60}; all clips must have equally many grades")
    if len(clips) != len(scores) or len(set(clips)) < len(clips) or not all(0 <= clip < total for clip in clips):
        raise DataError(
            f"{where} grades {len(scores)} clips and lists {len(clips)} of a video of {total}; they must agree"
        )
    grades = np.zeros((total, len(scores[0])), dtype=np.float32)
    grades[clips] = _grade_array(scores, "saliency_scores", where)
    return grades


def _grade_array(grades: list[list[float]], name: str, where: str) -> Features:
    """Returns grades as an array, ``(clips, annotators)``, after checking that they are of a usual size."""
    found = np.array(grades, dtype=np.float64).reshape(len(grades), -1)
    if not (np.abs(found) <= _HIGHEST).all():
        raise DataError(f"{where} has a grade among its {name} that is not between -{_HIGHEST:g} and {_HIGHEST:g}")
    return found.astype(np.float32)


def tvsum(root: Path, split: str, domain: str | None = None) -> FolderSource:
    """Opens TVSum in QD-DETR's format: ``tvsum_{train,val}.jsonl`` (or ``.jsonl.gz``), with 20 grades per clip.

    Args:
        root: the folder with the labels and, in ``features`` or next to them, the features.
        split: ``train`` or ``validation``.
        domain: one of the ten, such as ``BK``; all by default.

    Raises:
        DataError: there is no such folder, file, split or domain, or a line is invalid.
    """
    check_folder(root)
    there = {name: path for name in ("train", "val") if (path := _first(root, (f"tvsum_{name}",))) is not None}
    found = find_split(split, there, str(root))
    lines = read_json_lines(there[found])
    for line, where in lines:
        fields = {"qid": str, "query": str, "vid": str, "duration": int | float, "label": list, "domain": str}
        check_fields(line, fields, where)
        if not is_grid(line["label"]):
            raise DataError(f"{where} has a label that is not a list of clips with equally many grades")
    domains = sorted({line["domain"] for line, _ in lines})
    if domain is not None and domain not in domains:
        raise DataError(f"{there[found]} has no domain {domain!r}; it has {', '.join(domains)}")
    queries = [
        MomentQuery(
            line["qid"], line["query"], line["vid"], _CLIP_SECONDS * len(line["label"]), (),
            _grade_array(line["label"], "label", where),
        )
        for line, where in lines
        if domain is None or line["domain"] == domain
    ]  # fmt: skip
    return FolderSource(found, queries, root)


_CHARADES = re.compile(r"(\S+) ([0-9]+(?:\.[0-9]+)?) ([0-9]+(?:\.[0-9]+)?)##(.+)")


def charades(root: Path, split: str) -> FolderSource:
    """Opens Charades-STA: ``charades_sta_{train,test}.txt``, and ``Charades_v1_{train,test}.csv`` for the durations.

    The id of a query is ``<split><number of its line>``, from 0, so its features are in ``qidtest0.npz`` etc.

    Args:
        root: the folder with both and, in ``features`` or next to them, the features.
        split: ``train`` or ``test``.

    Raises:
        DataError: there is no such folder, file or split, a line is invalid, or a video has no duration.
    """
    check_folder(root)
    there = {name: path for name in ("train", "test") if file_exists(path := root / f"charades_sta_{name}.txt")}
    found = find_split(split, there, str(root))
    lengths = _charades_lengths(root / f"Charades_v1_{found}.csv")
    queries = []
    for number, text in enumerate(read_lines(there[found])):
        if not text.strip():
            continue
        match = _CHARADES.fullmatch(text.strip())
        where = f"line {number + 1} of {there[found]}"
        if match is None:
            raise DataError(f"{where} doesn't have the form 'VIDEO START END##SENTENCE'")
        video, start, end, sentence = match.groups()
        if video not in lengths:
            raise DataError(f"{where} is about the video {video}, which is not in Charades_v1_{found}.csv")
        window = (float(start), min(float(end), lengths[video]))
        if window[0] < window[1]:  # a few moments end before they start, or start after the end of the video
            queries.append(MomentQuery(f"{found}{number}", sentence, video, lengths[video], (window,)))
    return FolderSource(found, queries, root)


def _charades_lengths(path: Path) -> dict[str, float]:
    table = open_table(path)
    columns = ("id", "length")
    table.check_columns(columns)
    return {
        row["id"]: _duration(row["length"], f"line {number} of {path}") for number, row in table.select_filled(columns)
    }


def _duration(value: float | str, where: str) -> float:
    try:
        seconds = parse_float(value) if isinstance(value, str) else float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= _LONGEST:
        raise DataError(
            f"{where} has a duration of {value} s; it must be a number of seconds, above 0 and at most "
            f"{_LONGEST:g} (a week)"
        )
    return seconds


def read_queries(path: Path) -> dict[int | str, str]:
    """Reads the queries of a file in QVHighlights' format: JSON lines with ``qid`` and ``query``, optionally ``.gz``.

    Raises:
        DataError: the file can't be read or has no queries, a line is invalid, or a query is listed twice.
    """
    found: dict[int | str, str] = {}
    for line, where in read_json_lines(path):
        check_fields(line, {"qid": int | str, "query": str}, where)
        qid, text = line["qid"], line["query"]
        if not text.strip():
            raise DataError(f"{where} has an empty query; fill it in, or remove the line")
        if qid in found:
            raise DataError(f"the query {qid!r} is listed twice in {path}; remove one of them")
        found[qid] = text
    if not found:
        raise DataError(f"{path} has no queries")
    return found


def _first(root: Path, stems: tuple[str, ...]) -> Path | None:
    paths = [root / f"{stem}{suffix}" for stem in stems for suffix in (".jsonl", ".jsonl.gz")]
    return next((path for path in paths if file_exists(path)), None)
