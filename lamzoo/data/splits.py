"""Names and synonyms of splits, data without splits, and held-out validation videos."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol, TypeVar, cast

from lamzoo.errors import DataError, MissingSplitError, UnsplitError

WHOLE = "all"  #: the one split of data without splits

_NAMED = 5  # ids in an error

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
    """Returns the synonyms of a split name, the name itself first; validation and test are not synonyms."""
    for names in _SYNONYMS:
        if split.lower() in names:
            return (split, *(name for name in names if name != split))
    return (split,)


def find_split(split: str, available: Iterable[str], where: str) -> str:
    """Finds a split by its name or a synonym.

    Args:
        split: the requested split.
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


def index_of_id(ids: Sequence[str], wanted: str | None, where: str, what: str) -> int:
    """Returns the index of an id among those of a split; 0 for None.

    Args:
        ids: at least one.
        wanted: the id.
        where: the split, for the error.
        what: a noun for the error: ``"query"``.

    Raises:
        DataError: there is no such id; lists the first ones.
    """
    if wanted is not None and wanted not in ids:
        more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
        raise DataError(f"{where} has no {what} {wanted!r}; it has {', '.join(map(repr, ids[:_NAMED]))}{more}")
    return 0 if wanted is None else ids.index(wanted)


def split_spec(spec: str, split: str, grammar: str, kinds: Collection[str] | None = None) -> tuple[str, str]:
    """Splits the specification of a data set, ``KIND:REST``, into both; the rest may be empty.

    Args:
        spec: the specification.
        split: the requested split.
        grammar: all specifications, for the error.
        kinds: kinds that need a rest; by default everything before a colon does.

    Raises:
        DataError: the split is empty, or the rest that is needed.
    """
    if not split:
        raise DataError(f"the split of {spec} is empty; pass one, such as 'test'")
    kind, colon, rest = spec.partition(":")
    if not rest and (colon if kinds is None else kind in kinds):
        raise DataError(f"the data set {spec!r} has nothing after {kind}:; it must be {grammar}")
    return kind, rest


def check_whole(dataset: _Dataset, split: str, way_out: str | None) -> None:
    """Checks that the requested split of data without splits is ``"all"``.

    Args:
        dataset: the opened data set, whose ``split`` is None for data without splits.
        split: the requested split.
        way_out: how to add splits to data of this layout, for the error; None for layouts without splits.

    Raises:
        UnsplitError: the data has no splits, and the requested one is not ``"all"``.
    """
    if dataset.split is None and split.lower() != WHOLE:
        way_out = "" if way_out is None else f", or {way_out}"
        raise UnsplitError(
            f"{dataset.spec} has no split {split!r}, since it has no splits; use the split '{WHOLE}' to take all of "
            f"it{way_out}",
            dataset,
        )


def open_default(opener: Callable[[str], Data], split: str) -> Data:
    """Opens the default split; for data without splits, all of it.

    Args:
        opener: opens a split by its name.
        split: default split of data with splits.

    Raises:
        DataError: as for ``opener``.
    """
    try:
        return opener(split)
    except UnsplitError as error:  # carries the opened data
        return cast(Data, error.whole) if error.whole is not None else opener(WHOLE)


def hold_out(names: Iterable[str], fraction: float, seed: int, spec: str) -> frozenset[str]:
    """Selects videos to hold out for validation, for data without a validation split.

    Args:
        names: names of the videos.
        fraction: fraction to hold out, rounded to at least one video and less than all.
        seed: seed of the selection.
        spec: the data set, for the error.

    Raises:
        DataError: there are fewer than two videos.
    """
    known = sorted(set(names))
    if len(known) < 2:
        raise DataError(f"{spec} has {len(known)} video, so none can be held out for validation; add more")
    count = min(max(1, round(fraction * len(known))), len(known) - 1)
    return frozenset(random.Random(seed).sample(known, count))


def check_videos(names: Iterable[str], known: Iterable[str], spec: str) -> None:
    """Raises a :class:`DataError` if one of the names is not known."""
    missing = sorted(set(names) - set(known))
    if missing:
        raise DataError(
            f"{spec} no longer has the video {missing[0]!r}, which a run held out for validation; restore it"
        )
