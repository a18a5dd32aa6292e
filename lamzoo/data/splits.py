"""Names of splits, which of them mean the same, and what is done about data without splits."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar, cast

from lamzoo.errors import DataError, MissingSplitError, UnsplitError

WHOLE = "all"  #: the one split of data without splits

Data = TypeVar("Data")


class _Dataset(Protocol):
    spec: str
    split: str | None


_SYNONYMS = (
    ("train", "training"),
    ("validation", "val", "valid", "dev", "eval", "evaluation"),
    ("test", "testing"),
)
SPLIT_NAMES = frozenset(name for names in _SYNONYMS for name in names)


def synonyms(split: str) -> tuple[str, ...]:
    """Returns the names a split may go by, the given one first; validation and test are different things."""
    for names in _SYNONYMS:
        if split.lower() in names:
            return (split, *(name for name in names if name != split))
    return (split,)


def find_split(split: str, available: Iterable[str], where: str) -> str:
    """Finds a split under the name it has here.

    Args:
        split: as asked for.
        available: the available splits.
        where: the data set, for the error.

    Returns:
        One of ``available``.

    Raises:
        MissingSplitError: none of them matches ``split``; lists those available.
    """
    names = list(available)
    for name in synonyms(split):
        if name in names:
            return name
    raise MissingSplitError(f"{where} has no split {split!r}; it has {', '.join(map(repr, names)) or 'none'}")


def check_whole(dataset: _Dataset, split: str, way_out: str | None) -> None:
    """Checks that data without splits is asked for as a whole.

    Args:
        dataset: as opened; its own ``split`` is None for data without splits.
        split: as asked for.
        way_out: how to give data of this layout splits, for the error; None where the layout never has any.

    Raises:
        UnsplitError: the data has no splits, and another one than ``"all"`` is asked for.
    """
    if dataset.split is None and split.lower() != WHOLE:
        way_out = "" if way_out is None else f", or {way_out}"
        raise UnsplitError(
            f"{dataset.spec} has no split {split!r}, since it has no splits; name the split '{WHOLE}' to take all of "
            f"it{way_out}",
            dataset,
        )


def open_default(opener: Callable[[str], Data], split: str) -> Data:
    """Opens the split that is taken where none is named: of data without splits, all of it.

    Args:
        opener: opens a split by its name.
        split: of data with splits.

    Raises:
        DataError: as of ``opener``.
    """
    try:
        return opener(split)
    except UnsplitError as error:  # which has opened the data already
        return cast(Data, error.whole) if error.whole is not None else opener(WHOLE)


def hold_out(names: Iterable[str], fraction: float, seed: int, spec: str) -> frozenset[str]:
    """Chooses the videos that are held out for validation, where the data has no such split.

    Args:
        names: of the videos.
        fraction: of them that is held out; at least one is, and at least one stays.
        seed: of the choice.
        spec: the data set, for the error.

    Raises:
        DataError: there are fewer than two videos.
    """
    known = sorted(set(names))
    if len(known) < 2:
        raise DataError(f"{spec} has {len(known)} video, and none can be held out for validation; add more")
    count = min(max(1, round(fraction * len(known))), len(known) - 1)
    return frozenset(random.Random(seed).sample(known, count))


def check_videos(names: Iterable[str], known: Iterable[str], spec: str) -> None:
    """Raises a :class:`DataError` where a video that is named is not there."""
    missing = sorted(set(names) - set(known))
    if missing:
        raise DataError(
            f"{spec} has no video {missing[0]!r} any more, which a run has held out for validation; bring it back"
        )
