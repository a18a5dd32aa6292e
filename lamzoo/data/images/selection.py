"""Subsets of image data sets, and training-validation splits of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from lamzoo.data.images.image_dataset import ImageSource, LabelledImages
from lamzoo.errors import ConfigError, DataError


class SelectedSource(ImageSource):
    """Selected images of another source, in the order given.

    Args:
        source: source of the images.
        indices: indices of the images.
        split: name of the split; ``None`` for that of the source.
    """

    def __init__(self, source: ImageSource, indices: Sequence[int], split: str | None = None) -> None:
        self.classes, self.identifiers = source.classes, source.identifiers
        self.split = source.split if split is None else split
        self._source = source
        self._indices = np.asarray(indices, np.int64)
        if source.lost:
            chosen = enumerate(self._indices.tolist())
            self.lost = {place: source.lost[index] for place, index in chosen if index in source.lost}

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> tuple[BinaryIO | Image.Image, Any]:
        return self._source.read(int(self._indices[index]))

    def name(self, index: int) -> str:
        return self._source.name(int(self._indices[index]))

    def labels(self) -> Sequence[Any]:
        labels = self._source.labels()
        return [labels[index] for index in self._indices]

    def sizes(self) -> Sequence[int]:
        sizes = self._source.sizes()
        return [sizes[index] for index in self._indices] if len(sizes) else ()


def select(dataset: LabelledImages, indices: Iterable[int], *, split: str | None = None) -> LabelledImages:
    """Returns a subset of a data set, with its classes, specification, file names, mode and transforms.

    Args:
        dataset: the data set; not modified.
        indices: indices of the images to keep, 0 to ``len(dataset) - 1``, in order.
        split: name of the split; that of ``dataset`` by default.

    Raises:
        DataError: there are no indices, or one is out of range.
    """
    chosen = list(indices)
    for index in chosen:
        if not 0 <= index < len(dataset):
            raise DataError(f"{dataset.spec} has no image {index}; it has {len(dataset)} images")
    return dataset.with_source(SelectedSource(dataset.source, chosen, split))


def split_off(dataset: LabelledImages, fraction: float, seed: int = 0) -> tuple[LabelledImages, LabelledImages]:
    """Splits a data set into training and validation parts, stratified by class.

    The selection depends only on the labels, the fraction and the seed, so it is the same in all processes of a run.

    Args:
        dataset: the data set; both parts keep the order of its images.
        fraction: fraction of each class for the validation part, above 0 and below 1: rounded, but at least one image
            and never all. A class with a single image stays in the training part.
        seed: seed of the selection.

    Returns:
        The training and the validation part, with the splits ``"train"`` and ``"validation"``.

    Raises:
        ConfigError: the fraction is not between 0 and 1, or the seed is negative.
        DataError: no class has two images, or a label is invalid.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"the fraction for validation is {fraction}; it must be between 0 and 1")
    if seed < 0:
        raise ConfigError(f"the seed is {seed}; it must be 0 or more")
    labels = np.asarray(dataset.labels())
    held_out = np.zeros(len(labels), bool)
    order = np.argsort(labels, kind="stable")
    classes, starts = np.unique(labels[order], return_index=True)
    for label, members in zip(classes, np.split(order, starts[1:]), strict=True):
        if len(members) > 1:
            count = min(max(1, round(fraction * len(members))), len(members) - 1)
            held_out[np.random.default_rng((seed, label)).permutation(members)[:count]] = True
    if not held_out.any():
        raise DataError(f"no class of {dataset.spec} has two images to split into training and validation; add some")
    train, validation = (np.flatnonzero(part).tolist() for part in (~held_out, held_out))
    return select(dataset, train, split="train"), select(dataset, validation, split="validation")
