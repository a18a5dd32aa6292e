"""The frames that represent the clips of a video, or spans of it: pure arithmetic."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lamzoo.data.video.sampling import FrameSampling
from lamzoo.errors import ConfigError

_ROUNDING = 1e-6  # seconds: a frame's time is a ratio of whole numbers, a clip's middle a float


@dataclass(frozen=True)
class ClipMiddles(FrameSampling):
    """One frame for each clip of a video: the last one that appears before the clip's middle.

    These are the frames that FFmpeg's filter ``fps`` picks, with which QVHighlights' features were made at
    ``fps=0.5``: a frame for each clip of 2 seconds. A last clip of which the video has less than half is none.

    Attributes:
        fps: clips per second.
        max_frames: how many clips at most, from ``first`` on; None for all.
        first: the clip to begin with, from 0.

    Raises:
        ConfigError: a rate or number that is not positive, or a first clip below 0.
    """

    fps: float | None = 0.5
    max_frames: int | None = None
    first: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fps is None or self.first < 0:
            raise ConfigError(f"ClipMiddles has fps {self.fps} and first {self.first}; clips need a rate and numbers.")

    def clips(self, duration: float) -> int:
        """Returns how many clips a video of ``duration`` seconds has, at least 1."""
        return max(1, math.floor(duration * self._rate + 0.5 + _ROUNDING))

    def times(self, duration: float) -> list[float]:
        """Returns the clips' middles, seconds."""
        end = self.clips(duration)
        if self.max_frames is not None:
            end = min(end, self.first + self.max_frames)
        return [(number + 0.5) / self._rate for number in range(self.first, end)]

    def pick(self, times: Sequence[float], duration: float) -> list[int]:
        """Returns the indices of the frames to take out of a video's own; see :meth:`FrameSampling.pick`."""
        return [max(0, bisect.bisect_left(times, middle - _ROUNDING) - 1) for middle in self.times(duration)]

    @property
    def _rate(self) -> float:
        assert self.fps is not None  # checked when it was made
        return self.fps


@dataclass(frozen=True)
class Instants(FrameSampling):
    """The frames that are on screen at chosen times.

    Attributes:
        at: seconds from the video's start, rising; one behind the end takes the last frame.
    """

    at: tuple[float, ...] = (0.0,)

    def times(self, duration: float) -> list[float]:
        """Returns the chosen times, whatever the duration."""
        return list(self.at)
