"""Custom folders of videos with a table of captions."""

from __future__ import annotations

from pathlib import Path

from lamzoo.data.csv_tables import read_table
from lamzoo.data.paths import check_folder, file_exists, nfc
from lamzoo.data.retrieval.video_files import FileSource, only_file
from lamzoo.data.splits import find_split
from lamzoo.data.video.reader import VIDEO_EXTENSIONS, videos_below
from lamzoo.errors import DataError
from lamzoo.files import is_inner_path


class PlainSource(FileSource):
    """A folder of videos and ``captions.csv`` with the columns ``video``, ``caption`` and, optionally, ``split``.

    ``video`` is a path relative to the folder, with or without extension; paths are compared in NFC. A video with
    several captions has several lines; one without a file is ``lost``. Without the column ``split`` there are no
    splits.

    Args:
        root: the folder.
        split: value of the column ``split``.

    Raises:
        DataError: there is no such folder, table or split, a column is missing, a video has several files, or
            no video has one.
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
        if not any(files.look_up(row["video"]) for row in rows):
            files.find(rows[0]["video"])  # raises: none has a file
        for row in rows:
            path = files.look_up(row["video"]) or root / row["video"]
            captions.setdefault(path, []).append(row["caption"])
        videos = [path.relative_to(root).as_posix() for path in captions]
        super().__init__(videos, list(captions), list(captions.values()), own, table)


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
        """Returns the file of a video.

        Raises:
            DataError: as for :meth:`look_up`, or there is no file.
        """
        path = self.look_up(video)
        if path is None:
            extension = "" if Path(video).suffix.lower() in VIDEO_EXTENSIONS else " with a video extension"
            raise DataError(
                f"there is no {self._root / video}{extension}; add the video, or remove its lines from {self._table}"
            )
        return path

    def look_up(self, video: str) -> Path | None:
        """Returns the file of a video, if there is one.

        Raises:
            DataError: the path is not below the folder, or there are several files.
        """
        place = Path(video)
        if not is_inner_path(video):
            raise DataError(
                f"the video {video!r} in {self._table} is not below {self._root}; use a path relative to that folder"
            )
        whole = self._root / place
        try:
            if file_exists(whole):
                return whole
        except DataError:  # it is a lost video, with this reason
            return whole
        found = self._known.get(nfc(place.as_posix()))
        return None if found is None else only_file(found, video)
