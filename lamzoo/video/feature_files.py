"""Files of features: written whole or not at all, and known by what made them; knows neither models nor videos."""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lamzoo.data.moments.base import Features
from lamzoo.data.moments.feature_folder import read_features
from lamzoo.errors import DataError
from lamzoo.files import atomic_files

_logger = logging.getLogger(__name__)

_ORIGIN = "lamzoo"  # the array, beside that of the features, that says what made them; other readers pass it over
_WAY_OUT = "name another folder (--out), remove the file, or make all anew with --force (force=True)"

Origin = Mapping[str, Any]


def write_features(path: Path, key: str, features: Features, origin: Origin) -> None:
    """Writes an npz file, its folder included, in one step.

    Args:
        path: the file.
        key: name of the array.
        features: ``(N, D)``, float32.
        origin: what made them: values that JSON knows.

    Raises:
        DataError: it can't be written there.
    """
    arrays = {key: features, _ORIGIN: np.array(json.dumps(origin, sort_keys=True))}
    with atomic_files(DataError) as stage, stage(path).open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # mypy takes the arrays for allow_pickle


def is_there(path: Path, key: str, width: int, origin: Origin) -> bool:
    """Says whether a file of features is there and whole, so that it need not be made.

    One that is damaged counts as missing, which is logged; one that doesn't say what made it, as the published ones,
    is taken for what it should be.

    Args:
        path: the file.
        key: name of the array.
        width: of the features that would be made.
        origin: what would make them.

    Raises:
        DataError: it was made of something else or by something else, and must not be mixed with what would be made.
    """
    if not path.exists():
        return False
    try:
        features = read_features(path, key)
        there = _origin(path)
    except DataError as error:
        _logger.warning("made again: %s", error)
        return False
    if there is not None:
        for name, value in origin.items():
            if there.get(name) != value:
                raise DataError(f"{path} was made {_difference(name, there.get(name), value)}; {_WAY_OUT}")
    elif features.shape[1] != width:
        raise DataError(f"{path} has {features.shape[1]} features, and the model gives {width}; {_WAY_OUT}")
    return True


def _origin(path: Path) -> dict[str, Any] | None:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return json.loads(str(archive[_ORIGIN])) if _ORIGIN in archive else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no whole npz file: {error}") from error


def _difference(name: str, there: Any, here: Any) -> str:
    match name:
        case "model":
            return f"with {there}, not {here}"
        case "clip_seconds":
            return f"of clips of {there:g} s, not {here:g} s"
        case "query":
            return f"for the query {there!r}, not {here!r}"
        case "bytes":
            return "of another video of this name"
    return f"with other {name}"
