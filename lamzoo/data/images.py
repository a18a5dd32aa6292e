"""Reading single images: from bytes, from a path, and finding them in folders; knows no data set."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from lamzoo.data.paths import files_below, find_files
from lamzoo.errors import DataError

#: What counts as an image in a folder: torchvision's list; timm's own is shorter.
IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})
#: What Pillow's decoders raise for bytes that are no image, or not a whole one.
BROKEN_IMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)

# Length over width. Transforms scale the shorter side up to some 250 pixels: a line of 50,000 would take gigabytes.
_THINNEST = 1000


def decode_image(file: BinaryIO | Image.Image, name: str) -> Image.Image:
    """Decodes a whole image to RGB.

    Grey, palette and CMYK images are converted, an alpha channel is dropped, and 16-bit grey is scaled to 8 bits, which
    Pillow by itself would clip; of an animation the first frame counts.

    Args:
        file: the open file, or an image that Pillow has opened.
        name: what to call it in an error.

    Returns:
        An RGB image that no longer needs the file.

    Raises:
        DataError: the bytes are no image that Pillow knows, it ends too early, has more pixels than Pillow's limit
            against decompression bombs, is over a thousand times as long as wide, or its pixels have no known range.
    """
    try:
        return _to_rgb(file if isinstance(file, Image.Image) else Image.open(file))
    except BROKEN_IMAGE as error:
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
    except BROKEN_IMAGE as error:
        raise DataError(f"cannot read the image {path}: {_reason(error)}; replace or remove it") from error


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Lists image files: each file as it is, each folder's images with all its subfolders', in natural order.

    Args:
        paths: files and folders. A file is taken whatever its name; in a folder the extension decides, and what is
            hidden is skipped.

    Returns:
        The files, in the order of the arguments.

    Raises:
        DataError: a path does not exist, or a folder holds no image.
    """
    return find_files(paths, IMAGE_EXTENSIONS, "image")


def images_below(folder: Path) -> list[Path]:
    """Lists the image files of a folder and its subfolders by extension, in natural order; none is an empty list."""
    return files_below(folder, IMAGE_EXTENSIONS)


def _to_rgb(image: Image.Image) -> Image.Image:
    if max(image.size) > _THINNEST * min(image.size):
        raise ValueError(f"it is {image.width} x {image.height} pixels, too thin to be resized")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        return image.convert("RGBA").convert("RGB")  # the direct way is the same, with a warning
    if image.mode == "F":
        raise ValueError("its pixels are floats of unknown range, store them as 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("its pixels have 32 bits and unknown range, store them as 8 or 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))  # the high byte, as Pillow takes of 16-bit colours
    return image.convert("RGB")


def unreadable_because(error: DataError) -> str:
    """Says what is wrong with an image in a few words, without its name, from the error that named it."""
    return _reason(error.__cause__ or error)


def _reason(error: BaseException) -> str:
    """Says in a few words why an image cannot be read."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if type(error).__name__ == "UnidentifiedImageError":
        return "it is no image in a format that Pillow knows"
    return " ".join(str(error).split()) or type(error).__name__
