"""Decoding of single images from bytes or paths, and search for image files."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import BinaryIO, Literal

import numpy as np
from PIL import ExifTags, Image

from lamzoo.data.paths import find_files, open_listed
from lamzoo.errors import DataError

#: Extensions of images in folders: torchvision's list; timm's own is shorter.
IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})
# Exceptions of Pillow's decoders for damaged bytes that their own checks have missed.
_MISSED = (RuntimeError, LookupError, ArithmeticError, AttributeError, TypeError, AssertionError, BufferError)
#: Exceptions of Pillow's decoders for bytes that are not a complete image.
BROKEN_IMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError),
    *_MISSED,
)

# Length over width. Transforms scale the shorter side to some 250 pixels: a line of 50,000 would take gigabytes.
_THINNEST = 1000
_TURNS: dict[object, Image.Transpose] = {  # by the EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_METADATA = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


Mode = Literal["L", "RGB", "RGBA"]
#: Pillow's modes by the number of a model's input channels.
MODES: dict[int, Mode] = {1: "L", 3: "RGB", 4: "RGBA"}


def of_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Adapts a mean or standard deviation to another number of channels as timm does: all get the average."""
    return tuple(values) if len(values) == channels else (fmean(values),) * channels


def decode_image(file: BinaryIO | Image.Image, name: str, mode: Mode = "RGB") -> Image.Image:
    """Decodes an image to RGB, or another mode, upright.

    It is rotated by its EXIF orientation, if the EXIF data are valid. Grey, palette and CMYK images are converted, an
    alpha channel is dropped (``"RGBA"`` keeps it, or adds an opaque one), and 16-bit grey is scaled to 8 bits, which
    Pillow by itself would clip; of an animation the first frame is used.

    Args:
        file: the open file, or a Pillow image.
        name: name of the image in messages.
        mode: mode of the result; ``"L"`` is grey.

    Returns:
        An image that is independent of the file, without EXIF or XMP data.

    Raises:
        DataError: Pillow doesn't recognise the image, it is truncated, has more pixels than Pillow's limit against
            decompression bombs, is over a thousand times as long as wide, is PostScript, or its pixels have an unknown
            range.
    """
    try:
        image = _convert(file if isinstance(file, Image.Image) else Image.open(file), mode)
    except BROKEN_IMAGE as error:
        raise DataError(f"cannot read the image {name}: {_reason(error)}; replace or remove it") from error
    for key in _METADATA:  # its orientation is no longer valid
        image.info.pop(key, None)
    return image


def open_image(image: str | Path | Image.Image, mode: Mode = "RGB") -> Image.Image:
    """Reads an image as :func:`decode_image` does: to RGB, or another mode, upright.

    Args:
        image: a file, or a Pillow image.
        mode: mode of the result.

    Raises:
        DataError: the file does not exist, is not readable or not a regular file, or is not a complete image.
    """
    if isinstance(image, Image.Image):
        return decode_image(image, getattr(image, "filename", "") or "from memory", mode)
    path = Path(image)
    try:
        with open_listed(path) as file:
            return decode_image(file, str(path), mode)
    except FileNotFoundError as error:
        raise DataError(f"no such image: {path}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the image {path}: {_reason(error)}; replace or remove it") from error


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Lists image files: given files, and the images of given folders and their subfolders in natural order.

    Args:
        paths: files and folders. A file is listed whatever its name; in folders, files are selected by extension, and
            hidden ones are skipped.

    Returns:
        The files, in the order of the arguments.

    Raises:
        DataError: a path does not exist, or a folder has no images.
    """
    return find_files(paths, IMAGE_EXTENSIONS, "image")


def _convert(image: Image.Image, mode: Mode) -> Image.Image:
    if image.format == "EPS":
        raise ValueError("it is PostScript, a program, which is not run; convert it to PNG or JPEG")
    if max(image.size) > _THINNEST * min(image.size):
        raise ValueError(f"it is {image.width} x {image.height} pixels, too thin to be resized")
    image = _upright(image)
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        return image.convert("RGBA").convert(mode)  # direct conversion gives the same with a warning
    if image.mode == "F":
        raise ValueError("its pixels are floats of unknown range, which must be stored as 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("its pixels have 32 bits and unknown range, and must be stored as 8 or 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))  # the high byte, as Pillow does for 16-bit colours
    return image.convert(mode)


def _upright(image: Image.Image) -> Image.Image:
    """Rotates an image by its EXIF orientation.

    ``ImageOps.exif_transpose`` also rewrites the EXIF data, and fails if any of them are damaged.
    """
    image.load()  # rotates TIFF images
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except BROKEN_IMAGE:
        return image
    method = _TURNS.get(orientation)
    return image if method is None else image.transpose(method)


def unreadable_because(error: DataError) -> str:
    """Returns why an image is invalid, in a few words, from an error that also names the image."""
    return _reason(error.__cause__ or error)


def _reason(error: BaseException) -> str:
    """Returns why an image can't be read, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if type(error).__name__ == "UnidentifiedImageError":
        return "it is not an image in a format that Pillow supports"
    if isinstance(error, MemoryError):
        return "it needs more memory than is available"
    if isinstance(error, _MISSED):
        return f"its data are damaged ({type(error).__name__}: {' '.join(str(error).split())})"
    return " ".join(str(error).split()) or type(error).__name__
