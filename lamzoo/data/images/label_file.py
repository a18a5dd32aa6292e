"""A flat folder of images whose labels are in a separate file, as ImageNet's validation split is distributed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from lamzoo.data.csv_tables import open_table
from lamzoo.data.images.decode import images_below
from lamzoo.data.images.image_dataset import ImageSource
from lamzoo.data.json_files import read_lines
from lamzoo.data.paths import natural_key, nfc
from lamzoo.errors import DataError, MissingExtraError

# How a column is called; of several the first counts.
_HEADINGS = ("filename", "file", "image", "path", "image_id", "imageid", "name", "id")
_LABELS = ("label", "class", "category", "target", "class_name", "class_id")
_OFFICIAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")


class ListedSource(ImageSource):
    """Images below ``root``, with labels from one file.

    The file may be

    - a list ``NAME LABEL``, one image a line, separated by a comma, tab or blank, with or without the extension, such
      as ImageNet's ``LOC_val_solution.csv`` (whose boxes are not read) or Caffe's ``val.txt``; with headings, such as
      ``filename,label``, it is CSV, and of more columns those that are called so are read;
    - one class name a line for the images in natural order, such as TensorFlow's
      ``imagenet_2012_validation_synset_labels.txt``;
    - ``ILSVRC2012_validation_ground_truth.txt`` of ImageNet's development kit, beside its ``meta.mat``. Its numbers
      alone would not do: they are not in the order in which every library numbers the classes.

    Classes named in the file are numbered in natural order, as those of an image folder are; numbers are taken as they
    are, and then the data set has no class names. Names are compared in NFC. Images of the list that are not in the
    folder are left out, so that a part of a split will do, but the other way round is an error.

    Args:
        root: the folder.
        path: the file.

    Raises:
        DataError: no such folder or file, an image without a label or with two, or a file of another kind.
        MissingExtraError: SciPy is missing, which reads ``meta.mat``.
    """

    def __init__(self, root: Path, path: Path) -> None:
        if not root.is_dir():
            raise DataError(f"no such folder: {root}")
        self._paths = images_below(root)
        if not self._paths:
            raise DataError(f"the folder {root} holds no image")
        rows = _read_rows(path)
        names = _names_of(self._paths, rows, root, path)
        if all(name.isdecimal() for name in names):
            self._labels = [int(name) for name in names]
            return
        every = {nfc(row[-1]) for row in rows}
        self.classes = sorted(every, key=lambda name: (natural_key(name), name))
        numbers = {name: number for number, name in enumerate(self.classes)}
        self._labels = [numbers[nfc(name)] for name in names]

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> tuple[BinaryIO, int]:
        try:
            return self._paths[index].open("rb"), self._labels[index]
        except OSError as error:
            raise DataError(f"cannot open {self._paths[index]}: {error.strerror}") from error

    def name(self, index: int) -> str:
        return str(self._paths[index])

    def labels(self) -> list[int]:
        return self._labels


def _read_rows(path: Path) -> list[tuple[str, ...]]:
    """Returns ``(image, label)`` of each line, or ``(label,)`` where it names no image."""
    lines = [line.strip() for line in read_lines(path) if line.strip()]
    if not lines:
        raise DataError(f"the file of labels {path} is empty")
    if lines[0].startswith("ImageId,"):  # LOC_val_solution.csv: the label, then boxes and labels in turn
        lines = [",".join(line.replace(",", " ").split()[:2]) for line in lines]
    elif "," in lines[0] and lines[0].split(",")[0].strip(' "').lower() in _HEADINGS:
        return _read_table(path)
    rows = [_fields(line) for line in lines]
    if len({len(row) for row in rows}) > 1:
        odd = next(number for number, row in enumerate(rows, 1) if len(row) != len(rows[0]))
        raise DataError(f"line {odd} of {path} is not like the first; write an image and its label on each")
    if len(rows[0]) == 1 and all(row[0].isdecimal() for row in rows):
        return _from_devkit(rows, path)
    return rows[1:] if rows[0][0].lower() in _HEADINGS and len(rows[0]) == 2 else rows


def _read_table(path: Path) -> list[tuple[str, ...]]:
    """Reads two columns of a CSV file with headings, in which a name with a comma is quoted."""
    table = open_table(path)
    names = [heading.lower() for heading in table.headings]
    if sum(map(bool, names)) == 2:
        columns = [place for place, name in enumerate(names) if name]
    else:
        found = (next((name for name in known if name in names), None) for known in (_HEADINGS, _LABELS))
        columns = [names.index(name) for name in found if name is not None]
    if len(columns) < 2:
        raise DataError(
            f"{path} has the columns {', '.join(filter(None, table.headings))}; call that of the labels "
            f"{' or '.join(map(repr, _LABELS[:2]))}"
        )
    rows = [(number, tuple(cells[place] for place in columns)) for number, cells in table.rows]
    empty = next((number for number, row in rows if not all(row)), None)
    if empty is not None:
        raise DataError(f"line {empty} of {path} has no image or no label; write both, or remove it")
    return [row for _, row in rows]


def _fields(line: str) -> tuple[str, ...]:
    """Splits a line at its last comma, tab or blank, whichever there is first in this order."""
    for separator in (",", "\t", " "):
        name, found, label = line.rpartition(separator)
        if found and name.strip() and label.strip():
            return name.strip(), label.strip()
    return (line,)


def _from_devkit(rows: Sequence[tuple[str, ...]], path: Path) -> list[tuple[str, ...]]:
    """Replaces the numbers of ImageNet's development kit by WordNet ids."""
    table = path.with_name("meta.mat")
    if not table.is_file():
        raise DataError(
            f"{path} holds bare numbers, and nothing says of which classes; if it is of ImageNet's development kit, "
            f"leave it beside meta.mat, else write an image and its label on each line"
        )
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise MissingExtraError(f"{table} needs SciPy to be read; pip install 'lamzoo[data]'") from error
    try:
        synsets = loadmat(str(table), squeeze_me=True)["synsets"]
        names = {int(entry["ILSVRC2012_ID"]): str(entry["WNID"]) for entry in synsets}
        return [(names[int(row[0])],) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{table} does not say what the numbers in {path} mean: {error!r}") from error


def _names_of(paths: Sequence[Path], rows: Sequence[tuple[str, ...]], root: Path, where: Path) -> list[str]:
    """Returns what the file says of each image."""
    if len(rows[0]) == 1:
        return _names_in_order(paths, [row[0] for row in rows], where)
    given: dict[str, str] = {}
    short: dict[str, str | None] = {}  # by the last part of the name; None for several images with different labels
    for name, label in ((Path(nfc(name)), label) for name, label in rows):
        if given.setdefault(name.as_posix(), label) != label:
            raise DataError(
                f"{where} gives {name.as_posix()} two labels, {given[name.as_posix()]!r} and {label!r}; remove one"
            )
        short[name.name] = label if short.get(name.name, label) == label else None
    names = []
    for path in paths:
        inside = Path(nfc(path.relative_to(root).as_posix()))
        long = given.get(inside.as_posix()) or given.get(inside.with_suffix("").as_posix())
        found = long or short.get(inside.name) or short.get(inside.stem)
        if found is None:
            raise DataError(f"{where} has no label of {path}, or several; write one, or remove the image")
        names.append(found)
    return names


def _names_in_order(paths: Sequence[Path], names: Sequence[str], where: Path) -> list[str]:
    numbers = [_OFFICIAL_NAME.match(path.name) for path in paths]
    if all(numbers) and len(names) >= len(paths):  # a part of ImageNet's: the names say which
        places = [int(number[1]) - 1 for number in numbers if number]
        if max(places) < len(names) and min(places) >= 0:
            return [names[place] for place in places]
    if len(names) != len(paths):
        raise DataError(
            f"{where} has {len(names)} labels without names and the folder {len(paths)} images; "
            "write an image and its label on each line"
        )
    return list(names)
