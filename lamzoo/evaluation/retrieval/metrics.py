"""Text-video retrieval metrics from a similarity matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamzoo.errors import ConfigError
from lamzoo.tasks.base import ScoreTable
from lamzoo.tasks.retrieval import DIRECTIONS

#: Headings of the keys of :func:`retrieval_metrics`.
WAYS = DIRECTIONS

_RECALLS = (1, 5, 10, 50)


def retrieval_metrics(
    similarity: NDArray[Any] | Tensor, video_of_text: Sequence[int] | NDArray[Any] | Tensor | None = None
) -> dict[str, dict[str, float]]:
    """Computes recall and rank of text-to-video and video-to-text retrieval.

    Ranks are counted as in CLIP4Clip (arXiv 2104.08860): if several candidates tie with the correct one, each of their
    ranks counts as a result, so constant scores gain nothing. With several captions per video (MSVD), each text is a
    query of its own, and the score of two videos is the highest over the captions.

    Args:
        similarity: ``(texts, videos)``, real numbers, higher is more similar.
        video_of_text: index of each text's video; text ``i`` belongs to video ``i`` by default. Videos without a text
            are candidates in text-to-video retrieval, and are ignored in the other direction.

    Returns:
        ``{"t2v": {...}, "v2t": {...}}``, each with ``R1``, ``R5``, ``R10`` and ``R50`` in percent, and ``MedianR`` and
        ``MeanR``, ranks from 1.

    Raises:
        ConfigError: the matrix has another shape or contains NaN, or an index is out of range.
    """
    scores = _matrix(similarity)
    owners = _owners(scores, video_of_text)
    queried = np.unique(owners)
    best = np.full((len(queried), scores.shape[1]), -np.inf)  # over each video's captions
    np.maximum.at(best, np.searchsorted(queried, owners), scores)
    return {
        "t2v": _metrics(_ranks(scores, owners)),
        "v2t": _metrics(_ranks(best.T[queried], np.arange(len(queried)))),
    }


def two_way_metrics(
    to_video: NDArray[Any] | Tensor,
    to_text: NDArray[Any] | Tensor,
    video_of_text: Sequence[int] | NDArray[Any] | Tensor | None = None,
) -> dict[str, dict[str, float]]:
    """Computes :func:`retrieval_metrics` where each direction has similarities of its own.

    Args:
        to_video: ``(texts, videos)``, of text-to-video retrieval.
        to_text: ``(texts, videos)``, of video-to-text retrieval.
        video_of_text: as for :func:`retrieval_metrics`; errors too.
    """
    return {
        "t2v": retrieval_metrics(to_video, video_of_text)["t2v"],
        "v2t": retrieval_metrics(to_text, video_of_text)["v2t"],
    }


def dual_softmax(similarity: NDArray[Any] | Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Reweights similarities by a softmax over the queries of each candidate (Cheng et al., arXiv 2109.04290).

    It uses all queries at once, which is impossible when queries arrive one by one: report such scores separately.

    Args:
        similarity: ``(texts, videos)``, scaled as for a softmax.

    Returns:
        Two matrices of that shape, for text-to-video and for video-to-text retrieval.

    Raises:
        ConfigError: as of :func:`retrieval_metrics`.
    """
    scores = torch.from_numpy(_matrix(similarity))
    return (scores * scores.softmax(dim=0)).numpy(), (scores * scores.softmax(dim=1)).numpy()


def score_table(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> ScoreTable:
    """Returns metrics of :func:`retrieval_metrics` as a table with one row per split and direction."""
    columns = ("split", "", *(f"R@{k}" for k in _RECALLS), "median rank", "mean rank")
    keys = (*(f"R{k}" for k in _RECALLS), "MedianR", "MeanR")
    rows = tuple(
        (row, heading, *(f"{of_split[way][key]:.1f}" for key in keys))
        for row, of_split in scores.items()
        for way, heading in WAYS.items()
    )
    return ScoreTable(columns, rows, "Recall in percent, ranks from 1.")


def _matrix(similarity: NDArray[Any] | Tensor) -> NDArray[np.float64]:
    if isinstance(similarity, Tensor):
        similarity = similarity.detach().cpu().double().numpy()
    scores = np.asarray(similarity, dtype=np.float64)
    if scores.ndim != 2 or not scores.size:
        raise ConfigError(f"The similarity has shape {scores.shape}; it must be (texts, videos).")
    if np.isnan(scores).any():
        text, video = np.argwhere(np.isnan(scores))[0]
        raise ConfigError(f"The similarity of text {text} and video {video} is NaN; the model has diverged.")
    return scores


def _owners(
    scores: NDArray[np.float64], video_of_text: Sequence[int] | NDArray[Any] | Tensor | None
) -> NDArray[np.int64]:
    texts, videos = scores.shape
    if video_of_text is None:
        if texts != videos:
            raise ConfigError(
                f"There are {texts} texts and {videos} videos; give the video of each text in video_of_text."
            )
        return np.arange(texts)
    owners = np.asarray(video_of_text)
    if owners.shape != (texts,) or owners.dtype.kind not in "iu":
        raise ConfigError(f"video_of_text is {owners.dtype} {owners.shape}; it must be {texts} integers, one per text.")
    if owners.min() < 0 or owners.max() >= videos:
        wrong = owners[(owners < 0) | (owners >= videos)][0]
        raise ConfigError(f"video_of_text has the index {wrong}; it must be from 0 to {videos - 1}.")
    return owners.astype(np.int64)


def _ranks(scores: NDArray[np.float64], right: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the ranks, from 0, of the correct column of each row, with every tied rank, concatenated over rows."""
    own = scores[np.arange(len(scores)), right][:, None]
    better, equal = (scores > own).sum(axis=1), (scores == own).sum(axis=1)
    first = np.repeat(better, equal)
    within = np.arange(equal.sum()) - np.repeat(equal.cumsum() - equal, equal)
    return first + within


def _metrics(ranks: NDArray[np.int64]) -> dict[str, float]:
    recalls = {f"R{k}": 100 * float((ranks < k).mean()) for k in _RECALLS}
    return recalls | {"MedianR": float(np.median(ranks)) + 1, "MeanR": float(ranks.mean()) + 1}
