"""Reading of arrays from npy and npz files: without pickles, and no more than the file has."""

from __future__ import annotations

import math
import os
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lamzoo.errors import DataError
from lamzoo.reading import most_expanded, open_regular, reason

_HARMLESS = 2**30  # bytes that an array may have however well it is compressed, as one of mostly zeros is
_DAMAGED = (
    OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, OverflowError, MemoryError, RecursionError,
    NotImplementedError, RuntimeError, SyntaxError, tokenize.TokenError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def read_npy(path: Path) -> NDArray[Any]:
    """Reads the array of an npy file.

    Raises:
        DataError: the file does not exist, is damaged, holds less than its header states, or contains a pickle.
    """
    try:
        with open_regular(path) as file:
            return _array(file, os.fstat(file.fileno()).st_size)
    except _DAMAGED as error:
        raise DataError(f"{path} is not a complete npy file of a plain array: {reason(error)}") from error


def read_npz(path: Path, names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
    """Reads arrays of an npz file.

    Args:
        path: the file.
        names: the arrays that must be in it; the others are not read.
        optional: arrays to read if present.

    Raises:
        DataError: the file does not exist or is damaged, an array is missing, holds less than its header states, or
            contains a pickle.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if len(members) < len(archive.infolist()):
                raise ValueError("it has an array twice")
            missing = [name for name in names if name not in members]
            if missing:
                found = ", ".join(map(repr, members)) or "none"
                raise DataError(f"{path} has no array {' and '.join(map(repr, missing))}; it has {found:.200}")
            arrays: dict[str, NDArray[Any]] = {}
            size = os.fstat(file.fileno()).st_size
            for name in (*names, *(name for name in optional if name in members)):
                grown = members[name].file_size
                if grown > max(_HARMLESS, most_expanded(min(size, members[name].compress_size))):
                    raise ValueError(f"the array {name!r} would grow to {grown} bytes when decompressed")
                with archive.open(members[name]) as member:
                    arrays[name] = _array(member, grown)
            return arrays
    except _DAMAGED as error:
        raise DataError(f"{path} is not a complete npz archive of plain arrays: {reason(error)}") from error


def check_packed(path: Path, files: NDArray[Any], offsets: NDArray[Any], count: int, what: str) -> None:
    """Checks an archive of concatenated files.

    Args:
        path: the archive, for messages.
        files: the bytes of the files, the array ``jpeg``: uint8, ``(bytes,)``.
        offsets: the start of each file and the end of the last one: integers, ``(count + 1,)``.
        count: number of files.
        what: what there is one of for each file, for messages: ``"labels"``.

    Raises:
        DataError: an array has another shape or dtype, or the offsets don't rise from 0 to the end.
    """
    if files.ndim != 1 or files.dtype != np.uint8:
        raise DataError(f"{path}: jpeg is {files.dtype} {files.shape}; it must be a row of uint8")
    if offsets.ndim != 1 or offsets.dtype.kind not in "iu":
        raise DataError(f"{path}: offsets is {offsets.dtype} {offsets.shape}; it must be a row of integers")
    ends = len(offsets) == count + 1 and offsets[0] == 0 and offsets[-1] == len(files)
    if not ends or (offsets[1:] < offsets[:-1]).any():
        raise DataError(
            f"{path}: the offsets must rise from 0 to the {len(files)} bytes of jpeg, in {count} steps for the {count} "
            f"{what}"
        )


def _array(file: BinaryIO | IO[bytes], size: int) -> NDArray[Any]:
    """Reads one array; numpy allocates as much as its header states, so that is compared with the size first."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError("it contains a pickle, which can run code when it is read")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"it states an array of {dtype} {shape}, and has {size} bytes")
    file.seek(0)
    array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return array
