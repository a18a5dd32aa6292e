"""Finding the videos of a data set that cannot be used, before a long run stumbles over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from lamzoo.data.images.decode import unreadable_because
from lamzoo.data.retrieval.base import CaptionedVideos, VideoSource
from lamzoo.data.retrieval.selection import select_videos
from lamzoo.data.validation import BadInput, OnBadInput, check_on_bad, find_bad, usable
from lamzoo.data.video.sampling import FrameSampling
from lamzoo.errors import DataError

_CHUNK = 4  # videos from one report of a worker to the next


def find_bad_videos(
    dataset: CaptionedVideos,
    sampling: FrameSampling,
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[BadInput]:
    """Reads every video of a data set as a run would, and lists those that cannot be read.

    Args:
        dataset: what to search.
        sampling: the run's. Whether a video that ends too early can be used may depend on where frames are taken.
        workers: processes that read videos; 0 reads in this one.
        progress: called with the videos read and their total, from time to time.

    Returns:
        The bad ones, in the data set's order.

    Raises:
        ConfigError: a negative number of workers.
    """
    ask = partial(_why_bad, dataset.source, sampling, 1 if workers else dataset.threads)
    return find_bad(dataset, ask, chunk=_CHUNK, workers=workers, progress=progress)


def set_aside_bad_videos(
    dataset: CaptionedVideos,
    sampling: FrameSampling,
    on_bad: OnBadInput,
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[CaptionedVideos, list[BadInput]]:
    """Searches a data set for bad videos, and either leaves them and their captions out or refuses the data set.

    Args:
        dataset: left as it is.
        sampling: as of :func:`find_bad_videos`.
        on_bad: ``"stop"`` raises if there is any; ``"skip"`` goes on without them.
        workers: as of :func:`find_bad_videos`.
        progress: as of :func:`find_bad_videos`.

    Returns:
        The data set without its bad videos, itself where there are none, and the bad ones.

    Raises:
        ConfigError: ``on_bad`` or ``workers`` is not possible.
        DataError: there are bad videos and ``on_bad`` is ``"stop"`` (names the first, and says how many); or no video
            is left.
    """
    check_on_bad(on_bad)
    bad = find_bad_videos(dataset, sampling, workers=workers, progress=progress)
    return leave_out_bad_videos(dataset, bad, on_bad), bad


def leave_out_bad_videos(dataset: CaptionedVideos, bad: Sequence[BadInput], on_bad: OnBadInput) -> CaptionedVideos:
    """Does what :func:`set_aside_bad_videos` does once the bad ones are known; arguments and errors as there."""
    return select_videos(dataset, usable(dataset, bad, on_bad, "videos")) if bad else dataset


def _why_bad(source: VideoSource, sampling: FrameSampling, threads: int, index: int) -> str | None:
    try:
        source.read(index, sampling, threads)
    except DataError as error:
        return unreadable_because(error)
    return None
