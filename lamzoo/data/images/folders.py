"""Image folders with one subfolder per class, with or without split folders above."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from lamzoo.data.fingerprint import file_sizes
from lamzoo.data.images.decode import IMAGE_EXTENSIONS
from lamzoo.data.images.image_dataset import ImageSource
from lamzoo.data.paths import check_folder, list_files, natural_key, nfc, open_listed, subfolders
from lamzoo.data.splits import SPLIT_NAMES, WHOLE, find_split, synonyms
from lamzoo.errors import DataError


class FolderSource(ImageSource):
    """``root/<split>/<class>/**`` or ``root/<class>/**``; hidden files and folders below ``root`` are skipped.

    The classes are those of all splits, so that a class without test images doesn't shift the labels of the others.
    Their names are in NFC, independent of the file system. In the training split, a class without images is an error.
    Links are followed; a folder that is linked twice within a class is listed once, see
    :func:`lamzoo.data.paths.list_files`. Folders that can't be listed and links that lead nowhere are ``lost`` images.

    Args:
        root: the folder.
        split: the split; ``"all"`` if ``root`` contains the class folders.

    Raises:
        DataError: there is no such folder or split, there are no classes, one is empty in the training split, or the
            folder or a split can't be listed.
    """

    how_to_split = "create a folder for each split, with the class folders in it"

    def __init__(self, root: Path, split: str) -> None:
        check_folder(root)
        children = subfolders(root)
        split_folders = [name for name in children if name.lower() in SPLIT_NAMES or (name == split and split != WHOLE)]
        if split_folders:
            self.split = find_split(split, split_folders, str(root))
            names = {nfc(name) for folder in split_folders for name in subfolders(root / folder)}
            folder = root / self.split
        else:
            names = set(map(nfc, children))
            folder = root
        if not names:
            flat = list_files(folder, IMAGE_EXTENSIONS).files
            hint = f"; with a label file, use imagelist:{folder}:FILE" if flat else ""
            raise DataError(f"{folder} has no class folders; images belong in {folder}/<class>/{hint}")
        self.classes = sorted(names, key=lambda name: (natural_key(name), name))
        self._folder = folder
        numbers = {name: label for label, name in enumerate(self.classes)}
        folders = sorted((numbers[nfc(name)], name) for name in subfolders(folder))
        self._samples: list[tuple[Path, int]] = []
        self.lost = {}
        for label, name in folders:
            files, lost = list_files(folder / name, IMAGE_EXTENSIONS)
            self.lost |= {number: lost[path] for number, path in enumerate(files, len(self._samples)) if path in lost}
            self._samples += [(path, label) for path in files]
        if not self._samples:
            raise DataError(f"the class folders of {folder} have no images")
        if "train" in synonyms(split):
            self.check_classes()

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, index: int) -> tuple[BinaryIO, int]:
        path, label = self._samples[index]
        try:
            return open_listed(path), label
        except OSError as error:
            raise DataError(f"cannot open {path}: {error.strerror}") from error

    def name(self, index: int) -> str:
        return str(self._samples[index][0])

    def labels(self) -> list[int]:
        return [label for _, label in self._samples]

    def sizes(self) -> list[int]:
        return file_sizes([path for path, _ in self._samples])

    def check_classes(self) -> None:
        filled = set(self.labels())
        empty = [name for label, name in enumerate(self.classes or ()) if label not in filled]
        if empty:
            more = f" (and {len(empty) - 3} more)" if len(empty) > 3 else ""
            raise DataError(
                f"{self._folder} has no training image of the class {', '.join(map(repr, empty[:3]))}{more}; "
                "add some, or remove the class folder from every split"
            )
