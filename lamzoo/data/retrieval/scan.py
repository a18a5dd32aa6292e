"""Finding the videos of a data set that cannot be used, before a long run stumbles over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch.utils.data import DataLoader, Dataset

from lamzoo.data.images import unreadable_because
from lamzoo.data.retrieval.base import CaptionedVideos
from lamzoo.data.retrieval.selection import select_videos
from lamzoo.data.sampling import FrameSampling
from lamzoo.data.scan import OnBadInput
from lamzoo.errors import ConfigError, DataError

_NAMED = 3  # files that one error names; a list is what find_bad_videos is for
_CHUNK = 4  # videos from one report of a worker to the next


@dataclass(frozen=True)
class BadVideo:
    """A video that cannot be used.

    Attributes:
        index: in the data set that was searched.
        filename: its path, or its place in the file that holds it.
        reason: what is wrong, in a few words.
    """

    index: int
    filename: str
    reason: str


def find_bad_videos(
    dataset: CaptionedVideos,
    sampling: FrameSampling,
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[BadVideo]:
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
    if workers < 0:
        raise ConfigError(f"the number of workers is {workers}; it must be 0 or more")
    # The loader draws a seed for its workers, which are deterministic here: the caller's random state is left alone.
    loader = DataLoader(
        _Reasons(dataset, sampling),
        _CHUNK,
        collate_fn=list,
        num_workers=workers,
        generator=torch.Generator().manual_seed(0),
    )
    bad: list[BadVideo] = []
    done = 0
    for reasons in loader:
        for index, reason in enumerate(reasons, done):
            if reason is not None:
                bad.append(BadVideo(index, dataset.filename(index), reason))
        done += len(reasons)
        if progress is not None:
            progress(done, len(dataset))
    return bad


def set_aside_bad_videos(
    dataset: CaptionedVideos,
    sampling: FrameSampling,
    on_bad: OnBadInput,
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[CaptionedVideos, list[BadVideo]]:
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
    if on_bad not in get_args(OnBadInput):
        raise ConfigError(f"on_bad is {on_bad!r}; it must be 'stop' or 'skip'")
    bad = find_bad_videos(dataset, sampling, workers=workers, progress=progress)
    return leave_out_bad_videos(dataset, bad, on_bad), bad


def leave_out_bad_videos(dataset: CaptionedVideos, bad: Sequence[BadVideo], on_bad: OnBadInput) -> CaptionedVideos:
    """Does what :func:`set_aside_bad_videos` does once the bad ones are known; arguments and errors as there."""
    if not bad:
        return dataset
    where = dataset.spec if dataset.split is None else f"{dataset.spec} ({dataset.split})"
    files = "; ".join(f"{video.filename} ({video.reason})" for video in bad[:_NAMED])
    if len(bad) > _NAMED:
        files = f"{files}; and {len(bad) - _NAMED} more"
    if on_bad == "stop":
        raise DataError(
            f"{len(bad)} of the {len(dataset)} videos of {where} cannot be used: {files}; replace or remove them, "
            "or go on without them with --on-bad-input skip"
        )
    wrong = {video.index for video in bad}
    left = [index for index in range(len(dataset)) if index not in wrong]
    if not left:
        raise DataError(f"none of the {len(dataset)} videos of {where} can be used: {files}; replace them")
    return select_videos(dataset, left)


class _Reasons(Dataset):
    """What is wrong with each video, item by item."""

    def __init__(self, dataset: CaptionedVideos, sampling: FrameSampling) -> None:
        self._dataset, self._sampling = dataset, sampling

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> str | None:
        try:
            self._dataset.read(index, self._sampling)
        except DataError as error:
            return unreadable_because(error)
        return None
