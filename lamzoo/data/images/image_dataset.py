"""The one data set class: decodes and checks what a source hands over, and applies a transform."""

from __future__ import annotations

import contextlib
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from PIL import Image
from torch.utils.data import Dataset

from lamzoo.data.images.decode import Mode, decode_image
from lamzoo.errors import DataError


class ImageSource(ABC):
    """Where images and labels come from: one subclass per layout.

    Attributes:
        classes: the class names in label order, or ``None`` where the layout has none.
        identifiers: what the classes are called in catalogues, such as WordNet ids, where that is another name.
        split: the split's own name here, or ``None`` where the layout has no splits and all of it was taken.
        how_to_split: what to do to such data to give it splits, for messages; ``None`` where the layout never has any.
    """

    classes: list[str] | None = None
    identifiers: list[str] | None = None
    split: str | None = None
    how_to_split: str | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> tuple[BinaryIO | Image.Image, Any]:
        """Returns an image, opened or as a file to decode, and its label."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Returns what a reader would call that image: its path, or its index in a file."""

    @abstractmethod
    def labels(self) -> Sequence[Any]:
        """Returns the labels of all images as :meth:`read` gives them, without decoding where the layout allows it."""

    def check_classes(self) -> None:  # noqa: B027 - most layouts may have classes without images
        """Raises a :class:`DataError` where the images can't be trained on, since a class of the layout has none."""


class LabelledImages(Dataset):
    """A map-style data set of ``(PIL image, int label)``; images are upright, and RGB by default.

    Unlike timm's ``ImageDataset``, which puts the next image in a broken one's place, it raises: a score over other
    images than the test set's is no score.

    Attributes:
        mode: Pillow's mode of the images; set it to ``"L"`` or ``"RGBA"`` for models of 1 or 4 channels.
        transform: applied to the image; set it as with any timm or torchvision data set.
        target_transform: applied to the label.
        classes: the class names in label order, or ``None``.
        split: the split's own name, or ``None`` where the data has no splits.
        spec: what the data set was created from.

    Args:
        source: where images and labels come from.
        spec: how to call the whole in an error.

    Raises:
        DataError: the source is empty; on reading an item, a broken image or a label outside the classes.
    """

    def __init__(self, source: ImageSource, spec: str) -> None:
        if not len(source):
            raise DataError(f"{spec} holds no image")
        self.source = source
        self.spec = spec
        self.classes = source.classes
        self.split = source.split
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
        """Returns an image in the data set's mode, upright, and its label, before any transform.

        Raises:
            DataError: the image is broken, or the label is outside the classes.
        """
        file, given = self.source.read(index)
        if isinstance(file, Image.Image):
            image = decode_image(file, self.filename(index), self.mode)
        else:
            with file:
                image = decode_image(file, self.filename(index), self.mode)
        return image, self._label(given, index)

    def labels(self) -> list[int]:
        """Returns the label of every image, before ``target_transform``, without decoding an image.

        A data set of torchvision that keeps its labels under a name of its own is the exception: it is read whole.

        Raises:
            DataError: a label is outside the classes; names the image.
        """
        return [self._label(given, index) for index, given in enumerate(self.source.labels())]

    def is_label(self, given: Any) -> bool:
        """Returns whether a value is the number of a class here."""
        try:
            label = operator.index(given)
        except TypeError:
            return False
        return label >= 0 and (self.classes is None or label < len(self.classes))

    def filename(self, index: int) -> str:
        """Returns the path of an image, or its place in the file that holds it."""
        return self.source.name(index)

    def _label(self, given: Any, index: int) -> int:
        try:
            label = operator.index(given)
        except TypeError:
            raise DataError(f"the label of {self.filename(index)} is {given!r}, not a class number") from None
        if not self.is_label(label):
            limit = "" if self.classes is None else f" of the {len(self.classes)} classes"
            raise DataError(f"the label of {self.filename(index)} is {label}, which is none{limit}")
        return label


@contextlib.contextmanager
def plain_worker_errors() -> Iterator[None]:
    """Gives a :class:`DataError` that crossed from a loader's worker process its own one-line message back.

    torch wraps it into several lines with the worker's traceback; that traceback stays in ``__cause__``.
    """
    try:
        yield
    except DataError as error:
        lines = str(error).strip().splitlines()
        if len(lines) < 2:
            raise
        raise DataError(lines[-1].removeprefix(f"{DataError.__module__}.{DataError.__qualname__}: ")) from error
