"""MSR-VTT in its official layout, with the split files of CLIP4Clip and JSFusion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lamzoo.data.csv_tables import read_table
from lamzoo.data.json_files import read_json
from lamzoo.data.paths import check_folder, file_exists
from lamzoo.data.retrieval.video_files import FileSource, captions_of, locate
from lamzoo.data.splits import find_split
from lamzoo.errors import DataError

TrainingList = Literal["9k", "7k"]

#: Folders of the videos: as in MSRVTT.zip, as in CLIP4Clip's README, or anywhere below the root.
_FOLDERS = ("videos/all", "videos", "MSRVTT_Videos", ".")
_DATA = "MSRVTT_data.json"
_TEST = "MSRVTT_JSFUSION_test.csv"
_HANDED_OUT = "https://github.com/ArrowLuo/CLIP4Clip/releases/download/v0.0/msrvtt_data.zip has it"


class MsrvttSource(FileSource):
    """MSR-VTT's split files, captions and videos in one folder.

    - ``test``: the 1,000 pairs of ``MSRVTT_JSFUSION_test.csv`` (columns ``video_id`` and ``sentence``), the "1k-A"
      split; besides the videos it needs no other file.
    - ``train``: the ids of ``MSRVTT_train.9k.csv`` or ``MSRVTT_train.7k.csv`` (column ``video_id``), with their
      captions, 20 each, from ``MSRVTT_data.json``.
    - ``validation``: the 497 videos whose official split is ``validate`` in ``MSRVTT_data.json``. Both training lists
      contain them, so validation scores don't measure generalisation.

    Videos are ``ID.mp4``, or have another extension, in ``videos/all``, ``videos``, ``MSRVTT_Videos`` or anywhere
    else below the folder; those without a file are ``lost``.

    Args:
        root: the folder.
        split: ``train``, ``validation`` or ``test``.
        training: the training list.

    Raises:
        DataError: there is no such folder, split or file, a file is invalid, or a video has no caption or
            several files, or no video has a file.
    """

    def __init__(self, root: Path, split: str, training: TrainingList = "9k") -> None:
        check_folder(root)
        split = find_split(split, ("train", "validation", "test"), str(root))
        if split == "test":
            listed = _existing(root / _TEST)
            captions: dict[str, list[str]] = {}
            for video, sentence in read_test_pairs(listed):
                captions.setdefault(video, []).append(sentence)
            ids, texts = list(captions), list[Sequence[str]](captions.values())
        else:
            data = _Data(_existing(root / _DATA))
            listed = data.path if split == "validation" else _existing(root / f"MSRVTT_train.{training}.csv")
            ids = data.ids("validate") if split == "validation" else read_video_ids(listed)
            texts = captions_of(ids, data.captions(), data.path, listed)
        super().__init__(ids, locate(ids, root, _FOLDERS, listed), texts, split, listed)


def read_test_pairs(path: Path) -> list[tuple[str, str]]:
    """Reads ``MSRVTT_JSFUSION_test.csv``: a video id and a sentence per line.

    Raises:
        DataError: the file is not CSV with the columns ``video_id`` and ``sentence``, or one of their cells is empty.
    """
    return [(row["video_id"], row["sentence"]) for row in read_table(path, ("video_id", "sentence"))]


def read_video_ids(path: Path) -> list[str]:
    """Reads ``MSRVTT_train.9k.csv`` or a file in its format: a video id per line.

    Raises:
        DataError: the file is not CSV with the column ``video_id``, or a cell is empty.
    """
    return [row["video_id"] for row in read_table(path, ("video_id",))]


class _Data:
    """``MSRVTT_data.json``: metadata of the videos, with 20 sentences each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._content = read_json(path)

    def ids(self, split: str) -> list[str]:
        found = [video["video_id"] for video in self._records("videos", "video_id", "split") if video["split"] == split]
        if not found:
            raise DataError(f"{self.path} has no video whose split is {split!r}")
        return found

    def captions(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for sentence in self._records("sentences", "video_id", "caption"):
            found.setdefault(sentence["video_id"], []).append(sentence["caption"])
        return found

    def _records(self, part: str, *fields: str) -> list[dict[str, Any]]:
        records = self._content.get(part) if isinstance(self._content, dict) else None
        if not isinstance(records, list):
            raise DataError(f"{self.path} has no list {part!r}; {_HANDED_OUT}")
        for number, record in enumerate(records):
            for field in fields:
                if not isinstance(record, dict) or not isinstance(record.get(field), str):
                    raise DataError(f"entry {number} of {part!r} in {self.path} must have the string {field!r}")
        return records


def _existing(path: Path) -> Path:
    if not file_exists(path):
        raise DataError(f"{path.parent} has no {path.name}; {_HANDED_OUT}")
    return path
