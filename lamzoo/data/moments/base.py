"""The data set class for moments and highlights: queries with spans, and features of video and text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lamzoo.data.feature_arrays import Features
from lamzoo.data.fingerprint import Fingerprint, group
from lamzoo.errors import DataError

#: Clips by which the lengths of features may differ from the video and each other, since extractors round differently.
MARGIN = 2

#: The sum of three annotators' highest grades, and the grade of a clip inside a moment without grades.
HIGHEST_GRADE = 12


@dataclass(frozen=True)
class MomentQuery:
    """A sentence that describes moments of a video.

    Attributes:
        qid: id of the query.
        text: the sentence.
        video: id of the video.
        duration: duration of the video, seconds.
        windows: start and end of its moments, seconds; empty if the split doesn't publish them.
        grades: saliency grades by clip and annotator, ``(clips, annotators)``, 0 for irrelevant clips; None if there
            are none.
        words: the words spoken in the video, each with its start and end, seconds; each can serve as a query.
    """

    qid: int | str
    text: str
    video: str
    duration: float
    windows: tuple[tuple[float, float], ...]
    grades: NDArray[np.float32] | None = None
    words: tuple[tuple[str, float, float], ...] = ()


@dataclass(frozen=True)
class MomentFeatures:
    """Model inputs for one query.

    Attributes:
        video: ``(N, D + 2)``, float32; the last two of a clip are its start and end as fractions of the video.
        text: ``(W, D)``, float32.
    """

    video: Features
    text: Features


class MomentSource(ABC):
    """Source of queries and features: one subclass per layout.

    Attributes:
        split: name of the split in the data.
        clip_seconds: length of a clip.
        queries: the queries.
        vocabulary: the words spoken in the videos, if their times are known.
    """

    split: str
    clip_seconds: float
    queries: Sequence[MomentQuery]
    vocabulary: tuple[str, ...] = ()

    @abstractmethod
    def video(self, index: int) -> Features:
        """Returns the features of the video of a query, ``(N, D)``, N at least 1; a ``DataError`` names the file."""

    @abstractmethod
    def text(self, index: int) -> Features:
        """Returns the features of the words of a query, ``(W, D)``, W at least 1; a ``DataError`` names the file."""

    def frames(self, index: int, count: int) -> Sequence[Image.Image]:
        """Returns ``count`` frames of a query's video, evenly spaced over it, for pictures; empty if there are none."""
        return ()

    def sizes(self) -> Sequence[int]:
        """Returns the sizes of the feature files in bytes, without reading them; empty if unknown."""
        return ()

    def splice(self) -> tuple[MomentQuery, Features, Features]:
        """Returns a query about a new video and the features of both, for :meth:`MomentDataset.splice`."""
        raise DataError("these data can't splice videos, since they have no pieces; set augment.splice to 0")


class MomentDataset:
    """Queries about videos: one split of a data set of moments and highlights.

    Picklable, for data-loader workers. Features are read by :meth:`read`.

    Attributes:
        spec: specification of the data set.
        split: name of the split in the data.
        clip_seconds: length of a clip.
        queries: the queries.
        vocabulary: the words spoken in the videos, if their times are known.

    Args:
        source: source of queries and features.
        spec: name of the data set in messages.

    Raises:
        DataError: there are no queries, one is listed twice, or a window is outside its video.
    """

    def __init__(self, source: MomentSource, spec: str) -> None:
        self.spec, self.split, self.clip_seconds = spec, source.split, source.clip_seconds
        self.queries, self.vocabulary = list(source.queries), source.vocabulary
        self._source = source
        if not self.queries:
            raise DataError(f"{spec} has no queries")
        seen: set[int | str] = set()
        for query in self.queries:
            if query.qid in seen:
                raise DataError(f"the query {query.qid!r} is listed twice in {spec}; remove one of them")
            seen.add(query.qid)
            for start, end in query.windows:
                if not 0 <= start < end <= query.duration + self.clip_seconds:
                    raise DataError(
                        f"the query {query.qid!r} of {spec} has the window [{start:g}, {end:g}] in a video of "
                        f"{query.duration:g} s; its start must be before its end, and both within the video"
                    )

    def __len__(self) -> int:
        return len(self.queries)

    def read(self, index: int) -> MomentFeatures:
        """Returns the features of a query and of its video.

        Raises:
            DataError: a file is missing or damaged, its length differs from the others of its video, or it lacks a row
                for a graded clip; names it.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        video, query = self._source.video(index), self.queries[index]
        if query.grades is not None and abs(len(video) - len(query.grades)) > MARGIN:
            raise DataError(
                f"the features of the video {query.video!r} of {self.spec} have {len(video)} rows, and its "
                f"{query.duration:g} s have {len(query.grades)} clips of {self.clip_seconds:g} s, graded for the query "
                f"{query.qid!r}; extract one row per clip"
            )
        return MomentFeatures(with_positions(video), self._source.text(index))

    def frames(self, index: int, count: int) -> list[Image.Image]:
        """Returns frames of the video of a query, of the same size and evenly spaced over it; empty if unknown.

        Raises:
            DataError: they can't be read; names the file.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        return list(self._source.frames(index, count))

    def splice(self) -> tuple[MomentQuery, MomentFeatures]:
        """Returns a query about a new video, spliced from pieces of several; draws from :mod:`random`.

        Raises:
            DataError: the layout doesn't support splicing; or as for :meth:`read`.
        """
        query, video, text = self._source.splice()
        return query, MomentFeatures(with_positions(video), text)

    def fingerprint(self) -> Fingerprint:
        """Returns digests of the queries, and of the sizes of the features, which are not read."""
        queries = [
            f"{query.qid!r} {query.text!r} {query.video!r} {query.duration} {query.windows} {query.words} "
            f"{None if query.grades is None else query.grades.tolist()}"
            for query in self.queries
        ]
        return Fingerprint({"queries": group(queries), "features": group((), self._source.sizes())})

    def annotations(self) -> list[dict[str, Any]]:
        """Returns the ground truth in the official format, for :func:`lamzoo.evaluation.moment_metrics`.

        Raises:
            DataError: the split doesn't publish its moments.
        """
        hidden = next((query.qid for query in self.queries if not query.windows), None)
        if hidden is not None:
            raise DataError(f"{self.spec} doesn't include the moments of query {hidden!r}; they can't be scored")
        return [_annotation(query) for query in self.queries]


def with_positions(video: Features) -> Features:
    """Appends start and end of each clip, as fractions of the video, to its features: ``(N, D)`` to ``(N, D + 2)``."""
    edges = np.arange(len(video) + 1, dtype=np.float32) / len(video)
    return np.concatenate([video, edges[:-1, None], edges[1:, None]], axis=1)


def _annotation(query: MomentQuery) -> dict[str, Any]:
    found: dict[str, Any] = {
        "qid": query.qid,
        "query": query.text,
        "vid": query.video,
        "duration": query.duration,
        "relevant_windows": [list(window) for window in query.windows],
    }
    if query.grades is not None:
        clips = np.flatnonzero(query.grades.any(axis=1))
        found["relevant_clip_ids"] = clips.tolist()
        found["saliency_scores"] = query.grades[clips].astype(int).tolist()
    return found
