"""Custom folders of videos with a table of captions."""

from __future__ import annotations

from pathlib import Path

from lamzoo.data.csv_tables import read_table
from lamzoo.data.paths import check_folder, file_exists, nfc
from lamzoo.data.retrieval.video_files import FileSource, only_file
from lamzoo.data.splits import find_split
from lamzoo.data.video.reader import VIDEO_EXTENSIONS, videos_below
from lamzoo.errors import DataError


class PlainSource(FileSource):
    """A folder of videos and ``captions.csv`` with the columns ``video``, ``caption`` and, optionally, ``split``.

    ``video`` is a path relative to the folder, with or without extension; paths are compared in NFC. A video with
    several captions has several lines. Without the column ``split`` there are no splits.

    Args:
        root: the folder.
        split: value of the column ``split``.

    Raises:
        DataError: there is no such folder, table or split, a column is missing, or a video has no file, or several.
    """

    how_to_split = "add a column split to captions.csv"

    def __init__(self, root: Path, split: str) -> None:
        check_folder(root)
        table = root / "captions.csv"
        if not file_exists(table):
            raise DataError(
                f"{root} has no captions.csv; add one with the columns video,caption or video,caption,split"
            )
        rows = read_table(table, ("video", "caption"), ("split",))
        own = None
        if "split" in rows[0]:
            own = find_split(split, dict.fromkeys(row["split"] for row in rows), str(table))
            rows = [row for row in rows if row["split"] == own]
        files = Files(root, table)
        captions: dict[Path, list[str]] = {}
        for row in rows:
            captions.setdefault(files.find(row["video"]), []).append(row["caption"])
        videos = [path.relative_to(root).as_posix() for path in captions]
        super().__init__(videos, list(captions), list(captions.values()), own)


class Files:
    """The files below a folder, by path with and without extension, in NFC."""

    def __init__(self, root: Path, table: Path) -> None:
        self._root, self._table = root, table
        self._known: dict[str, list[Path]] = {}
        for path in videos_below(root):
            inside = path.relative_to(root)
            for name in (inside, inside.with_suffix("")):
                self._known.setdefault(nfc(name.as_posix()), []).append(path)

    def find(self, video: str) -> Path:
        place = Path(video)
        if place.is_absolute() or ".." in place.parts:
            raise DataError(
                f"the video {video!r} in {self._table} is not below {self._root}; use a path relative to that folder"
            )
        whole = self._root / place
        if file_exists(whole):
            return whole
        found = self._known.get(nfc(place.as_posix()))
        if found is None:
            extension = "" if place.suffix.lower() in VIDEO_EXTENSIONS else " with a video extension"
            raise DataError(f"there is no {whole}{extension}; add the video, or remove its lines from {self._table}")
        return only_file(found, video)
