"""Finding what of a data set cannot be used, before a long run stumbles over it; knows neither images nor videos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch.utils.data import DataLoader, Dataset

from lamzoo.errors import ConfigError, DataError

OnBadInput = Literal["stop", "skip"]

_NAMED = 3  # files that one error names; a list is what find_bad_images and find_bad_videos are for


@dataclass(frozen=True)
class BadInput:
    """An image or a video that cannot be used.

    Attributes:
        index: in the data set that was searched.
        filename: its path, or its place in the file that holds it.
        reason: what is wrong, in a few words.
    """

    index: int
    filename: str
    reason: str


def find_bad(
    dataset: Any,
    why_bad: Callable[[int], str | None],
    *,
    chunk: int,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> list[BadInput]:
    """Asks of every input of a data set what is wrong with it, and lists those with which something is.

    Args:
        dataset: has a length and ``filename(index)``.
        why_bad: what is wrong with an input, or ``None``; it can be pickled where there are workers.
        chunk: inputs from one report of a worker to the next.
        workers: processes that ask; 0 asks in this one.
        progress: called with the inputs asked of and their total, from time to time.

    Returns:
        The bad ones, in the data set's order.

    Raises:
        ConfigError: a negative number of workers.
    """
    if workers < 0:
        raise ConfigError(f"the number of workers is {workers}; it must be 0 or more")
    # The loader draws a seed for its workers, which are deterministic here: the caller's random state is left alone.
    loader = DataLoader(
        _Reasons(why_bad, len(dataset)),
        chunk,
        collate_fn=list,
        num_workers=workers,
        generator=torch.Generator().manual_seed(0),
    )
    bad: list[BadInput] = []
    done = 0
    for reasons in loader:
        for index, reason in enumerate(reasons, done):
            if reason is not None:
                bad.append(BadInput(index, dataset.filename(index), reason))
        done += len(reasons)
        if progress is not None:
            progress(done, len(dataset))
    return bad


def check_on_bad(on_bad: str) -> None:
    """Raises a :class:`ConfigError` for what is no :data:`OnBadInput`."""
    if on_bad not in get_args(OnBadInput):
        raise ConfigError(f"on_bad is {on_bad!r}; it must be 'stop' or 'skip'")


def usable(dataset: Any, bad: Sequence[BadInput], on_bad: OnBadInput, what: str) -> list[int]:
    """Returns the indices of what can be used, or refuses the data set.

    Args:
        dataset: has a length, ``spec`` and ``split``.
        bad: at least one.
        on_bad: ``"stop"`` refuses; ``"skip"`` goes on without the bad ones.
        what: ``"images"`` or ``"videos"``, for the message.

    Raises:
        DataError: ``on_bad`` is ``"stop"`` (names the first, and says how many), or nothing is left.
    """
    where = place(dataset)
    files = "; ".join(f"{one.filename} ({one.reason})" for one in bad[:_NAMED])
    if len(bad) > _NAMED:
        files = f"{files}; and {len(bad) - _NAMED} more"
    if on_bad == "stop":
        raise DataError(
            f"{len(bad)} of the {len(dataset)} {what} of {where} cannot be used: {files}; replace or remove them, "
            "or go on without them with --on-bad-input skip"
        )
    wrong = {one.index for one in bad}
    left = [index for index in range(len(dataset)) if index not in wrong]
    if not left:
        raise DataError(f"none of the {len(dataset)} {what} of {where} can be used: {files}; replace them")
    return left


def place(dataset: Any) -> str:
    """Returns what to call a split in a message."""
    return dataset.spec if dataset.split is None else f"{dataset.spec} ({dataset.split})"


class _Reasons(Dataset):
    """What is wrong with each input, item by item."""

    def __init__(self, why_bad: Callable[[int], str | None], length: int) -> None:
        self._why_bad, self._length = why_bad, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> str | None:
        return self._why_bad(index)
