"""Frame sampling of videos, computed from frame times."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from lamzoo.errors import ConfigError

Slicing = Literal["head", "middle", "tail", "uniform"]


_MOST_FPS = 1000  # candidate times are listed for the whole video


@dataclass(frozen=True)
class FrameSampling:
    """Frame-sampling settings, as in CLIP4Clip (Luo et al., arXiv 2104.08860, section 4.2).

    Attributes:
        fps: candidate frames per second, the first one at the start; None for every frame of the video.
        max_frames: maximum number of candidates to keep; None for all.
        slicing: selection if there are more: consecutive candidates at the ``"head"``, ``"middle"`` or ``"tail"``, or
            ``"uniform"`` over the whole video.

    Raises:
        ConfigError: a rate or number is not positive, or the slicing is unknown.
    """

    fps: float | None = 1.0
    max_frames: int | None = 12
    slicing: Slicing = "uniform"

    def __post_init__(self) -> None:
        if self.fps is not None and not 0 < self.fps <= _MOST_FPS:
            raise ConfigError(
                f"FrameSampling.fps is {self.fps}; it must be above 0 and at most {_MOST_FPS}, or None for every frame."
            )
        if self.max_frames is not None and self.max_frames < 1:
            raise ConfigError(f"FrameSampling.max_frames is {self.max_frames}; it must be 1 or more.")
        if self.slicing not in get_args(Slicing):
            known = ", ".join(map(repr, get_args(Slicing)))
            raise ConfigError(f"FrameSampling.slicing is {self.slicing!r}; it must be one of {known}.")

    def keep(self, count: int) -> list[int]:
        """Returns the indices of the kept ones of ``count`` candidates, ascending."""
        limit = self.max_frames
        if limit is None or count <= limit:
            return list(range(count))
        match self.slicing:
            case "head":
                start = 0
            case "middle":
                start = (count - limit) // 2
            case "tail":
                start = count - limit
            case "uniform":
                # Equal steps from the first to the last candidate, rounded down, as with CLIP4Clip's np.linspace.
                return [index * (count - 1) // (limit - 1) for index in range(limit)] if limit > 1 else [0]
        return list(range(start, start + limit))

    def times(self, duration: float) -> list[float]:
        """Returns the times of the kept candidates in a video of ``duration`` seconds; requires ``fps``.

        A video of duration 0 has one candidate, at its start.

        Raises:
            ConfigError: ``fps`` is None, so the times depend on the frames of the video.
        """
        if self.fps is None:
            raise ConfigError("FrameSampling.fps is None, so the times depend on the frames of the video; set fps.")
        count = max(1, math.ceil(duration * self.fps - _ROUNDING))
        return [index / self.fps for index in self.keep(count)]

    def pick(self, times: Sequence[float], duration: float) -> list[int]:
        """Returns the indices of the selected frames of a video.

        Args:
            times: time of each frame, seconds from the first one, ascending.
            duration: duration of the whole video, seconds.

        Returns:
            Ascending indices into ``times``. A frame that is shown at several candidate times is repeated.
        """
        if self.fps is None:
            return self.keep(len(times))
        return [max(0, bisect.bisect_right(times, time + _ROUNDING) - 1) for time in self.times(duration)]


def adjusted(
    sampling: FrameSampling, *, fps: float | None = None, max_frames: int | None = None, slicing: Slicing | None = None
) -> FrameSampling:
    """Returns a sampling with the given values replaced; ``fps=0`` means every frame.

    Raises:
        ConfigError: as for :class:`FrameSampling`.
    """
    given: dict[str, Any] = {"max_frames": max_frames, "slicing": slicing}
    changes = {key: value for key, value in given.items() if value is not None}
    return replace(sampling, **changes) if fps is None else replace(sampling, fps=fps or None, **changes)


_ROUNDING = 1e-6  # seconds: frame times are ratios of integers, candidate times are floats
