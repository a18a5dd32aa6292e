"""Class lists in common file formats, and relabelling of data sets by them."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import timm.data
from PIL import Image

from lamzoo.data.images.image_dataset import ImageSource, LabelledImages
from lamzoo.data.paths import file_exists, nfc
from lamzoo.errors import DataError
from lamzoo.reading import parse_json, read_text, reason

#: Names of timm's class lists of ImageNet.
TIMM_CLASS_LISTS = tuple(f"imagenet-{size}" for size in ("1k", "12k", "21k-goog", "21k-miil", "22k", "22k-ms"))
_WORDNET_ID = re.compile(r"n\d{8}\b")


def read_class_map(source: str | Path) -> list[str]:
    """Reads the names of a model's classes, in the order of its outputs.

    Args:
        source: a name in :data:`TIMM_CLASS_LISTS`, such as ``imagenet-1k``, or a file:

            - text, one class per line, as timm's class maps; in ``n01440764 tench, Tinca tinca`` (ImageNet's
              ``LOC_synset_mapping.txt``, sorted) the WordNet id is used;
            - JSON, ``{"0": ["n01440764", "tench"], ...}`` (``imagenet_class_index.json``), a list of names, a list of
              ``[identifier, name]``, or ``{"n01440764": 0, ...}``.

    Returns:
        Names, or identifiers if there are both; the position is the class number.

    Raises:
        DataError: the file does not exist or has another content, a duplicate class, or a gap in its numbers.
    """
    if str(source) in TIMM_CLASS_LISTS:
        return list(timm.data.ImageNetInfo(str(source)).label_names())
    path = Path(source)
    if not file_exists(path):
        known = ", ".join(TIMM_CLASS_LISTS)
        raise DataError(f"the class map {str(source)!r} is neither a file nor one of timm's ({known})")
    try:
        text = read_text(path)
        names = _from_json(parse_json(text, file_names=True)) if path.suffix.lower() == ".json" else _from_lines(text)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a readable class map: {reason(error)}") from error
    twice = next((name for name, count in Counter(map(nfc, names)).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{path} is not a class map: it has the class {twice!r} twice")
    return names


def relabel(dataset: LabelledImages, names: Sequence[str], where: str = "the class map") -> LabelledImages:
    """Relabels images by the position of their class in a list, which may have more classes than the data.

    Names are compared in NFC.

    Args:
        dataset: a data set with class names; not modified.
        names: the classes in the order of the model's outputs, as returned by :func:`read_class_map`.
        where: name of the list in messages.

    Returns:
        A data set of the same images, with ``names`` as its classes.

    Raises:
        DataError: the data set has no class names, or one of them is not in the list.
    """
    if dataset.classes is None:
        raise DataError(f"{dataset.spec} has no class names to look up in {where}; omit the class map")
    numbers = {nfc(name): number for number, name in enumerate(names)}
    classes = dataset.classes
    missing = [name for name in classes if nfc(name) not in numbers]
    if missing and dataset.source.identifiers is not None:
        classes = dataset.source.identifiers
        missing = [name for name in classes if nfc(name) not in numbers]
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(classes)} classes of {dataset.spec} are not in {where}, such as "
            f"{missing[0]!r}; its classes have the form {names[0]!r}"
        )
    source = _RelabelledSource(dataset.source, list(names), [numbers[nfc(name)] for name in classes])
    return dataset.with_source(source)


class _RelabelledSource(ImageSource):
    """The images of another source, relabelled by a table."""

    def __init__(self, source: ImageSource, classes: list[str], numbers: list[int]) -> None:
        self.classes = classes
        self.split, self.lost = source.split, dict(source.lost)
        self._source = source
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> tuple[BinaryIO | Image.Image, Any]:
        file, label = self._source.read(index)
        return file, self._number(label)

    def name(self, index: int) -> str:
        return self._source.name(index)

    def labels(self) -> Sequence[Any]:
        return [self._number(label) for label in self._source.labels()]

    def sizes(self) -> Sequence[int]:
        return self._source.sizes()

    def _number(self, label: Any) -> Any:
        try:
            known = 0 <= operator.index(label) < len(self._numbers)
        except TypeError:
            known = False
        return self._numbers[label] if known else -1  # the data set raises an error that names the image


def _from_lines(text: str) -> list[str]:
    names = []
    for line in filter(None, map(str.strip, text.split("\n"))):
        found = _WORDNET_ID.match(line)
        names.append(found[0] if found else line)
    if not names:
        raise ValueError("it is empty")
    return names


def _from_json(content: Any) -> list[str]:
    if isinstance(content, dict):
        count = len(content)  # before numbers that are there twice become one
        if content and all(type(value) is int for value in content.values()):
            content = {str(number): name for name, number in content.items()}
        gap = next((number for number in range(count) if str(number) not in content), None)
        if gap is not None:
            raise ValueError(f"it has {count} classes, but none with number {gap}")
        content = [content[str(number)] for number in range(count)]
    entries = content if isinstance(content, list) else []
    names = [entry[0] if isinstance(entry, list) and len(entry) == 2 else entry for entry in entries]
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError("it must contain class names, [identifier, name] pairs, or a table of either by number")
    return names
