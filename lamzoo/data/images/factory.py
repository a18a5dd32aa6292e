"""From a one-line specification to a data set: the grammar, and which source reads which layout."""

from __future__ import annotations

from pathlib import Path

from lamzoo.data.images.archives import NpzSource, TarSource, npz_splits
from lamzoo.data.images.folders import FolderSource
from lamzoo.data.images.image_dataset import ImageSource, LabelledImages
from lamzoo.data.images.label_file import ListedSource
from lamzoo.data.images.library_datasets import HuggingFaceSource, TorchvisionSource
from lamzoo.data.paths import split_last
from lamzoo.data.splits import check_whole
from lamzoo.errors import DataError

_GRAMMAR = (
    "imagefolder:DIR, imagelist:DIR:FILE, npz:DIR, torchvision:NAME:ROOT, hfds:NAME, wds:SHARDS or an existing folder"
)


def create_dataset(spec: str, split: str) -> LabelledImages:
    """Opens a split of labelled images.

    Args:
        spec: one of

            - ``imagefolder:DIR``: ``DIR/<split>/<class>/*.jpg``, or ``DIR/<class>/*.jpg``, which has no splits. Labels
              follow timm's natural order of the class names, over all the splits together. In a training split, each
              class needs an image.
            - ``imagelist:DIR:FILE``: a flat folder, and a file of labels, such as ImageNet's validation split as it is
              handed out; see :class:`lamzoo.data.images.label_file.ListedSource`. It has no splits.
            - ``npz:DIR``: ``DIR/<split>.npz`` with ``jpeg`` (uint8, the files one after the other), ``offsets``
              (int64, N + 1) and ``labels`` (integer, N), and optionally ``DIR/classes.json``.
            - ``torchvision:NAME:ROOT``: a data set of torchvision that lies in ``ROOT``, such as ``CIFAR10``.
            - ``hfds:NAME``: a Hugging Face data set, by its name on the hub or a local folder.
            - ``wds:SHARDS``: local webdataset tar files, ``DIR/{split}-{000..012}.tar`` or with ``*``; where
              ``{split}`` is written, it is replaced, else there are no splits.
            - a folder: ``npz`` if it holds npz files, else ``imagefolder``.
        split: ``train``, ``validation``, ``test`` or what the data calls it. ``val``, ``valid``, ... all mean
            validation, but validation is never taken for test. Data without splits have one, ``"all"``, whose own name
            (``dataset.split``) is ``None``.

    Returns:
        A data set of ``(RGB PIL image, int label)``, upright, with ``transform`` to set and ``classes`` to read.

    Raises:
        MissingSplitError: the data have no such split.
        DataError: the specification or the folder does not exist, or the files are invalid.
    """
    source = _source(spec, split)
    dataset = LabelledImages(source, spec)
    check_whole(dataset, split, source.how_to_split)
    return dataset


def _source(spec: str, split: str) -> ImageSource:
    if not split:
        raise DataError(f"the split of {spec} is empty; name one, such as 'test'")
    kind, colon, rest = spec.partition(":")
    if colon and not rest:
        raise DataError(f"the data set {spec!r} says {kind}, but not which; write {_GRAMMAR}")
    match kind if colon else "":
        case "imagefolder":
            return FolderSource(Path(rest), split)
        case "imagelist":
            images, file = split_last(rest)
            if not images or not file:
                raise DataError(f"the data set {spec!r} has no file of labels; write imagelist:{rest.strip(':')}:FILE")
            return ListedSource(Path(images), Path(file))
        case "npz":
            return NpzSource(Path(rest), split)
        case "torchvision":
            name, _, root = rest.partition(":")
            if not root:
                raise DataError(f"the data set {spec!r} has no folder; write torchvision:{name}:ROOT")
            return TorchvisionSource(name, Path(root), split)
        case "hfds":
            return HuggingFaceSource(rest, split)
        case "wds":
            return TarSource(rest, split)
    folder = Path(spec)
    if folder.is_dir():
        return NpzSource(folder, split) if npz_splits(folder) else FolderSource(folder, split)
    raise DataError(f"{spec!r} is neither a data set nor a folder here; write {_GRAMMAR}")
