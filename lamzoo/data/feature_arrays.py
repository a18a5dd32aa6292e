"""Arrays of features, one row per clip, frame or word: reading with provenance, checks and normalisation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lamzoo.data.arrays import read_npz
from lamzoo.data.paths import file_exists
from lamzoo.errors import DataError
from lamzoo.reading import parse_json

Features: TypeAlias = NDArray[np.float32]

ORIGIN = "lamzoo"  # the array with the provenance of the features, JSON; other readers ignore it


def read_features(path: Path, key: str) -> Features:
    """Reads one array of an npz file.

    Args:
        path: the file.
        key: name of the array.

    Returns:
        ``(N, D)``, float32, N at least 1.

    Raises:
        DataError: the file does not exist or is damaged, or the array has another shape or dtype; names it.
    """
    return _read(path, key)[0]


def read_features_and_origin(path: Path, key: str) -> tuple[Features, dict[str, Any] | None]:
    """Reads one array of an npz file, and the provenance that ``lamzoo extract-features`` adds; None without it.

    Arguments and errors as of :func:`read_features`; also raises a :class:`DataError` if the provenance is invalid.
    """
    features, arrays = _read(path, key, (ORIGIN,))
    if ORIGIN not in arrays:
        return features, None
    try:
        origin = parse_json(str(arrays[ORIGIN]), file_names=True)
    except ValueError as error:
        raise DataError(f"{path} has invalid provenance ({error}); extract it again") from error
    if not isinstance(origin, dict):
        raise DataError(f"{path} has invalid provenance (it is not a JSON object); extract it again")
    return features, origin


def check_rows(rows: NDArray[Any], where: str, what: str = "frame") -> Features:
    """Returns feature rows as float32.

    Args:
        rows: ``(N, D)``, of any float dtype, N at least 1.
        where: the place of the array, for messages.
        what: what there is one row of, for messages.

    Raises:
        DataError: the array has another shape or dtype, or values that are not finite; names ``where`` it is.
    """
    if rows.ndim != 2 or not len(rows) or rows.dtype.kind != "f":
        raise DataError(f"{where} is {rows.dtype} {rows.shape}; it must be floats, one row per {what}")
    if not np.isfinite(rows).all():
        raise DataError(f"{where} has values that are not finite; extract it again")
    return rows.astype(np.float32)


def unit(features: Features) -> Features:
    """Normalises rows to length 1; rows of zeros are returned unchanged."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-5)


def _read(path: Path, key: str, optional: tuple[str, ...] = ()) -> tuple[Features, Mapping[str, NDArray[Any]]]:
    """Returns the features, and all arrays that were read."""
    if not file_exists(path):
        raise DataError(f"{path.parent} has no {path.name}; extract it, or remove the query")
    arrays = read_npz(path, [key], optional)
    return check_rows(arrays[key], f"{path}: {key}", "clip or word"), arrays
