"""Clips of the GRID corpus, a talker's mouth or face with the sentence that he says, packed as one JPEG a clip."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from lamzoo.data.retrieval.base import VideoSource
from lamzoo.data.retrieval.jpegs import JpegLines
from lamzoo.data.sampling import FrameSampling
from lamzoo.data.video import VideoClip
from lamzoo.errors import DataError

GridView = Literal["mouth", "face", "lips", "motion"]

_RATE = 25  # frames a second of the corpus


@dataclass(frozen=True)
class _Layout:
    """How the frames of a clip lie below each other in one image of an archive.

    Attributes:
        archive: its name.
        width: of a frame, in pixels.
        height: likewise.
        first: which of the clip's frames is the first one there.
        step: from one frame to the next.
        box: what is taken of a frame: left, upper, right and lower edge.
        motion: how many times its difference from the clip's mean frame is shown, around a middle grey; 0 shows the
            frame itself.
    """

    archive: str
    width: int
    height: int
    first: int
    step: int
    box: tuple[int, int, int, int]
    motion: float = 0.0

    def numbers(self, total: int) -> range:
        """Returns which of a clip's frames the image holds."""
        return range(self.first, total, self.step)


_LAYOUTS: dict[str, _Layout] = {
    "mouth": _Layout("mouth.npz", 80, 48, 0, 1, (0, 0, 80, 48)),
    "lips": _Layout("mouth.npz", 80, 48, 0, 1, (24, 12, 72, 44)),
    "motion": _Layout("mouth.npz", 80, 48, 0, 1, (24, 12, 72, 44), motion=3.0),
    "face": _Layout("face.npz", 64, 64, 2, 5, (0, 0, 64, 64)),
}


class GridSource(VideoSource):
    """``captions.jsonl`` (``id``, ``n_frames``, ``text``, ``split``, ``words``) and ``mouth.npz`` or ``face.npz``.

    The mouth is grey, 80 x 48 pixels at 25 frames a second; the lips are 48 x 32 pixels of its middle, and their motion
    is each frame's difference from the clip's mean. The face has colours, 64 x 64 pixels at 5 frames a second, its
    first frame 0.08 s after the clip's. A frame's time is its number in the clip over 25.

    Args:
        root: the folder.
        split: ``train``, ``validation`` or ``test``.
        view: what is seen.

    Raises:
        DataError: there is no such folder, file or split, or the files do not fit each other.
    """

    def __init__(self, root: Path, split: str, view: GridView = "mouth") -> None:
        if view not in get_args(GridView):
            raise DataError(f"GRID has no view {view!r}; it has {', '.join(map(repr, get_args(GridView)))}")
        self._layout = _LAYOUTS[view]
        self._clips = JpegLines(root, self._layout.archive, {"id": str, "n_frames": int, "text": str}, split)
        self.split = self._clips.split
        self.videos = [line["id"] for line in self._clips.lines]
        self.captions = [[line["text"]] for line in self._clips.lines]

    def read(self, index: int, sampling: FrameSampling, threads: int = 1) -> VideoClip:
        total = self._clips.lines[index]["n_frames"]
        frames, numbers = self._frames(index)
        taken = self._pick(numbers, total, sampling)
        return VideoClip([frames[k] for k in taken], [numbers[k] / _RATE for k in taken], total / _RATE)

    def splice(self, among: Sequence[int], sampling: FrameSampling, phrase: bool = False) -> tuple[VideoClip, str]:
        """Says each of a sentence's words as another clip does, with the pause before it; see the base class.

        All of GRID's sentences have the same grammar, so the new one is a sentence of it too, or a part of one.
        """
        frames: list[Image.Image] = []
        numbers: list[int] = []
        words: list[str] = []
        shift = 0  # from a frame's number in its clip to that in the new one
        length = len(self._words(among[0]))
        slots = range(length)
        if phrase:
            [count] = random.choices(range(1, length + 1), [1 / count**2 for count in range(1, length + 1)])
            first = random.randint(0, length - count)
            slots = slots[first : first + count]
        for slot in slots:
            index = random.choice(among)
            spoken = self._words(index)
            start = 0 if slot == 0 else round(spoken[slot - 1][2] * _RATE)
            last = slot == length - 1
            end = self._clips.lines[index]["n_frames"] if last else max(start + 1, round(spoken[slot][2] * _RATE))
            words.append(spoken[slot][0])
            for frame, number in zip(*self._frames(index), strict=True):
                if start <= number < end:
                    frames.append(frame)
                    numbers.append(number - start + shift)
            shift += end - start
        if not frames:  # a word can be shorter than the face's time between two frames
            return self.splice(among, sampling)
        taken = self._pick(numbers, shift, sampling)
        clip = VideoClip([frames[k] for k in taken], [numbers[k] / _RATE for k in taken], shift / _RATE)
        return clip, " ".join(words)

    def _words(self, index: int) -> list[tuple[str, float, float]]:
        words = self._clips.lines[index].get("words")
        if not isinstance(words, list) or len(words) != len(self.captions[index][0].split()):
            raise DataError(f"the line of {self.name(index)} in captions.jsonl has no words with their times to splice")
        return words

    def _pick(self, numbers: Sequence[int], total: int, sampling: FrameSampling) -> list[int]:
        return sampling.pick([(number - numbers[0]) / _RATE for number in numbers], total / _RATE)

    def _frames(self, index: int) -> tuple[list[Image.Image], Sequence[int]]:
        """Returns all frames of a clip, and their numbers in it."""
        layout, numbers = self._layout, self._layout.numbers(self._clips.lines[index]["n_frames"])
        strip = self._clips.decode(index)
        if strip.size != (layout.width, layout.height * len(numbers)) or not numbers:
            raise DataError(
                f"{self.name(index)} is {strip.width} x {strip.height} pixels, not {len(numbers)} frames of "
                f"{layout.width} x {layout.height}; the n_frames of its line in captions.jsonl do not fit it"
            )
        left, upper, right, lower = layout.box
        tops = range(0, strip.height, layout.height)
        boxes = ((left, top + upper, right, top + lower) for top in tops)
        frames = [strip.crop(box) for box in boxes]
        return (_motion(frames, layout.motion) if layout.motion else frames), numbers

    def name(self, index: int) -> str:
        return self._clips.name(index)


def _motion(frames: Sequence[Image.Image], times: float) -> list[Image.Image]:
    """Returns by how much each frame differs from their mean, so many times, around a middle grey of 128."""
    pixels = np.stack([np.asarray(frame) for frame in frames]).astype(np.float32)
    moved = np.clip(128.5 + times * (pixels - pixels.mean(axis=0)), 0, 255).astype(np.uint8)
    return [Image.fromarray(frame) for frame in moved]
