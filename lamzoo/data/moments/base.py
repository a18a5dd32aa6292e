"""The one data set class for moments and highlights: queries with their spans, and features of video and text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lamzoo.errors import DataError

Features: TypeAlias = NDArray[np.float32]

#: Clips by which features may differ from their video, and from each other: each extractor rounds its end differently.
MARGIN = 2

#: The sum of three annotators' highest grades, and the grade of a clip inside a moment where nobody graded it.
HIGHEST_GRADE = 12


@dataclass(frozen=True)
class MomentQuery:
    """A sentence that is looked for in a video.

    Attributes:
        qid: what the data calls the query.
        text: the sentence.
        video: id of the video.
        duration: of the video, seconds.
        windows: start and end of its moments, seconds; none where the split keeps them to itself.
        grades: of each clip, by each annotator, ``(clips, annotators)``, 0 where it doesn't fit; None where nobody gave
            any.
        words: all that are known to be said in the video, each with its start and end, seconds; each could be a query.
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
    """What a model reads of one query.

    Attributes:
        video: ``(N, D + 2)``, float32; the last two of a clip are its start and end as shares of the video.
        text: ``(W, D)``, float32.
    """

    video: Features
    text: Features


class MomentSource(ABC):
    """Where queries and features come from: one subclass per layout.

    Attributes:
        split: the split's own name.
        clip_seconds: length of a clip.
        queries: what is asked.
        vocabulary: the words that are said in the videos, where the data know when.
    """

    split: str
    clip_seconds: float
    queries: Sequence[MomentQuery]
    vocabulary: tuple[str, ...] = ()

    @abstractmethod
    def video(self, index: int) -> Features:
        """Returns the features of a query's video, ``(N, D)``, N at least 1; a ``DataError`` names the file."""

    @abstractmethod
    def text(self, index: int) -> Features:
        """Returns the features of a query's words, ``(W, D)``, W at least 1; a ``DataError`` names the file."""

    def splice(self) -> tuple[MomentQuery, Features, Features]:
        """Returns a query about a new video and the features of both; what :meth:`MomentDataset.splice` asks for."""
        raise DataError(f"{type(self).__name__} can't splice videos, since it has no pieces; set augment.splice to 0")


class MomentDataset:
    """Queries about videos: a split of a data set of moments and highlights.

    No features are read before :meth:`read`, and it can be pickled for the workers of a loader.

    Attributes:
        spec: what the data set was created from.
        split: the split's own name.
        clip_seconds: length of a clip.
        queries: what is asked.
        vocabulary: the words that are said in the videos, where the data know when.

    Args:
        source: where queries and features come from.
        spec: how to call the whole in an error.

    Raises:
        DataError: there is no query, one is listed twice, or a window lies outside of its video.
    """

    def __init__(self, source: MomentSource, spec: str) -> None:
        self.spec, self.split, self.clip_seconds = spec, source.split, source.clip_seconds
        self.queries, self.vocabulary = list(source.queries), source.vocabulary
        self._source = source
        if not self.queries:
            raise DataError(f"{spec} holds no query")
        seen: set[int | str] = set()
        for query in self.queries:
            if query.qid in seen:
                raise DataError(f"the query {query.qid!r} is listed twice in {spec}; remove one of them")
            seen.add(query.qid)
            for start, end in query.windows:
                if not 0 <= start < end <= query.duration + self.clip_seconds:
                    raise DataError(
                        f"the query {query.qid!r} of {spec} has the window [{start:g}, {end:g}] in a video of "
                        f"{query.duration:g} s; its start must come before its end, and both lie in the video"
                    )

    def __len__(self) -> int:
        return len(self.queries)

    def read(self, index: int) -> MomentFeatures:
        """Returns the features of a query and of its video.

        Raises:
            DataError: a file is missing, damaged, of another length than the others of its video, or, where clips are
                graded, without a row for each; names it.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        video, query = self._source.video(index), self.queries[index]
        if query.grades is not None and abs(len(video) - len(query.grades)) > MARGIN:
            raise DataError(
                f"the features of the video {query.video!r} of {self.spec} have {len(video)} rows, and its "
                f"{query.duration:g} s have {len(query.grades)} clips of {self.clip_seconds:g} s, graded for the query "
                f"{query.qid!r}; extract one row a clip"
            )
        return MomentFeatures(with_positions(video), self._source.text(index))

    def splice(self) -> tuple[MomentQuery, MomentFeatures]:
        """Returns a query about a video that is put together of pieces of several, drawn from :mod:`random`.

        Raises:
            DataError: the data know of no pieces; or as :meth:`read`.
        """
        query, video, text = self._source.splice()
        return query, MomentFeatures(with_positions(video), text)

    def annotations(self) -> list[dict[str, Any]]:
        """Returns the truth in the official form, for :func:`lamzoo.evaluation.moment_metrics`.

        Raises:
            DataError: the split keeps its moments to itself.
        """
        hidden = next((query.qid for query in self.queries if not query.windows), None)
        if hidden is not None:
            raise DataError(f"{self.spec} says nothing of the moments of query {hidden!r}; they can't be scored")
        return [_annotation(query) for query in self.queries]


def with_positions(video: Features) -> Features:
    """Appends each clip's start and end, as shares of the video, to its features: ``(N, D)`` to ``(N, D + 2)``."""
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
