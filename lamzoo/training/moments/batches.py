"""Training batches of queries about videos: features and targets."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lamzoo.data.grid_tokens import IGNORED, said_at
from lamzoo.data.moments import MomentDataset, MomentFeatures, MomentQuery
from lamzoo.data.moments.base import HIGHEST_GRADE
from lamzoo.evaluation.moments.evaluate import pad_features

_PAIRS = 2


@dataclass(frozen=True)
class Sample:
    """A query with features and targets.

    Attributes:
        query: the query.
        features: features of the query and its video.
        spans: ``(moments, 2)``, centre and width as fractions of the video.
        better: int64 ``(2,)``, clips that match better than those in ``worse``.
        worse: int64 ``(2,)``.
        grades: ``(N,)``.
        words: int64 ``(N,)``, the word spoken in each clip, 0 for none; None if unknown.
    """

    query: MomentQuery
    features: MomentFeatures
    spans: Tensor
    better: Tensor
    worse: Tensor
    grades: Tensor
    words: Tensor | None = None


class Samples(Dataset[Sample]):
    """The queries of a data set with their targets.

    Args:
        dataset: a split with annotated moments.
        splice: probability, drawn from :mod:`random`, that a query refers to a video spliced from pieces.
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
    """Returns the relevance of each clip for a query, ``(count,)``, 0 for irrelevant clips.

    It is the sum of the annotators' grades, 0 to 12 in QVHighlights; without grades, 12 for clips whose centre lies in
    a moment, and for the clip nearest to the centre of a moment that contains none.
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
    """Samples pairs of relevant and irrelevant, and of best and worst clips (arXiv 2107.09609, section 4.2)."""
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
    """Collates samples into one padded batch of tensors, which a loader can move between devices.

    Returns:
        ``video`` and ``text`` with their masks, as :func:`pad_features`; ``spans (B, M, 2)`` with their number
        ``moments (B,)``; ``better`` and ``worse (B, 2)``; ``grades (B, N)``; ``sentence (B,)`` and ``fits (B, K)``,
        int64, identifiers of the query's sentence and of all sentences known to match the video, equal for equal
        sentences; and if known ``words (B, N)``, -100 at padding.
    """
    video, text, video_mask, text_mask = pad_features([sample.features for sample in samples])

    def padded(name: str, behind: float = 0.0) -> Tensor:
        rows = [getattr(sample, name) for sample in samples]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=behind)

    batch = {
        "video": video, "text": text, "video_mask": video_mask, "text_mask": text_mask, "spans": padded("spans"),
        "moments": torch.tensor([len(sample.spans) for sample in samples]), "better": padded("better"),
        "worse": padded("worse"), "grades": padded("grades"),
        "sentence": torch.tensor([_number(sample.query.text) for sample in samples]),
        "fits": torch.nn.utils.rnn.pad_sequence([_fitting(sample.query) for sample in samples], batch_first=True),
    }  # fmt: skip
    if samples[0].words is not None:  # all samples are from one data set
        batch["words"] = padded("words", IGNORED)
    return batch


def _middles(query: MomentQuery, count: int) -> NDArray[np.float64]:
    return (np.arange(count) + 0.5) * query.duration / count


def unrelated(sentence: Tensor, fits: Tensor) -> Tensor:
    """Selects for each video the next sample whose sentence is not known to match it; the next one if all do.

    Args:
        sentence: int64 ``(B,)``, as of :func:`collate`.
        fits: int64 ``(B, K)``, likewise.

    Returns:
        The selected samples, int64 ``(B,)``; a sample itself if there is no other.
    """
    count = len(sentence)
    numbers = torch.arange(count, device=sentence.device)
    behind = (numbers[:, None] + 1 + numbers[: max(1, count - 1)]) % count
    strange = (sentence[behind].unsqueeze(-1) != fits.unsqueeze(1)).all(dim=-1)
    return behind.gather(1, strange.int().argmax(dim=1, keepdim=True)).squeeze(1)


def with_unrelated(accelerator: Accelerator, batches: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Adds to each video a sentence that does not match it, from anywhere in the global batch.

    Args:
        accelerator: the accelerator; every process must call this.
        batches: batches of this process, of equal size, as of :func:`collate`.

    Returns:
        The batches with ``unrelated (B,)``, int64, rows of ``text``, to which sentences of other batches are appended
        if needed.
    """
    if accelerator.num_processes * len(batches) == 1:
        return [batch | {"unrelated": unrelated(batch["sentence"], batch["fits"])} for batch in batches]
    every = {name: _everywhere(accelerator, [batch[name] for batch in batches]) for name in _SENTENCES}
    chosen = unrelated(every["sentence"], every["fits"]).unflatten(0, (len(batches), accelerator.num_processes, -1))
    found = []
    for batch, rows in zip(batches, chosen[:, accelerator.process_index], strict=True):
        behind = {name: _longer(batch[name], every[name].shape[1]) for name in ("text", "text_mask")}
        behind = {name: torch.cat([own, every[name][rows]]) for name, own in behind.items()}
        found.append(batch | behind | {"unrelated": torch.arange(len(rows), 2 * len(rows), device=rows.device)})
    return found


_SENTENCES = ("sentence", "fits", "text", "text_mask")


def _everywhere(accelerator: Accelerator, parts: Sequence[Tensor]) -> Tensor:
    """Gathers rows of the batches of all processes in the order of the global batch, padded to one length."""
    if parts[0].ndim > 1:
        longest = torch.tensor([max(part.shape[1] for part in parts)], device=parts[0].device)
        length = int(accelerator.gather(longest).max())
        parts = [_longer(part, length) for part in parts]
    rows = accelerator.gather(torch.cat(list(parts)))
    rows = rows.unflatten(0, (accelerator.num_processes, len(parts), -1))
    return rows.transpose(0, 1).flatten(0, 2)  # each batch is sharded over the processes


def _longer(rows: Tensor, length: int) -> Tensor:
    """Pads ``(B, N, ...)`` with zeros to ``(B, length, ...)``."""
    return torch.cat([rows, rows.new_zeros(len(rows), length - rows.shape[1], *rows.shape[2:])], dim=1)


def _number(sentence: str) -> int:
    """Returns a 64-bit hash of a sentence that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(sentence.encode(), digest_size=8).digest(), "big", signed=True)


def _fitting(query: MomentQuery) -> Tensor:
    """Returns the hashes of the sentences known to match a query's video: its own sentence, and words."""
    return torch.tensor([_number(text) for text in {query.text, *(word for word, *_ in query.words)}])
