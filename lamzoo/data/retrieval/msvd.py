"""MSVD (the Microsoft Research video description corpus) in CLIP4Clip's layout, without its pickle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lamzoo.data.json_files import read_json, read_lines
from lamzoo.data.paths import check_folder, file_exists
from lamzoo.data.retrieval.video_files import FileSource, captions_of, locate
from lamzoo.data.splits import find_split
from lamzoo.errors import DataError

#: Folders of the videos: as in YouTubeClips.tar, as in CLIP4Clip's README, or anywhere below the root.
_FOLDERS = ("YouTubeClips", "MSVD_Videos", "videos", ".")
_HANDED_OUT = "https://github.com/ArrowLuo/CLIP4Clip/releases/download/v0.0/msvd_data.zip"
_CONVERT = (
    'python -c "import json, pickle; '
    "json.dump(pickle.load(open('raw-captions.pkl', 'rb')), open('raw-captions.json', 'w'))\""
)


class MsvdSource(FileSource):
    """MSVD's lists, captions and videos in one folder.

    The lists are ``train_list.txt`` (1,200 videos), ``val_list.txt`` (100) and ``test_list.txt`` (670), one id per
    line. ``raw-captions.json`` contains the captions, some 40 per video: ``{id: [caption, ...]}``, each a string or a
    list of words. CLIP4Clip distributes them as the pickle ``raw-captions.pkl``, which lamzoo never opens, because a
    pickle can run code; the error about the missing JSON has the command that converts it. Videos are ``ID.avi``, or
    have another extension, in ``YouTubeClips``, ``MSVD_Videos``, ``videos`` or anywhere else below the folder; those
    without a file are ``lost``.

    Args:
        root: the folder.
        split: ``train``, ``validation`` or ``test``.

    Raises:
        DataError: there is no such folder, split or file, a file is invalid, or a video has no caption or
            several files, or no video has a file.
    """

    def __init__(self, root: Path, split: str) -> None:
        check_folder(root)
        split = find_split(split, ("train", "val", "test"), str(root))
        listed = root / f"{split}_list.txt"
        ids = _read_list(listed)
        described = root / "raw-captions.json"
        captions = captions_of(ids, _read_captions(described), described, listed)
        super().__init__(ids, locate(ids, root, _FOLDERS, listed), captions, split, listed)


def _read_list(path: Path) -> list[str]:
    if not file_exists(path):
        raise DataError(f"{path.parent} has no {path.name}; {_HANDED_OUT} has it")
    ids = [line.strip() for line in read_lines(path) if line.strip()]
    if not ids:
        raise DataError(f"{path} lists no videos")
    return ids


def _read_captions(path: Path) -> dict[str, Sequence[str]]:
    if not file_exists(path):
        pickled = path.with_suffix(".pkl")
        get = "" if file_exists(pickled) else f"download {pickled.name} from {_HANDED_OUT}, and "
        raise DataError(
            f"{path.parent} has no {path.name}; {get}if you trust {pickled.name}, convert it once, in that folder, "
            f"with: {_CONVERT}"
        )
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} must be a JSON object of lists of captions by video id")
    return {video: _sentences(captions, video, path) for video, captions in content.items()}


def _sentences(captions: object, video: str, path: Path) -> list[str]:
    """Returns captions as strings, joining lists of words."""
    sentences = []
    for caption in captions if isinstance(captions, list) else [None]:
        words = [caption] if isinstance(caption, str) else caption
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise DataError(f"the captions of {video!r} in {path} must be a list of strings, or of lists of words")
        sentences.append(" ".join(words))
    return sentences
