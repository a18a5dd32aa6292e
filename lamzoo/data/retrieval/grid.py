"""Clips of the GRID corpus, a talker's mouth or face with the spoken sentence, stored as one JPEG per clip."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lamzoo.data.grid_tokens import RATE, Words, draw_pieces, stacked_frames, timed_words
from lamzoo.data.jpeg_archive import CaptionLines, JpegFiles
from lamzoo.data.retrieval.base import VideoSource
from lamzoo.data.video.reader import VideoClip
from lamzoo.data.video.sampling import FrameSampling
from lamzoo.errors import DataError

GridView = Literal["mouth", "face", "lips", "motion"]


@dataclass(frozen=True)
class _Layout:
    """Layout of the frames of a clip, stacked vertically in one image of an archive.

    Attributes:
        archive: name of the archive.
        mode: Pillow mode of the frames.
        width: width of a frame, pixels.
        height: height of a frame, pixels.
        first: index in the clip of the first stored frame.
        step: distance of stored frames.
        box: crop of a frame: left, upper, right and lower edge.
        motion: factor of the difference from the mean frame of the clip, which is shown around medium grey; 0 shows the
            frame itself.
    """

    archive: str
    mode: Literal["L", "RGB"]
    width: int
    height: int
    first: int
    step: int
    box: tuple[int, int, int, int]
    motion: float = 0.0

    def numbers(self, total: int) -> range:
        """Returns the indices in the clip of the stored frames."""
        return range(self.first, total, self.step)


_LAYOUTS: dict[str, _Layout] = {
    "mouth": _Layout("mouth.npz", "L", 80, 48, 0, 1, (0, 0, 80, 48)),
    "lips": _Layout("mouth.npz", "L", 80, 48, 0, 1, (24, 12, 72, 44)),
    "motion": _Layout("mouth.npz", "L", 80, 48, 0, 1, (24, 12, 72, 44), motion=3.0),
    "face": _Layout("face.npz", "RGB", 64, 64, 2, 5, (0, 0, 64, 64)),
}


class GridSource(VideoSource):
    """``captions.jsonl`` (``id``, ``n_frames``, ``text``, ``split``, ``words``) and ``mouth.npz`` or ``face.npz``.

    The mouth is grey, 80 x 48 pixels at 25 frames per second; the lips are the middle 48 x 32 pixels, and their motion
    is the difference of each frame from the mean of the clip. The face is in colour, 64 x 64 pixels at 5 frames per
    second, starting 0.08 s after the clip. The time of a frame is its index in the clip divided by 25.

    Args:
        root: the folder.
        split: ``train``, ``validation`` or ``test``.
        view: the view of the talker.

    Raises:
        DataError: there is no such folder, file or split, or the files are inconsistent.
    """

    def __init__(self, root: Path, split: str, view: GridView = "mouth") -> None:
        self._layout = _LAYOUTS[view]
        captions = CaptionLines(root, {"id": str, "n_frames": int, "text": str}, split)
        self._clips = JpegFiles(captions, self._layout.archive)
        self._lines, self.split = captions.lines, captions.split
        self.videos = [line["id"] for line in self._lines]
        self.captions = [[line["text"]] for line in self._lines]
        self._kept: dict[int, NDArray[np.uint8]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}}  # each worker has its own cache

    def read(self, index: int, sampling: FrameSampling, threads: int = 1) -> VideoClip:
        total = self._length(index)
        return _sampled(self._decode(index), self._layout.numbers(total), total, sampling)

    def splice(self, among: Sequence[int], sampling: FrameSampling, phrase: bool = False) -> tuple[VideoClip, str]:
        """Splices a sentence from words of different clips, each with the pause before it; see the base class.

        All of GRID's sentences have the same grammar, which the new one, or part of one, follows too. The clips of the
        words stay decoded in memory: 290 KB each for the mouth, 115 KB for lips and motion.
        """
        frames: list[NDArray[np.uint8]] = []
        numbers: list[int] = []
        shift = 0  # from frame indices in the clip to those in the new one
        slots = None
        if phrase:
            length = len(self._words(among[0]))
            [count] = random.choices(range(1, length + 1), [1 / count**2 for count in range(1, length + 1)])
            first = random.randint(0, length - count)
            slots = range(first, first + count)
        pieces = draw_pieces(len(among), lambda clip: (self._words(among[clip]), self._length(among[clip])), slots)
        for piece in pieces:
            index = among[piece.clip]
            if index not in self._kept:
                self._kept[index] = self._decode(index)
            for frame, number in zip(self._kept[index], self._layout.numbers(self._length(index)), strict=True):
                if piece.start <= number < piece.end:
                    frames.append(frame)
                    numbers.append(number - piece.start + shift)
            shift += piece.end - piece.start
        if not frames:  # a word may be shorter than the frame interval of the face
            return self.splice(among, sampling, phrase)
        return _sampled(frames, numbers, shift, sampling), " ".join(piece.word[0] for piece in pieces)

    def _length(self, index: int) -> int:
        frames: int = self._lines[index]["n_frames"]
        return frames

    def _words(self, index: int) -> Words:
        words = self._lines[index].get("words")
        if not isinstance(words, list) or len(words) != len(self.captions[index][0].split()):
            raise DataError(f"the line of {self.name(index)} in captions.jsonl has no words with times to splice")
        return timed_words(self._lines[index])

    def _decode(self, index: int) -> NDArray[np.uint8]:
        """Returns all frames of a clip, ``(N, H, W)`` or ``(N, H, W, 3)``."""
        layout = self._layout
        count = len(layout.numbers(self._length(index)))
        left, upper, right, lower = layout.box
        frames = stacked_frames(self._clips, index, count, layout.height, layout.width, layout.mode)
        frames = frames[:, upper:lower, left:right]
        if not layout.motion:
            return frames.copy()
        moved = layout.motion * (frames - frames.mean(axis=0, dtype=np.float32))
        return np.clip(128.5 + moved, 0, 255).astype(np.uint8)

    def sizes(self) -> list[int]:
        return self._clips.sizes()

    def name(self, index: int) -> str:
        return self._clips.name(index)


def _sampled(
    frames: Sequence[NDArray[np.uint8]] | NDArray[np.uint8], numbers: Sequence[int], total: int, sampling: FrameSampling
) -> VideoClip:
    """Samples frames that have the given indices in a clip of ``total`` frames."""
    taken = sampling.pick([(number - numbers[0]) / RATE for number in numbers], total / RATE)
    images = [Image.fromarray(frames[k]).convert("RGB") for k in taken]
    return VideoClip(images, [numbers[k] / RATE for k in taken], total / RATE)
