"""Creation of image data sets from one-line specifications: the grammar and the source of each layout."""

from __future__ import annotations

from pathlib import Path

from lamzoo.data.images.archives import NpzSource, TarSource, npz_splits
from lamzoo.data.images.folders import FolderSource
from lamzoo.data.images.image_dataset import ImageSource, LabelledImages
from lamzoo.data.images.label_file import ListedSource
from lamzoo.data.images.library_datasets import HuggingFaceSource, TorchvisionSource
from lamzoo.data.paths import folder_exists, split_last
from lamzoo.data.splits import check_whole, split_spec
from lamzoo.errors import DataError

_GRAMMAR = (
    "imagefolder:DIR, imagelist:DIR:FILE, npz:DIR, torchvision:NAME:ROOT, hfds:NAME, wds:SHARDS or an existing folder"
)


def create_dataset(spec: str, split: str) -> LabelledImages:
    """Opens a split of labelled images.

    Args:
        spec: one of

            - ``imagefolder:DIR``: ``DIR/<split>/<class>/*.jpg``, or ``DIR/<class>/*.jpg``, which has no splits. Labels
              are in timm's natural order of the class names of all splits. In a training split, every class needs an
              image.
            - ``imagelist:DIR:FILE``: a flat folder and a label file, such as ImageNet's validation split as
              distributed; see :class:`lamzoo.data.images.label_file.ListedSource`. It has no splits.
            - ``npz:DIR``: ``DIR/<split>.npz`` with ``jpeg`` (uint8, the concatenated files), ``offsets`` (int64, N + 1)
              and ``labels`` (integer, N), and optionally ``DIR/classes.json``.
            - ``torchvision:NAME:ROOT``: a data set of torchvision in ``ROOT``, such as ``CIFAR10``.
            - ``hfds:NAME``: a Hugging Face data set, by its name on the hub or a local folder.
            - ``wds:SHARDS``: local webdataset tar files, ``DIR/{split}-{000..012}.tar`` or with ``*``; ``{split}`` is
              replaced by the split; without it, there are no splits.
            - a folder: ``npz`` if it contains npz files, otherwise ``imagefolder``.
        split: ``train``, ``validation``, ``test`` or another name in the data. ``val``, ``valid``, ... are synonyms of
            ``validation``, which is never replaced by ``test``. For data without splits ``"all"``; their
            ``dataset.split`` is ``None``.

    Returns:
        A data set of ``(RGB PIL image, int label)``, upright, with the attributes ``transform`` and ``classes``.

    Raises:
        MissingSplitError: the data have no such split.
        DataError: the specification or the folder does not exist, or the files are invalid.
    """
    source = _source(spec, split)
    dataset = LabelledImages(source, spec)
    check_whole(dataset, split, source.how_to_split)
    return dataset


def _source(spec: str, split: str) -> ImageSource:
    kind, rest = split_spec(spec, split, _GRAMMAR)
    match kind if rest else "":
        case "imagefolder":
            return FolderSource(Path(rest), split)
        case "imagelist":
            images, file = split_last(rest)
            if not images or not file:
                raise DataError(f"the data set {spec!r} has no label file; it must be imagelist:{rest.strip(':')}:FILE")
            return ListedSource(Path(images), Path(file))
        case "npz":
            return NpzSource(Path(rest), split)
        case "torchvision":
            name, _, root = rest.partition(":")
            if not root:
                raise DataError(f"the data set {spec!r} has no folder; it must be torchvision:{name}:ROOT")
            return TorchvisionSource(name, Path(root), split)
        case "hfds":
            return HuggingFaceSource(rest, split)
        case "wds":
            return TarSource(rest, split)
    folder = Path(spec)
    if folder_exists(folder):
        return NpzSource(folder, split) if npz_splits(folder) else FolderSource(folder, split)
    raise DataError(f"{spec!r} is neither a data set nor an existing folder; it must be {_GRAMMAR}")
