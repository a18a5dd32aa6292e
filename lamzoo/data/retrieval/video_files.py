"""Video files, found in a folder by the ids of a list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lamzoo.data.fingerprint import file_sizes
from lamzoo.data.paths import check_folder, file_exists, nfc
from lamzoo.data.retrieval.base import VideoSource
from lamzoo.data.video.reader import VideoClip, read_video, videos_below
from lamzoo.data.video.sampling import FrameSampling
from lamzoo.errors import DataError


class FileSource(VideoSource):
    """Base of layouts with one file per video.

    Args:
        videos: ids of the videos.
        paths: their files.
        captions: captions of each video.
        split: name of the split in the data, or ``None``.
        listed: the file that lists the videos, for messages.
    """

    def __init__(
        self,
        videos: Sequence[str],
        paths: Sequence[Path],
        captions: Sequence[Sequence[str]],
        split: str | None,
        listed: Path,
    ) -> None:
        self.videos, self.captions, self.split = videos, captions, split
        self._paths = paths
        reasons = (_absence(path, listed) for path in paths)
        self.lost = {index: reason for index, reason in enumerate(reasons) if reason is not None}

    def read(self, index: int, sampling: FrameSampling, threads: int = 1) -> VideoClip:
        return read_video(self._paths[index], sampling, threads=threads)

    def sizes(self) -> list[int]:
        return file_sizes(self._paths)

    def name(self, index: int) -> str:
        return str(self._paths[index])


def locate(ids: Sequence[str], root: Path, folders: Sequence[str], listed: Path) -> list[Path]:
    """Finds the files ``ID.mp4`` (or avi, webm, ...) of videos.

    Args:
        ids: the videos.
        root: the data set's folder.
        folders: candidate folders in it; the first one with videos is searched, with its subfolders.
        listed: the file that lists the ids, for messages.

    Returns:
        The file of each id; ``ID.mp4`` in the folder for a video without one.

    Raises:
        DataError: a video has several files, or none of them has one; names it.
    """
    for folder in (root / name for name in folders):
        files = index_files(folder)
        if files:
            break
    if not any(nfc(video) in files for video in ids):
        raise DataError(
            f"{folder} has no video {ids[0]!r}{_and_more(len(ids) - 1, len(ids))}; add {ids[0]}.mp4, or a file with "
            f"another extension, or remove the id from {listed}"
        )
    return [only_file(files.get(nfc(video), [folder / f"{video}.mp4"]), video) for video in ids]


def index_files(folder: Path) -> dict[str, list[Path]]:
    """Returns the video files of a folder and its subfolders by name without extension, in NFC."""
    found: dict[str, list[Path]] = {}
    for path in videos_below(folder):
        found.setdefault(nfc(path.stem), []).append(path)
    return found


def find_video(folder: Path, video: str) -> Path:
    """Returns the file ``VIDEO.mp4`` (or avi, webm, ...) of a folder or its subfolders.

    Raises:
        DataError: there is no such folder, or it has no such file or several.
    """
    check_folder(folder)
    paths = index_files(folder).get(nfc(video))
    if paths is None:
        raise DataError(f"{folder} has no video {video!r}; add {video}.mp4, or a file with another extension")
    return only_file(paths, video)


def only_file(paths: Sequence[Path], video: str) -> Path:
    """Returns the one file of a video.

    Raises:
        DataError: there are several.
    """
    if len(paths) > 1:
        raise DataError(f"the video {video!r} is both {paths[0]} and {paths[1]}; move one of them away")
    return paths[0]


def captions_of(
    ids: Sequence[str], captions: Mapping[str, Sequence[str]], described: Path, listed: Path
) -> list[Sequence[str]]:
    """Looks up the captions of videos.

    Args:
        ids: the videos.
        captions: by id.
        described: the file of the captions, for messages.
        listed: the file that lists the ids, for messages.

    Raises:
        DataError: a video has no caption.
    """
    known = {nfc(video): texts for video, texts in captions.items()}
    missing = [video for video in ids if not known.get(nfc(video))]
    if missing:
        raise DataError(
            f"{described} has no caption of the video {missing[0]!r}{_and_more(len(missing) - 1, len(ids))}; "
            f"add one, or remove the video from {listed}"
        )
    return [known[nfc(video)] for video in ids]


def _absence(path: Path, listed: Path) -> str | None:
    """Returns why a listed file can't be opened, as far as its folders tell; None if they don't."""
    try:
        return None if file_exists(path) else f"there is no such file, and {listed.name} lists it"
    except DataError as error:
        return getattr(error.__cause__, "strerror", None) or str(error)


def _and_more(more: int, total: int) -> str:
    return f", nor {more} more of the {total}" if more else ""
