"""Sampling of the frames that represent clips of a video, or spans of it."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lamzoo.data.video.sampling import FrameSampling
from lamzoo.errors import ConfigError

_ROUNDING = 1e-6  # seconds: frame times are ratios of integers, clip middles are floats


@dataclass(frozen=True)
class ClipMiddles(FrameSampling):
    """One frame for each clip of a video: the last one that appears before the clip's middle.

    These are the frames of FFmpeg's filter ``fps``, with which QVHighlights' features were computed at ``fps=0.5``: one
    frame per clip of 2 seconds. A last clip is dropped if the video contains less than half of it.

    Attributes:
        fps: clips per second.
        max_frames: maximum number of clips, from ``first`` on; None for all.
        first: index of the first clip.

    Raises:
        ConfigError: a rate or number is not positive, or ``first`` is negative.
    """

    fps: float | None = 0.5
    max_frames: int | None = None
    first: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fps is None or self.first < 0:
            raise ConfigError(
                f"ClipMiddles has fps {self.fps} and first {self.first}; fps must be set, first at least 0."
            )

    def clips(self, duration: float) -> int:
        """Returns the number of clips of a video of ``duration`` seconds, at least 1."""
        return max(1, math.floor(duration * self._rate + 0.5 + _ROUNDING))

    def numbers(self, duration: float) -> range:
        """Returns the indices of the sampled clips of a video of ``duration`` seconds."""
        end = self.clips(duration)
        return range(self.first, end if self.max_frames is None else min(end, self.first + self.max_frames))

    def times(self, duration: float) -> list[float]:
        """Returns the middles of the sampled clips, seconds."""
        return [(number + 0.5) / self._rate for number in self.numbers(duration)]

    def pick(self, times: Sequence[float], duration: float) -> list[int]:
        """Returns the indices of the selected frames of a video; see :meth:`FrameSampling.pick`."""
        return [max(0, bisect.bisect_left(times, middle - _ROUNDING) - 1) for middle in self.times(duration)]

    @property
    def _rate(self) -> float:
        assert self.fps is not None  # checked in __post_init__
        return self.fps


@dataclass(frozen=True)
class Instants(FrameSampling):
    """The frames that are shown at given times.

    Attributes:
        at: seconds from the start of the video, ascending; a time after the end selects the last frame.
    """

    at: tuple[float, ...] = (0.0,)

    def times(self, duration: float) -> list[float]:
        """Returns the given times, independent of the duration."""
        return list(self.at)


def middles(start: float, end: float, count: int) -> tuple[float, ...]:
    """Returns the middles of equal parts of a span, seconds."""
    return tuple(start + (number + 0.5) / count * (end - start) for number in range(count))
