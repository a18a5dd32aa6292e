"""Predictions of moment models (windows in seconds, saliencies) and their scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lamzoo.data import plain_worker_errors
from lamzoo.data.moments import MomentDataset, MomentFeatures
from lamzoo.errors import UnsupportedHostError
from lamzoo.evaluation.moments.metrics import moment_metrics
from lamzoo.evaluation.runtime import Items, Precision, check_batches, check_finite, inference, resolve_device
from lamzoo.tasks.base import EvalRequest, Evaluation

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class MomentPrediction:
    """A model's prediction for one query.

    Attributes:
        windows: ``(Q, 3)``, float64: start and end in seconds and score from 0 to 1, sorted by score, best first.
        saliency: ``(N,)``, float32, one per clip; higher for clips that match the query better.
    """

    windows: NDArray[np.float64]
    saliency: NDArray[np.float32]


@dataclass(frozen=True)
class MomentResult:
    """Scores of a moment model.

    Attributes:
        metrics: as returned by :func:`moment_metrics`.
        predictions: the submission, as returned by :func:`submission`.
        queries: number of queries.
        seconds: total time, including reading.
    """

    metrics: dict[str, Any]
    predictions: list[dict[str, Any]]
    queries: int
    seconds: float


def find_moments(
    model: nn.Module, features: Sequence[MomentFeatures], durations: Sequence[float]
) -> list[MomentPrediction]:
    """Predicts the moments of a batch of queries, without gradients.

    Args:
        model: a model of the family ``lam_moment_detr``, in evaluation mode, on its device.
        features: features of each query and its video.
        durations: durations of the videos in seconds.

    Raises:
        ConfigError: a prediction is not finite.
        UnsupportedHostError: the model does not predict moments, or expects features of another width.
    """
    check_features(model, features[0])
    device = next(model.parameters()).device
    with torch.inference_mode():
        video, text, video_mask, text_mask = (tensor.to(device) for tensor in pad_features(features))
        found = model(video, text, video_mask, text_mask)
        windows, saliency = found.windows().double().cpu(), found.saliency.float().cpu()
    check_finite(windows)
    check_finite(saliency[video_mask.cpu()])
    findings = []
    for row, (of_sample, duration) in enumerate(zip(features, durations, strict=True)):
        seconds = windows[row] * torch.tensor([duration, duration, 1.0], dtype=torch.float64)
        findings.append(MomentPrediction(seconds.numpy(), saliency[row, : len(of_sample.video)].numpy()))
    return findings


def evaluate_moments(
    model: nn.Module,
    dataset: MomentDataset,
    *,
    batch_size: int = 32,
    device: str | torch.device = "auto",
    precision: Precision = "float32",
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> MomentResult:
    """Scores a model of the family ``lam_moment_detr`` on a split of queries.

    Args:
        model: the model; it stays on the device.
        dataset: the split; its moments must be annotated.
        batch_size: queries per batch.
        device: a torch device, or ``"auto"``.
        precision: autocast precision.
        workers: worker processes that read features; 0 reads in the main process.
        progress: called with the number of queries answered and the total.

    Returns:
        The scores and the submission.

    Raises:
        ConfigError: an invalid device, precision, batch size or number of workers.
        DataError: features can't be read, or the split has no moment annotations.
        UnsupportedHostError: the model does not predict moments, or expects features of another width.
    """
    truth = dataset.annotations()
    start = time.perf_counter()
    predictions = submission(
        model, dataset, batch_size=batch_size, device=device, precision=precision, workers=workers, progress=progress
    )
    metrics = moment_metrics(predictions, truth)
    return MomentResult(metrics, predictions, len(dataset), time.perf_counter() - start)


def score_moments(model: Any, dataset: MomentDataset, request: EvalRequest) -> Evaluation:
    """Scores a moment model as ``lamzoo eval`` and ``lamzoo bench`` do; errors as of :func:`evaluate_moments`.

    Args:
        model: a model of the family ``lam_moment_detr``.
        dataset: the split.
        request: evaluation settings; there are no options.
    """
    result = evaluate_moments(
        model, dataset, batch_size=request.batch_size, device=request.device, precision=request.precision,
        workers=request.workers, progress=lambda done, total: request.progress(done, total, ""),
    )  # fmt: skip
    record = {"queries": result.queries, "seconds": result.seconds, "metrics": result.metrics}
    return Evaluation(result.metrics, f"{result.queries:,} queries", record, predictions=result.predictions)


def describe_input(model: Any) -> str:
    """Returns the input size of a moment model, for a model card."""
    return f"{model.max_clips} clips of {model.video_dim} features and {model.max_words} words of {model.text_dim}"


def submission(
    model: nn.Module,
    dataset: MomentDataset,
    indices: Sequence[int] | None = None,
    *,
    batch_size: int = 32,
    device: str | torch.device = "auto",
    precision: Precision = "float32",
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Predicts in QVHighlights' submission format: ``qid``, ``query``, ``vid``, windows and saliencies.

    Arguments and errors as of :func:`evaluate_moments`; ``indices`` selects queries, all by default. Moments need not
    be annotated.
    """
    indices = range(len(dataset)) if indices is None else indices
    check_batches(batch_size, workers, precision)
    device = resolve_device(device)
    loader = DataLoader(Subset(Items(dataset), indices), batch_size, collate_fn=list, num_workers=workers)
    model.to(device)
    predictions: list[dict[str, Any]] = []
    with inference(model, device, precision, batch_size), plain_worker_errors():
        for features in loader:
            done = len(predictions)
            queries = [dataset.queries[index] for index in indices[done : done + len(features)]]
            findings = find_moments(model, features, [query.duration for query in queries])
            for query, found in zip(queries, findings, strict=True):
                predictions.append({
                    "qid": query.qid, "query": query.text, "vid": query.video,
                    "pred_relevant_windows": np.round(found.windows, 4).tolist(),
                    "pred_saliency_scores": [round(float(score), 4) for score in found.saliency],
                })  # fmt: skip
            if progress is not None:
                progress(len(predictions), len(indices))
    return predictions


def check_features(model: nn.Module, features: MomentFeatures) -> None:
    """Raises an :class:`UnsupportedHostError` if a model does not accept such features."""
    wanted = getattr(model, "video_dim", None), getattr(model, "text_dim", None)
    if None in wanted:
        raise UnsupportedHostError(
            f"{type(model).__name__} does not predict moments; use a model of the family lam_moment_detr."
        )
    given = features.video.shape[1], features.text.shape[1]
    if given != wanted:
        raise UnsupportedHostError(
            f"{type(model).__name__} expects {wanted[0]} features per clip and {wanted[1]} per word, but the data have "
            f"{given[0]} and {given[1]}; create it with video_dim={given[0]}, text_dim={given[1]}, or use other data."
        )


def pad_features(features: Sequence[MomentFeatures]) -> Batch:
    """Collates the features of several queries into one batch.

    Returns:
        Clips ``(B, N, D)`` and words ``(B, W, D)``, float32, padded with zeros, and the masks ``(B, N)`` and ``(B,
        W)``, bool, False at padding.
    """
    video, video_mask = _padded([torch.from_numpy(of_query.video) for of_query in features])
    text, text_mask = _padded([torch.from_numpy(of_query.text) for of_query in features])
    return video, text, video_mask, text_mask


def _padded(tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in tokens], batch_first=True)
    return nn.utils.rnn.pad_sequence(list(tokens), batch_first=True), mask
