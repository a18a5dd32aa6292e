"""Feature files: atomic writing, and a check of their provenance before they are reused."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lamzoo.data.feature_arrays import ORIGIN, Features, read_features_and_origin
from lamzoo.errors import DataError
from lamzoo.evaluation.resume import origin_difference
from lamzoo.files import atomic_files
from lamzoo.reading import to_json

_logger = logging.getLogger(__name__)

_WAY_OUT = "choose another folder (--out), remove the file, or compute all files again with --force (force=True)"

Origin = Mapping[str, Any]


def write_features(path: Path, key: str, features: Features, origin: Origin) -> None:
    """Writes an npz file atomically; creates its folder if missing.

    Args:
        path: the file.
        key: name of the array.
        features: ``(N, D)``, float32.
        origin: provenance of the features, as JSON values.

    Raises:
        DataError: the file can't be written.
    """
    arrays = {key: features, ORIGIN: np.array(to_json(origin, sort_keys=True))}
    with atomic_files(DataError) as stage, stage(path).open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # mypy takes the arrays for allow_pickle


def is_there(path: Path, key: str, width: int, origin: Origin) -> bool:
    """Returns whether a complete feature file exists and can be reused.

    A damaged file counts as missing, with a warning. A file without provenance, such as the published ones, is assumed
    to match.

    Args:
        path: the file.
        key: name of the array.
        width: expected width of the features.
        origin: expected provenance.

    Raises:
        DataError: the provenance or the width differs; such features must not be mixed.
    """
    if not path.exists():
        return False
    try:
        features, there = read_features_and_origin(path, key)
    except DataError as error:
        _logger.warning("computed again: %s", error)
        return False
    if there is not None:
        if (name := origin_difference(there, origin)) is not None:
            raise DataError(f"{path} was made {_difference(name, there.get(name), origin[name])}; {_WAY_OUT}")
    elif features.shape[1] != width:
        raise DataError(f"{path} has {features.shape[1]} features, and those of the model are {width}; {_WAY_OUT}")
    return True


def _difference(name: str, there: Any, here: Any) -> str:
    match name:
        case "model":
            return f"with {there}, not {here}"
        case "clip_seconds":
            before = f"{there:g}" if isinstance(there, (int, float)) else repr(there)
            return f"of clips of {before} s, not {here:g} s"
        case "query":
            return f"for the query {there!r}, not {here!r}"
        case "bytes":
            return "of another video of this name"
        case "masks":
            return "with masks of another LamConfig"
        case "reduction":
            return "with another token reduction"
    return f"with other {name}"
