"""Reading single images: from bytes, from a path, and finding them in folders; knows no data set."""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps

from lamzoo.errors import DataError

#: What counts as an image in a folder: torchvision's list; timm's own is shorter.
IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})
# What Pillow's decoders raise for bytes that are no image, or not a whole one.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def decode_image(file: BinaryIO | Image.Image, name: str) -> Image.Image:
    """Decodes a whole image to RGB.

    Args:
        file: the open file, or an image that Pillow has opened.
        name: what to call it in an error.

    Returns:
        An RGB image that no longer needs the file.

    Raises:
        DataError: the bytes are no image that Pillow knows, or it ends too early.
    """
    try:
        image = file if isinstance(file, Image.Image) else Image.open(file)
        return image.convert("RGB")
    except _BROKEN as error:
        raise DataError(f"cannot read the image {name}: {_reason(error)}; replace or remove it") from error


def open_image(path: str | Path) -> Image.Image:
    """Reads a photograph from disk to RGB, turned upright as its EXIF orientation says.

    Data sets use :func:`decode_image`, which leaves the orientation alone, as timm and torchvision do.

    Args:
        path: the file.

    Returns:
        An RGB image.

    Raises:
        DataError: there is no such file, it may not be read, or it is not a whole image.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"no such image: {path}")
    if path.is_dir():
        raise DataError(f"{path} is a folder, not an image")
    try:
        with path.open("rb") as file:
            image = Image.open(file)
            return decode_image(ImageOps.exif_transpose(image), str(path))
    except _BROKEN as error:
        raise DataError(f"cannot read the image {path}: {_reason(error)}; replace or remove it") from error


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Lists image files: each file as it is, each folder's images with all its subfolders', in natural order.

    Args:
        paths: files and folders. A file is taken whatever its extension, in a folder the extension decides.

    Returns:
        The files, in the order of the arguments.

    Raises:
        DataError: a path does not exist, or a folder holds no image.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"no such image or folder: {path}")
        if not path.is_dir():
            found.append(path)
            continue
        inside = images_below(path)
        if not inside:
            raise DataError(f"the folder {path} holds no image ({', '.join(sorted(IMAGE_EXTENSIONS))})")
        found += inside
    return found


def images_below(folder: Path) -> list[Path]:
    """Lists the image files of a folder and its subfolders by extension, in natural order; none is an empty list."""
    inside = (Path(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names)
    return sorted(
        (path for path in inside if path.suffix.lower() in IMAGE_EXTENSIONS), key=lambda path: natural_key(str(path))
    )


def natural_key(text: str) -> list[tuple[int, str]]:
    """Sorts names as timm does: numbers by value, capitals like small letters."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text.lower())]


def _reason(error: BaseException) -> str:
    """Says in a few words why an image cannot be read."""
    if type(error).__name__ == "UnidentifiedImageError":
        return "it is no image in a format that Pillow knows"
    return " ".join(str(error).split()) or type(error).__name__
