"""Image data sets of torchvision and Hugging Face."""

from __future__ import annotations

import inspect
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from lamzoo.data.images.decode import BROKEN_IMAGE, IMAGE_EXTENSIONS
from lamzoo.data.images.image_dataset import ImageSource
from lamzoo.data.json_files import read_json
from lamzoo.data.paths import file_exists, folder_exists, list_files
from lamzoo.data.splits import find_split, synonyms
from lamzoo.errors import DataError, MissingExtraError, MissingSplitError
from lamzoo.files import is_plain_name
from lamzoo.reading import open_regular

#: Data sets of torchvision that read a pickle whose hash is not known, as those of CIFAR are.
_UNPICKLED = frozenset({"LSUN", "LSUNClass"})


class TorchvisionSource(ImageSource):
    """A downloaded image classification data set of ``torchvision.datasets``.

    Args:
        name: name of the class, such as ``CIFAR10``; case-insensitive.
        root: the folder that torchvision downloaded it to.
        split: the split.

    Raises:
        DataError: there is no such data set or split, its files are not in ``root``, or reading it could run code.
    """

    def __init__(self, name: str, root: Path, split: str) -> None:
        import torchvision.datasets

        known = {known.lower(): known for known in torchvision.datasets.__all__}
        if name.lower() not in known:
            raise DataError(f"torchvision has no data set {name!r}; torchvision.datasets lists them")
        self._name = known[name.lower()]
        build = getattr(torchvision.datasets, self._name)
        accepted = inspect.signature(build).parameters
        if self._name in _UNPICKLED:
            raise DataError(
                f"torchvision's {self._name} reads a pickle from the current folder, which can run code; copy its "
                "images to a folder for each class, and use imagefolder:DIR"
            )
        if self._name in ("DatasetFolder", "ImageFolder"):
            raise DataError(
                f"torchvision's {self._name} follows a link that leads back without end; use imagefolder:{root}"
            )
        if "root" not in accepted:
            raise DataError(f"torchvision's {self._name} is not a folder of labelled images")
        if not folder_exists(root):
            raise DataError(f"no such folder: {root}; {self._download(root)}")
        self._dataset = self._build(build, accepted.keys(), root, split)
        self.classes = _names(self._dataset)
        self.identifiers = getattr(self._dataset, "wnids", None)  # ImageNet's

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, index: int) -> tuple[Image.Image, Any]:
        if index >= len(self):
            raise IndexError(index)
        try:
            image, label, *_ = self._dataset[index]
        except BROKEN_IMAGE as error:
            raise DataError(f"cannot read {self.name(index)}: {error}") from error
        if not isinstance(image, Image.Image):
            raise DataError(f"torchvision's {self._name} holds {type(image).__name__}, not images")
        return image, label

    def name(self, index: int) -> str:
        return f"torchvision's {self._name} {self.split or ''}[{index}]"

    def labels(self) -> Sequence[Any]:
        for attribute in ("targets", "_labels", "labels"):
            labels = getattr(self._dataset, attribute, None)
            if labels is not None and np.shape(labels) == (len(self),):
                return np.asarray(labels).tolist()
        return [self.read(index)[1] for index in range(len(self))]

    def _build(self, build: Any, accepted: Any, root: Path, split: str) -> Any:
        if "train" in accepted:
            self.split = find_split(split, ("train", "test"), f"torchvision's {self._name}")
            attempts: list[dict[str, Any]] = [{"train": self.split == "train"}]
        elif "split" in accepted:
            attempts = [{"split": name} for name in synonyms(split)]
        else:
            attempts = [{}]
        refusals: list[str] = []
        for arguments in attempts:
            try:
                dataset = build(root=str(root), **arguments)
            except ValueError as error:  # raised by torchvision for an unknown split
                refusals.append(str(error))
                continue
            except (RuntimeError, OSError) as error:
                reason = " ".join(str(error).split())[:200]
                raise DataError(
                    f"torchvision's {self._name} is not complete in {root} ({reason}); {self._download(root)}"
                ) from error
            self.split = arguments.get("split", self.split)
            return dataset
        raise MissingSplitError(f"torchvision's {self._name} has no split {split!r}: {' '.join(refusals[0].split())}")

    def _download(self, root: Path) -> str:
        return f"download it with torchvision.datasets.{self._name}({str(root)!r}, download=True)"


class HuggingFaceSource(ImageSource):
    """A data set of ``datasets.load_dataset``, from the hub, its cache or a local folder.

    The image column is the one of type ``Image``; the label column is the one of type ``ClassLabel``, or named
    ``label``.

    Args:
        name: name on the hub, or a folder, including those of ``save_to_disk``.
        split: the split.

    Raises:
        MissingExtraError: the ``datasets`` package is not installed.
        DataError: the data set, the split or a column does not exist.
    """

    def __init__(self, name: str, split: str) -> None:
        try:
            import datasets
        except ImportError as error:
            raise MissingExtraError("hfds: needs the datasets package; pip install 'lamzoo[data]'") from error
        self._spec = f"hfds:{name}"
        folder = Path(name)
        for path, reason in list_files(folder, IMAGE_EXTENSIONS).lost.items():  # which load_dataset leaves out
            raise DataError(f"cannot read {path} of {self._spec}: {reason}; replace or remove it")
        try:
            if file_exists(folder / "dataset_dict.json"):
                _check_saved(folder)
                splits = datasets.load_from_disk(name)
                self.split = find_split(split, splits, self._spec)
                dataset = splits[self.split]
            elif file_exists(folder / "state.json"):
                _check_saved(folder)
                dataset = datasets.load_from_disk(name)
            else:
                self.split = find_split(split, datasets.get_dataset_split_names(name), self._spec)
                dataset = datasets.load_dataset(name, split=self.split)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"cannot load {self._spec}: {reason}") from error
        self._image, self._label = self._columns(dataset.features, datasets)
        feature = dataset.features[self._label]
        self.classes = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
        self._dataset = dataset.cast_column(self._image, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, index: int) -> tuple[BinaryIO, Any]:
        item = self._dataset[index]
        image = item[self._image] or {}  # None in a row without an image
        if image.get("bytes"):
            return io.BytesIO(image["bytes"]), item[self._label]
        try:
            if not image.get("path"):
                raise ValueError("there is no image in this row")
            return open_regular(image["path"]), item[self._label]
        except (OSError, ValueError) as error:
            raise DataError(f"{self.name(index)} has neither image bytes nor a file: {error}") from error

    def name(self, index: int) -> str:
        return f"{self._spec} {self.split or ''}[{index}]"

    def labels(self) -> Sequence[Any]:
        return list(self._dataset[self._label][:])  # one query; iterating would read row by row

    def _columns(self, features: Any, datasets: Any) -> tuple[str, str]:
        images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        labels = [name for name in ("label", "labels") if name in features] or labels
        if not images or not labels:
            raise DataError(f"{self._spec} has no image and label column; its columns are {', '.join(features)}")
        return images[0], labels[0]


def _check_saved(folder: Path) -> None:
    """Raises a :class:`DataError` if records of ``save_to_disk`` name splits or files outside their folder."""
    parts = [folder]
    if file_exists(index := folder / "dataset_dict.json"):
        parts = [folder / split for split in _plain_names(index, "splits")]
    for part in parts:
        _plain_names(part / "state.json", "_data_files")


def _plain_names(record: Path, key: str) -> list[str]:
    content = read_json(record)
    names = content.get(key) if isinstance(content, dict) else None
    if isinstance(names, list):
        names = [entry.get("filename") if isinstance(entry, dict) else entry for entry in names]
        if all(map(is_plain_name, names)):
            return names
    raise DataError(f"{record} has no list {key} of names inside its folder; replace the data set with an intact copy")


def _names(dataset: Any) -> list[str] | None:
    """Returns torchvision's class names as strings; ImageNet's classes have several names each."""
    classes = getattr(dataset, "classes", None)
    if not classes:
        return None
    return [name if isinstance(name, str) else ", ".join(map(str, name)) for name in classes]
