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
    """A query with its features and targets.

    Attributes:
        query: the query.
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
    """The queries of a data set with their targets.

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
        many of them there are; ``better`` and ``worse (B, 2)``; ``grades (B, N)``; ``sentence (B,)`` and ``fits (B,
        K)``, int64, numbers of the query's sentence and of all that are known to fit the video, the same for the same
        sentence; and where the data know them ``words (B, N)``, -100 behind a video's end.
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
    if samples[0].words is not None:  # all of one data set
        batch["words"] = padded("words", IGNORED)
    return batch


def _middles(query: MomentQuery, count: int) -> NDArray[np.float64]:
    return (np.arange(count) + 0.5) * query.duration / count


def unrelated(sentence: Tensor, fits: Tensor) -> Tensor:
    """Chooses for each video the next sample whose sentence is not known to fit it; the next one if all do.

    Args:
        sentence: int64 ``(B,)``, as of :func:`collate`.
        fits: int64 ``(B, K)``, likewise.

    Returns:
        int64 ``(B,)``, which sample; its own where there is no other.
    """
    count = len(sentence)
    numbers = torch.arange(count, device=sentence.device)
    behind = (numbers[:, None] + 1 + numbers[: max(1, count - 1)]) % count
    strange = (sentence[behind].unsqueeze(-1) != fits.unsqueeze(1)).all(dim=-1)
    return behind.gather(1, strange.int().argmax(dim=1, keepdim=True)).squeeze(1)


def with_unrelated(accelerator: Accelerator, batches: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Returns batches with a sentence for each video that does not fit it, from anywhere in the global batch.

    Args:
        accelerator: of all processes, each of which calls this.
        batches: of this process, equally large, as of :func:`collate`.

    Returns:
        The same with ``unrelated (B,)``, int64, rows of ``text``, behind which other sentences stand where they may be
        of another batch.
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
    """Returns the rows of the batches of all processes in the order of the global batch, padded to one length."""
    if parts[0].ndim > 1:
        longest = torch.tensor([max(part.shape[1] for part in parts)], device=parts[0].device)
        length = int(accelerator.gather(longest).max())
        parts = [_longer(part, length) for part in parts]
    rows = accelerator.gather(torch.cat(list(parts)))
    rows = rows.unflatten(0, (accelerator.num_processes, len(parts), -1))
    return rows.transpose(0, 1).flatten(0, 2)  # each batch is spread over the processes


def _longer(rows: Tensor, length: int) -> Tensor:
    """Pads ``(B, N, ...)`` with zeros to ``(B, length, ...)``."""
    return torch.cat([rows, rows.new_zeros(len(rows), length - rows.shape[1], *rows.shape[2:])], dim=1)


def _number(sentence: str) -> int:
    """Returns a number of 64 bits that is the same in every process, and for no two sentences in practice."""
    return int.from_bytes(hashlib.blake2b(sentence.encode(), digest_size=8).digest(), "big", signed=True)


def _fitting(query: MomentQuery) -> Tensor:
    """Returns the numbers of the sentences that fit a query's video, as far as it is known: its own, and words."""
    return torch.tensor([_number(text) for text in {query.text, *(word for word, *_ in query.words)}])
