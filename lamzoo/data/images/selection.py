"""Parts of a data set: some of its images, or two halves that share its classes; reads no image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from lamzoo.data.images.image_dataset import ImageSource, LabelledImages
from lamzoo.errors import ConfigError, DataError


class SelectedSource(ImageSource):
    """Some images of another source, in the order given.

    Args:
        source: where the images are.
        indices: which of them.
        split: what the part is called; ``None`` for the source's own split.
    """

    def __init__(self, source: ImageSource, indices: Sequence[int], split: str | None = None) -> None:
        self.classes, self.identifiers = source.classes, source.identifiers
        self.split = source.split if split is None else split
        self._source = source
        self._indices = np.asarray(indices, np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> tuple[BinaryIO | Image.Image, Any]:
        return self._source.read(int(self._indices[index]))

    def name(self, index: int) -> str:
        return self._source.name(int(self._indices[index]))

    def labels(self) -> Sequence[Any]:
        labels = self._source.labels()
        return [labels[index] for index in self._indices]


def select(dataset: LabelledImages, indices: Iterable[int], *, split: str | None = None) -> LabelledImages:
    """Returns a data set of some images of another, with its classes, specification, file names, mode and transforms.

    Args:
        dataset: left as it is.
        indices: of the images to keep, 0 to ``len(dataset) - 1``, in the order wanted.
        split: what to call the part; its own split's name by default.

    Raises:
        DataError: no index, or one that is out of range.
    """
    chosen = list(indices)
    for index in chosen:
        if not 0 <= index < len(dataset):
            raise DataError(f"{dataset.spec} has no image {index}; it has {len(dataset)}")
    part = LabelledImages(SelectedSource(dataset.source, chosen, split), dataset.spec)
    part.mode = dataset.mode
    part.transform, part.target_transform = dataset.transform, dataset.target_transform
    return part


def split_off(dataset: LabelledImages, fraction: float, seed: int = 0) -> tuple[LabelledImages, LabelledImages]:
    """Splits a data set in two, each class by the same fraction, for data that come without a validation split.

    The choice depends on the labels, the fraction and the seed alone, so that every process of a run makes the same.

    Args:
        dataset: what to split; both parts keep the order of its images.
        fraction: of each class that goes to the validation part, above 0 and below 1: rounded, but at least one image
            and never all. A class of one image stays in the training part.
        seed: of the choice.

    Returns:
        The training part and the validation part; their ``split`` is ``"train"`` and ``"validation"``.

    Raises:
        ConfigError: a fraction that is not between 0 and 1, or a negative seed.
        DataError: no class has two images; or a label is wrong.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"the fraction for validation is {fraction}; it must be between 0 and 1")
    if seed < 0:
        raise ConfigError(f"the seed is {seed}; it must be 0 or more")
    labels = np.asarray(dataset.labels())
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) > 1:
            count = min(max(1, round(fraction * len(members))), len(members) - 1)
            held_out[np.random.default_rng((seed, label)).permutation(members)[:count]] = True
    if not held_out.any():
        raise DataError(f"no class of {dataset.spec} has two images to split into training and validation; add some")
    train, validation = (np.flatnonzero(part).tolist() for part in (~held_out, held_out))
    return select(dataset, train, split="train"), select(dataset, validation, split="validation")
