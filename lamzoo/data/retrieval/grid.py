"""Clips of the GRID corpus, a talker's mouth or face with the spoken sentence, stored as one JPEG per clip."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lamzoo.data.retrieval.base import VideoSource
from lamzoo.data.retrieval.jpeg_archive import JpegLines
from lamzoo.data.video.reader import VideoClip
from lamzoo.data.video.sampling import FrameSampling
from lamzoo.errors import DataError

GridView = Literal["mouth", "face", "lips", "motion"]

_RATE = 25  # frames per second of the corpus


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
    mode: str
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
        if view not in get_args(GridView):
            raise DataError(f"GRID has no view {view!r}; it has {', '.join(map(repr, get_args(GridView)))}")
        self._layout = _LAYOUTS[view]
        self._clips = JpegLines(root, self._layout.archive, {"id": str, "n_frames": int, "text": str}, split)
        self.split = self._clips.split
        self.videos = [line["id"] for line in self._clips.lines]
        self.captions = [[line["text"]] for line in self._clips.lines]
        self._kept: dict[int, NDArray[np.uint8]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}}  # each worker has its own cache

    def read(self, index: int, sampling: FrameSampling, threads: int = 1) -> VideoClip:
        total = self._clips.lines[index]["n_frames"]
        return _sampled(self._decode(index), self._layout.numbers(total), total, sampling)

    def splice(self, among: Sequence[int], sampling: FrameSampling, phrase: bool = False) -> tuple[VideoClip, str]:
        """Splices a sentence from words of different clips, each with the pause before it; see the base class.

        All of GRID's sentences have the same grammar, which the new one, or part of one, follows too. The clips of the
        words stay decoded in memory: 290 KB each for the mouth, 115 KB for lips and motion.
        """
        frames: list[NDArray[np.uint8]] = []
        numbers: list[int] = []
        words: list[str] = []
        shift = 0  # from frame indices in the clip to those in the new one
        length = len(self._words(among[0]))
        slots = range(length)
        if phrase:
            [count] = random.choices(range(1, length + 1), [1 / count**2 for count in range(1, length + 1)])
            first = random.randint(0, length - count)
            slots = slots[first : first + count]
        for slot in slots:
            index = random.choice(among)
            spoken = self._words(index)
            if len(spoken) < length:
                raise DataError(
                    f"clips with {length} and with {len(spoken)} words can't be spliced; set augment.splice to 0"
                )
            start = 0 if slot == 0 else round(spoken[slot - 1][2] * _RATE)
            last = slot == length - 1
            end = self._clips.lines[index]["n_frames"] if last else max(start + 1, round(spoken[slot][2] * _RATE))
            words.append(spoken[slot][0])
            if index not in self._kept:
                self._kept[index] = self._decode(index)
            there = self._layout.numbers(self._clips.lines[index]["n_frames"])
            for frame, number in zip(self._kept[index], there, strict=True):
                if start <= number < end:
                    frames.append(frame)
                    numbers.append(number - start + shift)
            shift += end - start
        if not frames:  # a word may be shorter than the frame interval of the face
            return self.splice(among, sampling, phrase)
        return _sampled(frames, numbers, shift, sampling), " ".join(words)

    def _words(self, index: int) -> list[tuple[str, float, float]]:
        words = self._clips.lines[index].get("words")
        if not isinstance(words, list) or len(words) != len(self.captions[index][0].split()):
            raise DataError(f"the line of {self.name(index)} in captions.jsonl has no words with times to splice")
        return words

    def _decode(self, index: int) -> NDArray[np.uint8]:
        """Returns all frames of a clip, ``(N, H, W)`` or ``(N, H, W, 3)``."""
        layout = self._layout
        count = len(layout.numbers(self._clips.lines[index]["n_frames"]))
        strip = self._clips.decode(index)
        if strip.size != (layout.width, layout.height * count) or not count:
            raise DataError(
                f"{self.name(index)} is {strip.width} x {strip.height} pixels, not {count} frames of "
                f"{layout.width} x {layout.height}; the n_frames of its line in captions.jsonl doesn't match"
            )
        pixels = np.asarray(strip.convert(layout.mode))
        left, upper, right, lower = layout.box
        frames = pixels.reshape(count, layout.height, *pixels.shape[1:])[:, upper:lower, left:right]
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
    taken = sampling.pick([(number - numbers[0]) / _RATE for number in numbers], total / _RATE)
    images = [Image.fromarray(frames[k]).convert("RGB") for k in taken]
    return VideoClip(images, [numbers[k] / _RATE for k in taken], total / _RATE)
