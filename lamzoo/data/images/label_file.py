"""A flat folder of images whose labels are in a separate file, as ImageNet's validation split is distributed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from lamzoo.data.csv_tables import open_table
from lamzoo.data.fingerprint import file_sizes
from lamzoo.data.images.decode import BROKEN_IMAGE, IMAGE_EXTENSIONS
from lamzoo.data.images.image_dataset import ImageSource
from lamzoo.data.json_files import read_lines
from lamzoo.data.paths import check_folder, file_exists, list_files, natural_key, nfc, open_listed
from lamzoo.errors import DataError, MissingExtraError
from lamzoo.reading import open_regular, parse_int

# Names of the columns; the first one present is used.
_HEADINGS = ("filename", "file", "image", "path", "image_id", "imageid", "name", "id")
_LABELS = ("label", "class", "category", "target", "class_name", "class_id")
_NUMBER = re.compile("[0-9]{1,300}")
_ODD_NUMBER = re.compile(r"[+-]?[\d_]+(?:\.0*)?")  # as Python and spreadsheets may write whole numbers
_OFFICIAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")
_MISSING = "there is no such file"


class ListedSource(ImageSource):
    """Images below ``root``, with labels from one file.

    The file may be

    - a list ``NAME LABEL``, one image per line, separated by a comma, tab or space, with or without the extension, such
      as ImageNet's ``LOC_val_solution.csv`` (whose boxes are ignored) or Caffe's ``val.txt``; with a header such as
      ``filename,label`` it is CSV, and other columns are ignored;
    - one class name per line for the images in natural order, such as TensorFlow's
      ``imagenet_2012_validation_synset_labels.txt``;
    - ``ILSVRC2012_validation_ground_truth.txt`` of ImageNet's development kit, in the same folder as its ``meta.mat``,
      which is needed because the kit orders the classes differently from all libraries.

    Class names in the file are numbered in natural order, as for an image folder; numbers are used unchanged, and the
    data set has no class names. Names are compared in NFC. Listed images that are not in the folder are the last
    images of the data set and ``lost``, so that evaluation and training stop, or leave them out, as they are told; an
    image that is not listed is an error.

    Args:
        root: the folder.
        path: the file.

    Raises:
        DataError: the folder or file does not exist, an image has no label or two, or the file has another format.
        MissingExtraError: SciPy, which reads ``meta.mat``, is not installed.
    """

    def __init__(self, root: Path, path: Path) -> None:
        check_folder(root)
        files, lost = list_files(root, IMAGE_EXTENSIONS)
        if root in lost:
            raise DataError(f"cannot read the folder {root}: {lost[root]}")
        there = [file for file in files if file not in lost or file.suffix.lower() in IMAGE_EXTENSIONS]
        if not there:
            raise DataError(f"the folder {root} has no images")
        rows = _read_rows(path)
        names, missing = _names_of(there, rows, root, path)
        self._paths = [*there, *(root / name for name in missing)]
        names += missing.values()
        self.lost = {
            number: lost.get(file, _MISSING)
            for number, file in enumerate(self._paths)
            if file in lost or number >= len(there)
        }
        if all(map(_NUMBER.fullmatch, names)):
            self._labels = [parse_int(name) for name in names]
            return
        if all(map(_ODD_NUMBER.fullmatch, names)):  # as class names, they would get other numbers
            odd = next(name for name in names if not _NUMBER.fullmatch(name))
            raise DataError(f"{path} has the label {odd!r:.60}; labels must be whole numbers from 0, or class names")
        every = {nfc(row[-1]) for row in rows}
        self.classes = sorted(every, key=lambda name: (natural_key(name), name))
        numbers = {name: number for number, name in enumerate(self.classes)}
        self._labels = [numbers[nfc(name)] for name in names]

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> tuple[BinaryIO, int]:
        try:
            return open_listed(self._paths[index]), self._labels[index]
        except OSError as error:
            raise DataError(f"cannot open {self._paths[index]}: {error.strerror}") from error

    def name(self, index: int) -> str:
        return str(self._paths[index])

    def labels(self) -> list[int]:
        return self._labels

    def sizes(self) -> list[int]:
        return file_sizes(self._paths)


def _read_rows(path: Path) -> list[tuple[str, ...]]:
    """Returns ``(image, label)`` of each line, or ``(label,)`` if the file has no image names."""
    lines = [line.strip() for line in read_lines(path) if line.strip()]
    if not lines:
        raise DataError(f"the label file {path} is empty")
    if lines[0].startswith("ImageId,"):  # LOC_val_solution.csv: the label, then boxes and labels in turn
        lines = [",".join(line.replace(",", " ").split()[:2]) for line in lines]
    elif "," in lines[0] and lines[0].split(",")[0].strip(' "').lower() in _HEADINGS:
        return _read_table(path)
    rows = [_fields(line) for line in lines]
    if len({len(row) for row in rows}) > 1:
        odd = next(number for number, row in enumerate(rows, 1) if len(row) != len(rows[0]))
        raise DataError(f"line {odd} of {path} has another form than the first; each must be an image and its label")
    if len(rows[0]) == 1 and all(_NUMBER.fullmatch(row[0]) for row in rows):
        return _from_devkit(rows, path)
    if len(rows) == 1 and rows[0][0].lower() in _HEADINGS:
        raise DataError(f"the label file {path} has no lines after its headings")
    return rows[1:] if rows[0][0].lower() in _HEADINGS and len(rows[0]) == 2 else rows


def _read_table(path: Path) -> list[tuple[str, ...]]:
    """Reads two columns of a CSV file with a header, in which names with commas are quoted."""
    table = open_table(path)
    names = [heading.lower() for heading in table.headings]
    if sum(map(bool, names)) == 2:
        columns = [place for place, name in enumerate(names) if name]
    else:
        found = (next((name for name in known if name in names), None) for known in (_HEADINGS, _LABELS))
        columns = [names.index(name) for name in found if name is not None]
    if len(columns) < 2:
        raise DataError(
            f"{path} has the columns {', '.join(filter(None, table.headings))}; rename that of the labels to "
            f"{' or '.join(map(repr, _LABELS[:2]))}"
        )
    if not table.rows:
        raise DataError(f"the label file {path} has no lines after its headings")
    rows = [(number, tuple(cells[place] for place in columns)) for number, cells in table.rows]
    empty = next((number for number, row in rows if not all(row)), None)
    if empty is not None:
        raise DataError(f"line {empty} of {path} has no image or no label; fill in both, or remove the line")
    return [row for _, row in rows]


def _fields(line: str) -> tuple[str, ...]:
    """Splits a line at its last comma, otherwise at its last tab, otherwise at its last space."""
    for separator in (",", "\t", " "):
        name, found, label = line.rpartition(separator)
        if found and name.strip() and label.strip():
            return name.strip(), label.strip()
    return (line,)


def _from_devkit(rows: Sequence[tuple[str, ...]], path: Path) -> list[tuple[str, ...]]:
    """Replaces the numbers of ImageNet's development kit by WordNet ids."""
    table = path.with_name("meta.mat")
    if not file_exists(table):
        raise DataError(
            f"{path} has numbers of unknown classes; if it is from ImageNet's development kit, keep it by meta.mat, "
            "otherwise each line must be an image and its label"
        )
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise MissingExtraError(f"{table} needs SciPy to be read; pip install 'lamzoo[data]'") from error
    try:
        with open_regular(table) as file:
            synsets = loadmat(file, squeeze_me=True)["synsets"]
        names = {int(entry["ILSVRC2012_ID"]): str(entry["WNID"]) for entry in synsets}
        return [(names[int(row[0])],) for row in rows]
    except BROKEN_IMAGE as error:  # those of NumPy and zlib, which read MATLAB files, are the same
        raise DataError(f"{table} does not define the class numbers in {path}: {error!r}") from error


def _names_of(
    paths: Sequence[Path], rows: Sequence[tuple[str, ...]], root: Path, where: Path
) -> tuple[list[str], dict[str, str]]:
    """Returns the label of each image, and the labels of the listed images without a file by path below the root."""
    if len(rows[0]) == 1:
        return _names_in_order(paths, [row[0] for row in rows], where)
    given: dict[str, str] = {}
    inside = [Path(nfc(path.relative_to(root).as_posix())) for path in paths]
    stems = Counter(path.stem for path in inside)
    short: dict[str, str | None] = {}  # by file name without folders; None for images with different labels
    for name, label in ((Path(nfc(name)), label) for name, label in rows):
        if given.setdefault(name.as_posix(), label) != label:
            raise DataError(
                f"{where} gives {name.as_posix()} two labels, {given[name.as_posix()]!r} and {label!r}; remove one"
            )
        short[name.name] = label if short.get(name.name, label) == label else None
    names: list[str] = []
    found: set[str] = set()  # paths in the list
    found_short: set[str] = set()
    for path, place in zip(paths, inside, strict=True):
        keys = (place.as_posix(), place.with_suffix("").as_posix())
        long = next((key for key in keys if key in given), None)
        brief = next((key for key in (place.name, place.stem) if short.get(key) and stems[place.stem] == 1), None)
        if long is not None:
            found.add(long)
            names.append(given[long])
        elif brief is not None:
            found_short.add(brief)
            names.append(str(short[brief]))
        else:
            raise DataError(f"{where} has no label or several for {path}; correct it, or remove the image")
    missing = {name: label for name, label in given.items() if name not in found and Path(name).name not in found_short}
    return names, missing


def _names_in_order(paths: Sequence[Path], names: Sequence[str], where: Path) -> tuple[list[str], dict[str, str]]:
    numbers = [_OFFICIAL_NAME.match(path.name) for path in paths]
    if all(numbers) and len(names) >= len(paths):  # a subset of ImageNet: the names contain the numbers
        places = [int(number[1]) - 1 for number in numbers if number]
        if max(places) < len(names) and min(places) >= 0:
            there = set(places)
            missing = {
                f"ILSVRC2012_val_{place + 1:08}.JPEG": name for place, name in enumerate(names) if place not in there
            }
            return [names[place] for place in places], missing
    if len(names) != len(paths):
        raise DataError(
            f"{where} has {len(names)} labels without names and the folder {len(paths)} images; "
            "each line must be an image and its label"
        )
    return list(names), {}
