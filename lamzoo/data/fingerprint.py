"""Fingerprints of data: digests of names, labels and file sizes that tell whether a run still has its data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lamzoo.data.json_files import read_json
from lamzoo.data.paths import nfc
from lamzoo.errors import DataError
from lamzoo.files import atomic_files
from lamzoo.reading import to_json
from lamzoo.records import build

FINGERPRINT_NAME = "data.json"  # in the folder of a run

_THREADS = 16  # file sizes on network drives are a matter of latency
_SHOWN = 3  # differences in a message


@dataclass(frozen=True)
class Group:
    """Digests of a group of items, such as the images of a class.

    Attributes:
        count: number of items.
        names: digest of their names, and of everything known about them except for ``sizes``, in order.
        sizes: digest of the sizes of their files, in order; empty if unknown.
    """

    count: int
    names: str
    sizes: str = ""


@dataclass(frozen=True)
class Fingerprint:
    """Fingerprint of a split; it depends neither on the folder of the data nor on times of files.

    Attributes:
        groups: images by class; for other data the items themselves, by their plural, and the group ``"features"``.
        order: digest of the order of images of different classes; empty for other data.
        classes: class names in label order; None if there are none.
    """

    groups: dict[str, Group]
    order: str = ""
    classes: list[str] | None = None

    def differences(self, before: Fingerprint, split: str) -> list[str]:
        """Returns the differences from an earlier fingerprint as clauses, such as ``"class 'cat' is now 'dog'"``.

        Args:
            before: the earlier fingerprint.
            split: name of the split in the clauses.
        """
        if self == before:
            return []
        by_class = bool(self.order or before.order)
        moved = _renamed(before, self) if by_class else {}
        found = [f"class {old!r} is now {new!r}" for old, new in moved.items()]
        for name in {**before.groups, **self.groups}:
            if found and not by_class:
                break  # other captions or features follow from other videos or queries
            if name not in moved and name not in moved.values():
                found += _changes(name, before.groups.get(name), self.groups.get(name), by_class, split)
        if not found and self.classes != before.classes:
            found.append(_class_change(before.classes, self.classes))
        return found or [f"the images in {split} are in another order"]


def group(names: Sequence[str], sizes: Sequence[int] = ()) -> Group:
    """Returns the digests of a group of items.

    Args:
        names: the items' names, with their labels, texts and times.
        sizes: sizes of their files, bytes; their number may differ. Empty if unknown.
    """
    return Group(len(names), _digest(map(nfc, names)), _digest(map(str, sizes)) if len(sizes) else "")


def image_fingerprint(
    names: Sequence[str], labels: Sequence[Any], sizes: Sequence[int], classes: Sequence[str] | None
) -> Fingerprint:
    """Returns the fingerprint of labelled images.

    Args:
        names: names of the images; folders in them are ignored, so that data may be moved.
        labels: their labels, which may be outside the classes.
        sizes: sizes of their files, bytes; empty if unknown.
        classes: class names in label order, if any.
    """
    members: dict[str, list[int]] = {}
    given = [*map(str, labels)]
    for index, label in enumerate(given):
        members.setdefault(label, []).append(index)
    plain = [name.replace("\\", "/").rpartition("/")[2] for name in names]
    known = {} if classes is None else {str(label): name for label, name in enumerate(classes)}
    groups = {}
    for label, indices in members.items():
        name = known.get(label, label if classes is None else f"label {label}")
        groups[name] = group([plain[index] for index in indices], [sizes[index] for index in indices if len(sizes)])
    return Fingerprint(groups, _digest(given), None if classes is None else list(classes))


def file_sizes(paths: Sequence[Path]) -> list[int]:
    """Returns the sizes of files in bytes, and -1 for those that don't exist."""
    if len(paths) < _THREADS:
        return _sizes(paths)
    with ThreadPoolExecutor(_THREADS) as pool:
        step = -(-len(paths) // _THREADS)
        shares = pool.map(_sizes, (paths[start : start + step] for start in range(0, len(paths), step)))
        return [size for share in shares for size in share]


def read_fingerprints(folder: Path) -> dict[str, Fingerprint] | None:
    """Reads the fingerprints of a run's data by role; None for a run of lamzoo 0.1.0, which has none.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / FINGERPRINT_NAME
    if not path.exists():
        return None
    try:
        table = read_json(path, file_names=True)
        if not isinstance(table, dict):
            raise DataError("it must hold a table")
        return {role: build(Fingerprint, entry, role, source="its") for role, entry in table.items()}
    except DataError as error:
        raise DataError(
            f"{path} is not a record of a run's data ({error}); restore it, or remove it if the data is unchanged"
        ) from None


def write_fingerprints(folder: Path, fingerprints: Mapping[str, Fingerprint]) -> None:
    """Writes the fingerprints of a run's data by role.

    Raises:
        DataError: the file can't be written.
    """
    text = to_json({role: asdict(split) for role, split in fingerprints.items()}, indent=1)
    with atomic_files(DataError) as stage:
        stage(folder / FINGERPRINT_NAME).write_text(text + "\n", encoding="utf-8")


def describe_changes(before: Mapping[str, Fingerprint], now: Mapping[str, Fingerprint]) -> str:
    """Returns what has changed in a run's data, by role; empty if nothing has."""
    changes = [now[role].differences(before[role], role) for role in now if role in before]
    found = list(
        dict.fromkeys(clause for clauses in changes for clause in clauses)
    )  # a class is renamed in every split
    more = [f"{len(found) - _SHOWN} more changes"] if len(found) > _SHOWN else []
    return ", ".join(found[:_SHOWN] + more)


def _sizes(paths: Iterable[Path]) -> list[int]:
    sizes = []
    for path in paths:
        try:
            sizes.append(path.stat().st_size)
        except OSError:
            sizes.append(-1)
    return sizes


def _digest(words: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for word in words:
        digest.update(f"{word}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def _renamed(before: Fingerprint, now: Fingerprint) -> dict[str, str]:
    """Returns the former and the present name of classes that have the same images."""
    gone = {group: name for name, group in before.groups.items() if name not in now.groups}
    new = {group: name for name, group in now.groups.items() if name not in before.groups}
    return {name: new[group] for group, name in gone.items() if group in new}


def _changes(name: str, old: Group | None, new: Group | None, by_class: bool, split: str) -> list[str]:
    if old is None or new is None:
        what = f"class {name!r}" if by_class else name
        return [f"{what} {'was' if by_class else 'were'} {'added' if old is None else 'removed'}"]
    items, of_class = ("images", f" of class {name!r}") if by_class else (name, "")
    more = new.count - old.count
    if more:
        item = {"queries": "query"}.get(items, items.removesuffix("s"))
        counted = f"1 {item}{of_class} was" if abs(more) == 1 else f"{abs(more)} {items}{of_class} were"
        return [f"{counted} {'added to' if more > 0 else 'removed from'} {split}"]
    if new.names != old.names:
        return [f"{items}{of_class} in {split} are others"]
    return [f"{items}{of_class} in {split} have files of other sizes"] if new.sizes != old.sizes else []


def _class_change(before: Sequence[str] | None, now: Sequence[str] | None) -> str:
    gone, new = (
        [name for name in one or () if name not in (other or ())] for one, other in ((before, now), (now, before))
    )
    for names, what in ((new, "added"), (gone, "removed")):
        if names and before is not None and now is not None:
            return f"class {names[0]!r} was {what}"
    return "the classes have other labels"
