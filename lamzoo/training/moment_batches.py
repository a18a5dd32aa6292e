"""Batches of queries about videos for training: features, and what is true of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lamzoo.data.grid import said_at
from lamzoo.data.moments import MomentDataset, MomentFeatures, MomentQuery
from lamzoo.evaluation.finding import pad_features

HIGHEST_GRADE = 12  # three annotators' fours: what a clip inside a moment is worth where nobody graded it
_PAIRS = 2


@dataclass(frozen=True)
class Sample:
    """A query with its features, and what is true of it.

    Attributes:
        query: what is asked.
        features: of the query and its video.
        spans: ``(moments, 2)``, centre and width as shares of the video.
        better: int64 ``(2,)``, clips that fit better than those of ``worse``.
        worse: int64 ``(2,)``.
        grades: ``(N,)``.
        words: int64 ``(N,)``, the word that is said in each clip, 0 for none; None where the data don't know.
    """

    query: MomentQuery
    features: MomentFeatures
    spans: Tensor
    better: Tensor
    worse: Tensor
    grades: Tensor
    words: Tensor | None = None


class Samples(Dataset[Sample]):
    """The queries of a data set with what is true of them.

    Args:
        dataset: of which the moments are known.
        splice: probability, drawn from :mod:`random`, that a query is about a video that is put together of pieces.
    """

    def __init__(self, dataset: MomentDataset, splice: float = 0.0) -> None:
        self._dataset, self._splice = dataset, splice
        self._numbers = {word: number for number, word in enumerate(dataset.vocabulary, start=1)}

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:
        if self._splice and random.random() < self._splice:
            query, features = self._dataset.splice()
        else:
            query, features = self._dataset.queries[index], self._dataset.read(index)
        windows = np.array(query.windows).clip(0, query.duration) / query.duration
        spans = np.stack([windows.mean(axis=1), windows[:, 1] - windows[:, 0]], axis=1).astype(np.float32)
        grades = clip_grades(query, len(features.video))
        better, worse = _draw_pairs(grades)
        tensor, words = torch.from_numpy, None
        if self._numbers:
            words = tensor(said_at(query.words, _middles(query, len(grades)), self._numbers.__getitem__))
        return Sample(query, features, tensor(spans), tensor(better), tensor(worse), tensor(grades), words)


def clip_grades(query: MomentQuery, count: int) -> NDArray[np.float32]:
    """Returns how well each clip fits a query, ``(count,)``, 0 where it doesn't.

    These are the annotators' grades summed, 0 to 12 in QVHighlights; where there are none, 12 for the clips whose
    middle lies in a moment, and for the one nearest to the middle of a moment shorter than that.
    """
    if query.grades is not None:
        total = query.grades.sum(axis=1)[:count]
        return np.pad(total, (0, count - len(total))).astype(np.float32)
    middles = _middles(query, count)
    grades = np.zeros(count, dtype=np.float32)
    for start, end in query.windows:
        inside = (middles >= start) & (middles < end)
        inside[np.abs(middles - (start + end) / 2).argmin()] = True
        grades[inside] = HIGHEST_GRADE
    return grades


def _draw_pairs(grades: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draws clips that fit with ones that don't, and the best graded with the worst (arXiv 2107.09609, section 4.2)."""
    fits, rest = np.flatnonzero(grades > 0), np.flatnonzero(grades == 0)
    if not len(fits) or not len(rest):
        fits = rest = np.arange(len(grades))
    best, worst = fits[grades[fits] == grades[fits].max()], fits[grades[fits] == grades[fits].min()]
    if grades[best[0]] == grades[worst[0]]:
        best, worst = fits, rest
    better = [random.choice(fits), random.choice(best)]
    worse = [random.choice(rest), random.choice(worst)]
    return np.array(better, dtype=np.int64), np.array(worse, dtype=np.int64)


def collate(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Puts samples into one batch of tensors, padded: what a loader moves between devices.

    Returns:
        ``video`` and ``text`` with their masks, as :func:`pad_features`; ``spans (B, M, 2)`` with ``moments (B,)``, how
        many of them there are; ``better`` and ``worse (B, 2)``; ``grades (B, N)``; ``unrelated (B,)``, for each video
        the sample whose sentence does not fit it; and where the data know them ``words (B, N)``, -100 behind a video's
        end.
    """
    video, text, video_mask, text_mask = pad_features([sample.features for sample in samples])

    def padded(name: str, behind: float = 0.0) -> Tensor:
        rows = [getattr(sample, name) for sample in samples]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=behind)

    batch = {
        "video": video, "text": text, "video_mask": video_mask, "text_mask": text_mask, "spans": padded("spans"),
        "moments": torch.tensor([len(sample.spans) for sample in samples]), "better": padded("better"),
        "worse": padded("worse"), "grades": padded("grades"),
        "unrelated": _unrelated([sample.query for sample in samples]),
    }  # fmt: skip
    if samples[0].words is not None:  # all of one data set
        batch["words"] = padded("words", -100)
    return batch


def _middles(query: MomentQuery, count: int) -> NDArray[np.float64]:
    return (np.arange(count) + 0.5) * query.duration / count


def _unrelated(queries: Sequence[MomentQuery]) -> Tensor:
    """Returns, for each query's video, the next sample whose sentence is not known to fit it; the next if all do."""
    count, found = len(queries), []
    for number, query in enumerate(queries):
        behind = [(number + step) % count for step in range(1, count)] or [number]
        fits = {query.text, *(word for word, *_ in query.words)}
        found.append(next((other for other in behind if queries[other].text not in fits), behind[0]))
    return torch.tensor(found)
