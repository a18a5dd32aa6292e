"""Feature folders in the format of QVHighlights' models: one npz file per video or query."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lamzoo.data.feature_arrays import Features, read_features, unit
from lamzoo.data.fingerprint import file_sizes
from lamzoo.data.moments.base import MARGIN
from lamzoo.data.paths import existing_file, folder_exists
from lamzoo.errors import DataError

VIDEO_FOLDERS = ("slowfast_features", "clip_features")
TEXT_FOLDER = "clip_text_features"
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
