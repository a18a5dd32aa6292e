"""The image data set class: decodes and checks the items of a source, and applies transforms."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, BinaryIO

from PIL import Image
from torch.utils.data import Dataset

from lamzoo.data.fingerprint import Fingerprint, image_fingerprint
from lamzoo.data.images.decode import Mode, decode_image
from lamzoo.data.validation import BadInput
from lamzoo.errors import DataError

_MOST_CLASSES = 2**31


class ImageSource(ABC):
    """Source of images and labels: one subclass per layout.

    Attributes:
        classes: class names in label order, or ``None`` if the layout has none.
        identifiers: identifiers of the classes, such as WordNet ids, if they differ from the names.
        split: name of the split in the data, or ``None`` for data without splits.
        how_to_split: how to add splits to such data, for messages; ``None`` for layouts without splits.
        lost: indices of images that are known to be unreadable without opening them, each with the reason: missing
            files, and folders that can't be listed, which count as one image.
    """

    classes: list[str] | None = None
    identifiers: list[str] | None = None
    split: str | None = None
    how_to_split: str | None = None
    lost: Mapping[int, str] = MappingProxyType({})

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> tuple[BinaryIO | Image.Image, Any]:
        """Returns an image, or a file to decode, and its label."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Returns the name of an image in messages: its path, or its index in a file."""

    @abstractmethod
    def labels(self) -> Sequence[Any]:
        """Returns the labels of all images as in :meth:`read`, without decoding if the layout allows it."""

    def sizes(self) -> Sequence[int]:
        """Returns the size of each image in bytes, without reading any; empty if the layout doesn't tell."""
        return ()

    def check_classes(self) -> None:  # noqa: B027 - most layouts may have classes without images
        """Raises a :class:`DataError` if a class has no images, which training requires."""


class LabelledImages(Dataset):
    """A map-style data set of ``(PIL image, int label)``; images are upright, and RGB by default.

    A damaged image raises an error. timm's ``ImageDataset`` replaces it by the next image, which would change the test
    set.

    Attributes:
        mode: Pillow mode of the images; set it to ``"L"`` or ``"RGBA"`` for models with 1 or 4 input channels.
        transform: transform of the image, as in timm's and torchvision's data sets.
        target_transform: transform of the label.
        classes: class names in label order, or ``None``.
        split: name of the split in the data, or ``None`` for data without splits.
        spec: specification of the data set.
        lost: the images that are known to be unreadable, such as missing files; reading one raises an error.

    Args:
        source: source of images and labels.
        spec: name of the data set in messages.

    Raises:
        DataError: the source is empty; when an item is read, a damaged image or a label outside the classes.
    """

    def __init__(self, source: ImageSource, spec: str) -> None:
        if not len(source):
            raise DataError(f"{spec} has no images")
        self.source = source
        self.spec = spec
        self.classes = source.classes
        self.split = source.split
        self.lost = [BadInput(index, source.name(index), reason) for index, reason in source.lost.items()]
        self.mode: Mode = "RGB"
        self.transform: Callable[[Image.Image], Any] | None = None
        self.target_transform: Callable[[int], Any] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image: Any
        label: Any
        image, label = self.decode(index)
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            label = self.target_transform(label)
        return image, label

    def decode(self, index: int) -> tuple[Image.Image, int]:
        """Returns an image in the data set's mode, upright, and its label, without transforms.

        Raises:
            DataError: the image is damaged, or the label is outside the classes.
        """
        if (reason := self.source.lost.get(index)) is not None:
            name = self.filename(index)
            raise DataError(f"cannot read the image {name}: {reason}; replace or remove it") from ValueError(reason)
        file, given = self.source.read(index)
        if isinstance(file, Image.Image):
            image = decode_image(file, self.filename(index), self.mode)
        else:
            with file:
                image = decode_image(file, self.filename(index), self.mode)
        return image, self._label(given, index)

    def with_source(self, source: ImageSource) -> LabelledImages:
        """Returns a data set of other images, with the specification, mode and transforms of this one."""
        dataset = LabelledImages(source, self.spec)
        dataset.mode, dataset.transform, dataset.target_transform = self.mode, self.transform, self.target_transform
        return dataset

    def labels(self) -> list[int]:
        """Returns the label of every image, without ``target_transform``, and without decoding the images.

        The exception are data sets of torchvision that store labels under an unusual name: their images are read.

        Raises:
            DataError: a label is outside the classes; names the image.
        """
        return [self._label(given, index) for index, given in enumerate(self.source.labels())]

    def is_label(self, given: Any) -> bool:
        """Returns whether a value is a valid class number."""
        try:
            label = operator.index(given)
        except TypeError:
            return False
        return 0 <= label < (_MOST_CLASSES if self.classes is None else len(self.classes))

    def filename(self, index: int) -> str:
        """Returns the path of an image, or its index in an archive."""
        return self.source.name(index)

    def fingerprint(self) -> Fingerprint:
        """Returns digests of names, labels and sizes of the images, which are not read."""
        names = [self.filename(index) for index in range(len(self))]
        return image_fingerprint(names, self.source.labels(), self.source.sizes(), self.classes)

    def _label(self, given: Any, index: int) -> int:
        try:
            label = operator.index(given)
        except TypeError:
            raise DataError(f"the label of {self.filename(index)} is {given!r}, not a class number") from None
        if not self.is_label(label):
            limit = "" if self.classes is None else f" one of the {len(self.classes)} classes"
            raise DataError(f"the label of {self.filename(index)} is {label}, which is not{limit or ' a class number'}")
        return label
