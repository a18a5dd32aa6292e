"""Flickr8k: photographs as videos of one frame, five captions each."""

from __future__ import annotations

from pathlib import Path

from lamzoo.data.jpeg_archive import CaptionLines, JpegFiles
from lamzoo.data.retrieval.base import VideoSource
from lamzoo.data.video.reader import VideoClip
from lamzoo.data.video.sampling import FrameSampling
from lamzoo.errors import DataError


class Flickr8kSource(VideoSource):
    """``captions.jsonl`` (``image``, ``captions``, ``split`` in each line) and ``images.npz``; clips last 0 s.

    Args:
        root: the folder.
        split: ``train``, ``validation`` or ``test``.

    Raises:
        DataError: there is no such folder, file or split, or the files are inconsistent.
    """

    def __init__(self, root: Path, split: str) -> None:
        listed = CaptionLines(root, {"image": str, "captions": list}, split)
        self._images = JpegFiles(listed, "images.npz")
        self.split = listed.split
        self.videos = [line["image"] for line in listed.lines]
        self.captions = [line["captions"] for line in listed.lines]
        for video, captions in zip(self.videos, self.captions, strict=True):
            if not all(isinstance(caption, str) for caption in captions):
                raise DataError(f"the captions of {video!r} in {root / 'captions.jsonl'} must all be strings")

    def read(self, index: int, sampling: FrameSampling, threads: int = 1) -> VideoClip:
        return VideoClip([self._images.decode(index)], [0.0], 0.0)

    def sizes(self) -> list[int]:
        return self._images.sizes()

    def name(self, index: int) -> str:
        return self._images.name(index)
