"""Top-1 and top-5 accuracy of an image classifier, through timm's transforms and loader."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm.data
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lamzoo.data import LabelledImages, plain_worker_errors
from lamzoo.errors import ConfigError, DataError
from lamzoo.evaluation.partial import Partial, StateFile, weights_sha256
from lamzoo.evaluation.runtime import Precision, check_batches, class_count, data_config, inference, resolve_device


@dataclass(frozen=True)
class EvalResult:
    """A score.

    Attributes:
        top1: percent right at first guess.
        top5: percent right among the first five guesses; None below five classes, where it says nothing.
        samples: images scored.
        seconds: what that took, reading and decoding included, and what was done before a resumption.
        images_per_s: ``samples / seconds``.
    """

    top1: float
    top5: float | None
    samples: int
    seconds: float
    images_per_s: float


@dataclass(frozen=True)
class EvalProgress:
    """Where an evaluation stands; ``top1`` is the percentage of the ``seen`` images."""

    seen: int
    total: int
    top1: float


def evaluate(
    model: nn.Module,
    dataset: LabelledImages,
    *,
    batch_size: int = 64,
    device: str | torch.device = "auto",
    precision: Precision = "float32",
    workers: int = 0,
    limit: int | None = None,
    state: str | Path | None = None,
    resume: bool = False,
    save_every: int = 20,
    progress: Callable[[EvalProgress], None] | None = None,
) -> EvalResult:
    """Scores a classifier on a data set.

    Every image counts once, also those of the last, smaller batch. A broken image ends the evaluation, it is not
    skipped.

    Args:
        model: a timm model; it is moved to ``device``, and left in the mode that it was in.
        dataset: what :func:`lamzoo.data.create_dataset` returns; its own transform is neither used nor changed.
        batch_size: images at a time.
        device: as torch writes it, or ``"auto"``.
        precision: of the autocast; ``"float32"`` for none.
        workers: processes that read images; 0 reads in this one.
        limit: score this many images only, spread evenly over the data set.
        state: file for partial results, removed at the end.
        resume: go on from ``state``, if it is there; the result is the same as without the interruption.
        save_every: batches from one writing of ``state`` to the next.
        progress: called after each batch.

    Returns:
        The score.

    Raises:
        ConfigError: a device, precision, batch size, limit or number of workers that is not possible.
        DataError: the classes of data and model do not fit, an image is broken, or ``state`` is of another run.
        UnsupportedHostError: the model is no classifier of RGB images.
    """
    check_batches(batch_size, workers, precision)
    if limit is not None and limit < 1:
        raise ConfigError(f"the limit is {limit}; it must be 1 or more")
    if save_every < 1:
        raise ConfigError(f"save_every is {save_every}; it must be 1 or more")
    device = resolve_device(device)
    config = data_config(model)
    _check_classes(model, dataset)
    indices = _spread(len(dataset), limit)
    file, done = None, Partial()
    if state is not None:
        file = StateFile(state, _key(model, dataset, config, len(indices), batch_size, device, precision))
        done = file.load() if resume else done
    loader = _loader(dataset, indices[done.seen :], config, batch_size, workers, device)
    model.to(device)
    start = time.perf_counter() - done.seconds
    with inference(model, device, precision, batch_size), plain_worker_errors():
        for number, (images, labels) in enumerate(loader, 1):
            logits = model(images.to(device)).float()
            _check_labels(dataset, labels, logits.shape[1])
            done = _add(done, logits, labels.to(device), time.perf_counter() - start)
            if file is not None and number % save_every == 0:
                file.save(done)
            if progress is not None:
                progress(EvalProgress(done.seen, len(indices), 100 * done.correct1 / done.seen))
    if file is not None:
        file.remove()
    return EvalResult(
        top1=100 * done.correct1 / done.seen,
        top5=100 * done.correct5 / done.seen if class_count(model) >= 5 else None,
        samples=done.seen,
        seconds=done.seconds,
        images_per_s=done.seen / done.seconds,
    )


class _Chosen(Dataset):
    """Some images of a data set, under a transform of their own, which timm's loader sets."""

    def __init__(self, dataset: LabelledImages, indices: Sequence[int]) -> None:
        self._dataset = copy.copy(dataset)
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self._dataset[self._indices[index]]

    @property
    def transform(self) -> Callable[..., Any] | None:
        return self._dataset.transform

    @transform.setter
    def transform(self, transform: Callable[..., Any] | None) -> None:
        self._dataset.transform = transform


def _loader(
    dataset: LabelledImages,
    indices: Sequence[int],
    config: dict[str, Any],
    batch_size: int,
    workers: int,
    device: torch.device,
) -> Any:
    cuda = device.type == "cuda"
    chosen: Any = _Chosen(dataset, indices)  # timm's annotation knows its own classes alone
    return timm.data.create_loader(
        chosen,
        batch_size=batch_size,
        is_training=False,
        num_workers=workers,
        use_prefetcher=cuda,
        pin_memory=cuda,
        device=device,
        **config,
    )


def _add(done: Partial, logits: Tensor, labels: Tensor, seconds: float) -> Partial:
    """Counts a batch: logits ``(B, num_classes)``, labels ``(B,)``."""
    if not logits.isfinite().all():
        raise ConfigError("the model's outputs are not finite; use another precision, or check the weights")
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return Partial(
        seen=done.seen + len(labels),
        correct1=done.correct1 + int(hits[:, 0].sum()),
        correct5=done.correct5 + int(hits.sum()),
        seconds=seconds,
    )


def _check_labels(dataset: LabelledImages, labels: Tensor, num_classes: int) -> None:
    highest = int(labels.max())
    if highest >= num_classes:
        raise DataError(f"{dataset.spec} has a label {highest} and the model {num_classes} classes; they do not match")


def _check_classes(model: nn.Module, dataset: LabelledImages) -> None:
    classes, num_classes = dataset.classes, class_count(model)
    if classes is None:
        return
    if len(classes) != num_classes:
        raise DataError(
            f"{dataset.spec} has {len(classes)} classes and the model {num_classes}; their labels cannot match"
        )
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    names = list(cfg.get("label_names") or ())
    if names != classes and sorted(names) == sorted(classes):
        where = next(index for index, name in enumerate(names) if name != classes[index])
        raise DataError(
            f"{dataset.spec} has the model's classes in another order (label {where} is {classes[where]!r} there and "
            f"{names[where]!r} in the model); sort them alike"
        )


def _spread(total: int, limit: int | None) -> Sequence[int]:
    if limit is None or limit >= total:
        return range(total)
    return [position * total // limit for position in range(limit)]


def _key(
    model: nn.Module,
    dataset: LabelledImages,
    config: dict[str, Any],
    images: int,
    batch_size: int,
    device: torch.device,
    precision: Precision,
) -> dict[str, Any]:
    return {
        "data": dataset.spec,
        "split": dataset.split,
        "first image": str(Path(dataset.filename(0)).absolute()),
        "size of the data": len(dataset),
        "number of images": images,
        "batch size": batch_size,
        "precision": precision,
        "device": device.type,
        "preprocessing": config,
        "model": type(model).__name__,
        "sha256 of the weights": weights_sha256(model),
    }
