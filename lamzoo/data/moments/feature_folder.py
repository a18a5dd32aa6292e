"""Feature folders in the format of QVHighlights' models: one npz file per video or query."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lamzoo.data.arrays import read_npz
from lamzoo.data.fingerprint import file_sizes
from lamzoo.data.moments.base import MARGIN, Features
from lamzoo.data.paths import existing_file, file_exists, folder_exists
from lamzoo.errors import DataError
from lamzoo.reading import parse_json

VIDEO_FOLDERS = ("slowfast_features", "clip_features")
TEXT_FOLDER = "clip_text_features"
ORIGIN = "lamzoo"  # the array with the provenance of the features, JSON; other readers ignore it
_WHERE = ("features", "moment_detr_features", ".")


class FeatureFolder:
    """``clip_features``, ``slowfast_features`` (optional) and ``clip_text_features`` below one folder.

    Args:
        root: the folder, or the parent of ``features`` or ``moment_detr_features``.

    Raises:
        DataError: the folder has no features of videos, or none of texts.
    """

    def __init__(self, root: Path) -> None:
        places = [root / name for name in _WHERE]
        self.root = next((place for place in places if folder_exists(place / "clip_features")), None) or root
        self._videos = [self.root / name for name in VIDEO_FOLDERS if folder_exists(self.root / name)]
        self._texts = self.root / TEXT_FOLDER
        for folder in (self.root / "clip_features", self._texts):
            if not folder_exists(folder):
                raise DataError(
                    f"{root} has no folder {folder.name}; compute it with `lamzoo extract-features`, or download the "
                    "published features from the repository of Moment-DETR"
                )

    def video(self, video: str) -> Features:
        """Returns the concatenated features of the clips of a video, each normalised to length 1, ``(N, D)``."""
        paths = [_file(folder, video) for folder in self._videos]
        parts = [read_features(path, "features") for path in paths]
        lengths = [len(part) for part in parts]
        if max(lengths) - min(lengths) > MARGIN:
            longest, shortest = (paths[lengths.index(end(lengths))] for end in (max, min))
            raise DataError(
                f"{longest} has {max(lengths)} clips and {shortest} has {min(lengths)}; extract both from one video"
            )
        return np.concatenate([unit(part[: min(lengths)]) for part in parts], axis=1)

    def text(self, qid: int | str) -> Features:
        """Returns the features of the words of a query, each normalised to length 1, ``(W, D)``."""
        return unit(read_features(_file(self._texts, f"qid{qid}"), "last_hidden_state"))

    def sizes(self, videos: Sequence[str], qids: Sequence[int | str]) -> list[int]:
        """Returns the sizes of the files of videos and queries in bytes, in order; -1 for missing ones."""
        of_videos = [_file(folder, video) for folder in self._videos for video in dict.fromkeys(videos)]
        return file_sizes([*of_videos, *(_file(self._texts, f"qid{qid}") for qid in qids)])


def _file(folder: Path, stem: str) -> Path:
    return existing_file(folder, f"{stem}.npz") or folder / f"{stem}.npz"


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
    if not file_exists(path):
        raise DataError(f"{path.parent} has no {path.name}; extract it, or remove the query")
    features = read_npz(path, [key])[key]
    if features.ndim != 2 or not len(features) or features.dtype.kind != "f":
        raise DataError(
            f"{path}: {key} is {features.dtype} {features.shape}; it must be floats, one row per clip or word"
        )
    if not np.isfinite(features).all():
        raise DataError(f"{path}: {key} has values that are not finite; extract it again")
    return features.astype(np.float32)


def read_origin(path: Path) -> dict[str, Any] | None:
    """Reads the provenance that ``lamzoo extract-features`` adds to an npz file; None for a file of other origin.

    Raises:
        DataError: the file does not exist or is damaged.
    """
    found = read_npz(path, (), optional=[ORIGIN])
    if not found:
        return None
    try:
        origin = parse_json(str(found[ORIGIN]), file_names=True)
    except ValueError as error:
        raise DataError(f"{path} has invalid provenance ({error}); extract it again") from error
    if not isinstance(origin, dict):
        raise DataError(f"{path} has invalid provenance (it is not a JSON object); extract it again")
    return origin


def unit(features: Features) -> Features:
    """Normalises rows to length 1; rows of zeros are returned unchanged."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-5)
