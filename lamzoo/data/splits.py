"""The names that data sets give to their splits, and which of them mean the same."""

from __future__ import annotations

from collections.abc import Iterable

from lamzoo.errors import MissingSplitError

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
        available: the splits that there are.
        where: the data set, for the error.

    Returns:
        One of ``available``.

    Raises:
        MissingSplitError: none of them is meant by ``split``; lists those that there are.
    """
    names = list(available)
    for name in synonyms(split):
        if name in names:
            return name
    raise MissingSplitError(f"{where} has no split {split!r}; it has {', '.join(map(repr, names)) or 'none'}")
