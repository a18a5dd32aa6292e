"""The names that data sets give to their splits, and which of them mean the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from lamzoo.errors import MissingSplitError, UnsplitError

WHOLE = "all"  #: the one split of data without splits

Data = TypeVar("Data")

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


def check_whole(own: str | None, split: str, where: str, way_out: str | None) -> None:
    """Checks that data without splits are asked for as a whole.

    Args:
        own: the split's own name; None for data without splits.
        split: as asked for.
        where: the data set, for the error.
        way_out: how to give data of this layout splits, for the error; None where the layout never has any.

    Raises:
        UnsplitError: the data have no splits, and something else than ``"all"`` is asked for.
    """
    if own is None and split.lower() != WHOLE:
        way_out = "" if way_out is None else f", or {way_out}"
        raise UnsplitError(
            f"{where} has no split {split!r}, since it has no splits; name the split '{WHOLE}' to take all of it"
            f"{way_out}"
        )


def open_default(opener: Callable[[str], Data], split: str) -> Data:
    """Opens the split that is taken where nobody named one: of data without splits, all of it.

    Args:
        opener: opens a split by its name.
        split: of data with splits.

    Raises:
        DataError: as of ``opener``.
    """
    try:
        return opener(split)
    except UnsplitError:
        return opener(WHOLE)
