"""Finding the invalid inputs of a data set before a long run: shared code for images and videos."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch.utils.data import DataLoader, Dataset

from lamzoo.errors import ConfigError, DataError

OnBadInput = Literal["stop", "skip"]

_NAMED = 3  # maximum number of files in an error; find_invalid_images and find_invalid_videos list all


@dataclass(frozen=True)
class BadInput:
    """An image or a video that cannot be used.

    Attributes:
        index: in the data set that was checked.
        filename: its path, or its place in an archive.
        reason: the reason, in a few words.
    """

    index: int
    filename: str
    reason: str


def find_invalid(
    dataset: Any,
    check: Callable[[int], str | None],
    *,
    chunk: int,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> list[BadInput]:
    """Returns the invalid inputs of a data set.

    Args:
        dataset: has a length and ``filename(index)``.
        check: returns why an input is invalid, or ``None``; must be picklable if there are workers.
        chunk: number of inputs that a worker reports at once.
        workers: worker processes; 0 runs in the main process.
        progress: called with the number of inputs checked and their total.

    Returns:
        The invalid inputs, in the data set's order.

    Raises:
        ConfigError: a negative number of workers.
    """
    if workers < 0:
        raise ConfigError(f"the number of workers is {workers}; it must be 0 or more")
    # The loader draws a seed for its workers, which are deterministic here: the caller's random state is preserved.
    loader = DataLoader(
        _Reasons(check, len(dataset)),
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


def check_on_bad(on_bad: str, name: str = "on_bad_input") -> None:
    """Raises a :class:`ConfigError` that names the argument unless it is an :data:`OnBadInput`."""
    if on_bad not in get_args(OnBadInput):
        raise ConfigError(f"{name} is {on_bad!r}; it must be 'stop' or 'skip'")


def valid_indices(dataset: Any, bad: Sequence[BadInput], on_bad: OnBadInput, what: str) -> list[int]:
    """Returns the indices of the valid inputs, or refuses the data set.

    Args:
        dataset: has a length, ``spec`` and ``split``.
        bad: the invalid inputs, at least one.
        on_bad: ``"stop"`` refuses the data set; ``"skip"`` leaves out the invalid inputs.
        what: ``"images"`` or ``"videos"``, for the message.

    Raises:
        DataError: ``on_bad`` is ``"stop"`` (with the first one and their number), or none is valid.
    """
    where = place(dataset)
    if on_bad == "stop":
        raise DataError(
            f"{len(bad)} of the {len(dataset)} {what} of {where} cannot be used: {first_named(bad)}; replace or "
            "remove them, or leave them out with --on-bad-input skip"
        )
    wrong = {one.index for one in bad}
    left = [index for index in range(len(dataset)) if index not in wrong]
    if not left:
        raise DataError(f"none of the {len(dataset)} {what} of {where} can be used: {first_named(bad)}; replace them")
    return left


def first_named(bad: Sequence[BadInput]) -> str:
    """Returns the first invalid inputs with their reasons and the number of the others, for messages."""
    files = "; ".join(f"{one.filename} ({one.reason})" for one in bad[:_NAMED])
    return f"{files}; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else files


def place(dataset: Any) -> str:
    """Returns the name of a split for messages."""
    return dataset.spec if dataset.split is None else f"{dataset.spec} ({dataset.split})"


@contextlib.contextmanager
def plain_worker_errors() -> Iterator[None]:
    """Restores the one-line message of a :class:`DataError` raised in a data-loader worker.

    torch adds the traceback of the worker to the message; that traceback is kept in ``__cause__``.
    """
    try:
        yield
    except DataError as error:
        text, mark = str(error), f"{DataError.__module__}.{DataError.__qualname__}: "
        if not text.startswith("Caught ") or mark not in text:  # the first word of torch's message
            raise
        raise DataError(text.rpartition(mark)[2].strip()) from error


class _Reasons(Dataset):
    """Why each input is invalid, as items of a dataset."""

    def __init__(self, check: Callable[[int], str | None], length: int) -> None:
        self._check, self._length = check, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> str | None:
        return self._check(index)
