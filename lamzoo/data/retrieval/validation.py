"""Finding the invalid videos of a data set before a long run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from lamzoo.data.images.decode import unreadable_because
from lamzoo.data.retrieval.base import CaptionedVideos, VideoSource, select_videos
from lamzoo.data.validation import BadInput, OnBadInput, check_on_bad, find_invalid, valid_indices
from lamzoo.data.video.sampling import FrameSampling
from lamzoo.errors import DataError

_CHUNK = 4  # videos per report of a worker


def find_invalid_videos(
    dataset: CaptionedVideos,
    sampling: FrameSampling,
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[BadInput]:
    """Reads every video of a data set as a run would, and returns those that cannot be read.

    Args:
        dataset: the videos.
        sampling: frame sampling of the run; a truncated video may be valid for one sampling and invalid for another.
        workers: worker processes; 0 runs in the main process.
        progress: called with the number of videos read and their total.

    Returns:
        The invalid videos, in the data set's order.

    Raises:
        ConfigError: a negative number of workers.
    """
    check = partial(_check_video, dataset.source, sampling, 1 if workers else dataset.threads)
    return find_invalid(dataset, check, chunk=_CHUNK, workers=workers, progress=progress)


def set_aside_invalid_videos(
    dataset: CaptionedVideos,
    sampling: FrameSampling,
    on_bad: OnBadInput,
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[CaptionedVideos, list[BadInput]]:
    """Checks every video of a data set, and leaves out the invalid ones with their captions or refuses the data set.

    Args:
        dataset: is not changed.
        sampling: see :func:`find_invalid_videos`.
        on_bad: ``"stop"`` raises an error if a video is invalid; ``"skip"`` leaves out the invalid videos.
        workers: see :func:`find_invalid_videos`.
        progress: see :func:`find_invalid_videos`.

    Returns:
        The data set without its invalid videos, or ``dataset`` itself if there are none; and the invalid videos.

    Raises:
        ConfigError: an invalid ``on_bad`` or ``workers``.
        DataError: videos are invalid and ``on_bad`` is ``"stop"`` (with their number and the first of them), or no
            video is left.
    """
    check_on_bad(on_bad, "on_bad")
    bad = find_invalid_videos(dataset, sampling, workers=workers, progress=progress)
    return leave_out_invalid_videos(dataset, bad, on_bad), bad


def leave_out_invalid_videos(dataset: CaptionedVideos, bad: Sequence[BadInput], on_bad: OnBadInput) -> CaptionedVideos:
    """Leaves out known invalid videos; arguments and errors as for :func:`set_aside_invalid_videos`."""
    return select_videos(dataset, valid_indices(dataset, bad, on_bad, "videos")) if bad else dataset


def _check_video(source: VideoSource, sampling: FrameSampling, threads: int, index: int) -> str | None:
    try:
        source.read(index, sampling, threads)
    except DataError as error:
        return unreadable_because(error)
    return None
