"""Reading of arrays from npy and npz files: without pickles, and no more than the file has."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lamzoo.errors import DataError
from lamzoo.reading import open_regular

_DAMAGED = (
    OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, OverflowError, MemoryError, RecursionError,
    NotImplementedError, RuntimeError, SyntaxError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def read_npy(path: Path) -> NDArray[Any]:
    """Reads the array of an npy file.

    Raises:
        DataError: the file does not exist, is damaged, holds less than its header states, or contains a pickle.
    """
    try:
        with open_regular(path) as file:
            return _array(file, path.stat().st_size)
    except _DAMAGED as error:
        raise DataError(f"{path} is not a complete npy file of a plain array: {_reason(error)}") from error


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
            missing = [name for name in names if name not in members]
            if missing:
                found = ", ".join(members) or "none"
                raise DataError(f"{path} has no array {' and '.join(missing)}; it has {found}")
            arrays: dict[str, NDArray[Any]] = {}
            for name in (*names, *(name for name in optional if name in members)):
                with archive.open(members[name]) as member:
                    arrays[name] = _array(member, members[name].file_size)
            return arrays
    except _DAMAGED as error:
        raise DataError(f"{path} is not a complete npz archive of plain arrays: {_reason(error)}") from error


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


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
