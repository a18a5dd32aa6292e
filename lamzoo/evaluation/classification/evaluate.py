"""Top-1 and top-5 accuracy of an image classifier, with timm's transforms and loader."""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import timm.data
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from lamzoo.adapters.wrappers import unwrap
from lamzoo.data import LabelledImages, OnBadInput, plain_worker_errors, read_class_map, relabel, select
from lamzoo.data.images.decode import Mode
from lamzoo.data.paths import nfc
from lamzoo.data.validation import check_on_bad, first_named, valid_indices
from lamzoo.errors import ConfigError, DataError
from lamzoo.evaluation.accuracy import BAD_LABEL, AccuracyCounter, EvalResult
from lamzoo.evaluation.classification.imagenet_real import RealLabels
from lamzoo.evaluation.classification.prediction import label_names
from lamzoo.evaluation.resume import EvalState, StateFile, settings_of, weights_sha256
from lamzoo.evaluation.runtime import Precision, check_batches, class_count, data_config, inference, resolve_device
from lamzoo.files import check_target
from lamzoo.profiling.inputs import image_mode, image_size
from lamzoo.tasks.base import EvalRequest, Evaluation, MetricSpec, ScoreTable, metric_table
from lamzoo.tasks.classification import CLASSIFICATION

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalProgress:
    """Progress of an evaluation; accuracies are percentages of the readable images, top-5 is None below 5 classes."""

    seen: int
    total: int
    top1: float
    top5: float | None = None


def evaluate(
    model: nn.Module,
    dataset: LabelledImages,
    *,
    batch_size: int = 64,
    device: str | torch.device = "auto",
    precision: Precision = "float32",
    workers: int = 0,
    limit: int | None = None,
    on_bad_input: OnBadInput = "stop",
    real_labels: str | Path | None = None,
    state: str | Path | None = None,
    resume: bool = False,
    save_every: int = 20,
    progress: Callable[[EvalProgress], None] | None = None,
) -> EvalResult:
    """Scores a classifier on a data set.

    Every image counts exactly once, including those of the last, smaller batch. A broken image stops the evaluation by
    default, because a score without it would not be comparable.

    Args:
        model: a timm model; it is moved to ``device`` and keeps its training or evaluation mode.
        dataset: a data set of :func:`lamzoo.data.create_dataset`; its own transform is ignored and unchanged.
        batch_size: images per batch.
        device: a torch device, or ``"auto"``.
        precision: autocast precision; ``"float32"`` disables autocast.
        workers: worker processes that read images; 0 reads in the main process.
        limit: score only this many images, spread evenly over the data set.
        on_bad_input: ``"skip"`` leaves out missing images with one warning and unreadable ones with a warning each,
            and reports their number.
        real_labels: also score against ImageNet's reassessed labels: ``real.json``, or ``"timm"`` for timm's copy; the
            model's classes must be ImageNet-1k's in their usual order.
        state: file for partial results; removed at the end.
        resume: continue from ``state`` if it exists; the result equals that of an uninterrupted evaluation.
        save_every: batches between updates of ``state``.
        progress: called after each batch.

    Returns:
        The score.

    Raises:
        ConfigError: an invalid device, precision, batch size, limit or number of workers.
        DataError: the classes of data and model do not match, an image (or every image) is unreadable, ``state``
            can't be written or belongs to another evaluation, or the ReaL labels do not cover these images.
        UnsupportedHostError: the model does not classify, or its number of input channels has no Pillow mode.
    """
    check_batches(batch_size, workers, precision)
    if limit is not None and limit < 1:
        raise ConfigError(f"the limit is {limit}; it must be 1 or more")
    if save_every < 1:
        raise ConfigError(f"save_every is {save_every}; it must be 1 or more")
    check_on_bad(on_bad_input)
    device = resolve_device(device)
    config = data_config(model)
    _check_classes(model, dataset)
    real = None if real_labels is None else _read_real_labels(real_labels, model)
    lost = dataset.lost
    kept: Sequence[int] = range(len(dataset))
    if lost:
        kept = valid_indices(dataset, lost, on_bad_input, "images")
        _logger.warning(
            "left out %d of the %d images of %s: %s", len(lost), len(dataset), dataset.spec, first_named(lost)
        )
        dataset = select(dataset, kept)
    tally = AccuracyCounter(dataset, class_count(model), real=real, skip=on_bad_input == "skip")
    indices = _spread(len(dataset), limit)
    file = None
    if state is not None:
        check_target(Path(state), "state", makes_folder=True)
        choices = {
            "on bad input": on_bad_input,
            "ReaL labels": None if real_labels is None else str(real_labels),
            "fingerprint of the images": _digest(repr(dataset.fingerprint())),
        }
        key = _key(model, dataset, config, len(indices), batch_size, device, precision) | choices
        file = StateFile(state, key)
    reserved = nullcontext(EvalState()) if file is None else file.reserve(resume)
    with reserved as done, inference(model, device, precision, batch_size), plain_worker_errors():
        chosen = _Chosen(dataset, indices[done.seen :], image_mode(config), skip=on_bad_input == "skip")
        loader = _loader(chosen, config, batch_size, workers, device)
        model.to(device)
        start = time.perf_counter() - done.seconds
        for number, (images, labels) in enumerate(loader, 1):
            logits = model(images.to(device))
            batch = indices[done.seen : done.seen + len(labels)]
            done = tally.add(done, batch, logits, labels.to(device), time.perf_counter() - start)
            if file is not None and number % save_every == 0:
                file.save(done)
            if progress is not None:
                progress(EvalProgress(done.seen, len(indices), done.top1, tally.top5(done)))
        if file is not None:
            file.remove()
    result = tally.result(done)
    bad = [*lost, *(dataclasses.replace(image, index=kept[image.index]) for image in result.bad_images)]
    bad.sort(key=lambda image: image.index)
    return dataclasses.replace(result, skipped=len(bad), bad_images=tuple(bad))


def score_classifier(model: nn.Module, dataset: LabelledImages, request: EvalRequest) -> Evaluation:
    """Scores a classifier as ``lamzoo eval`` and ``lamzoo bench`` do; arguments and errors as of :func:`evaluate`.

    Args:
        model: a timm model.
        dataset: its images.
        request: evaluation settings; its options are ``class_map``, ``real_labels``, ``on_bad_input``, ``limit``,
            ``state`` and ``resume``.
    """
    options = dict(request.options)
    class_map = options.pop("class_map", None)
    if class_map == "model":
        dataset = relabel(dataset, label_names(model), "the model's classes")
    elif class_map is not None:
        dataset = relabel(dataset, read_class_map(class_map), class_map)

    def moved(progress: EvalProgress) -> None:
        top5 = "" if progress.top5 is None else f", top-5 {progress.top5:.2f} %"
        request.progress(progress.seen, progress.total, f"top-1 {progress.top1:.2f} %{top5}")

    result = evaluate(
        model, dataset, batch_size=request.batch_size, device=request.device, precision=request.precision,
        workers=request.workers, progress=moved, **options,
    )  # fmt: skip
    notes = (f"{result.skipped} images could not be read and were left out",) if result.skipped else ()
    samples = f"{result.samples:,} images"
    return Evaluation(result, samples, dataclasses.asdict(result), notes=notes)


def score_table(scores: Mapping[str, Any]) -> ScoreTable:
    """Returns scores as a table: top-1 and top-5, and those of ReaL labels if measured.

    Args:
        scores: an :class:`EvalResult` or a :class:`lamzoo.training.Score` by split.
    """
    real = [MetricSpec(f"real_top{k}", (f"real_top{k}",), f"ReaL top-{k} (%)") for k in (1, 5)]
    samples = MetricSpec("samples", ("samples",), "images", decimals=0)
    seen = MetricSpec("real_samples", ("real_samples",), "ReaL images", decimals=0)
    speed = MetricSpec("images_per_s", ("images_per_s",), "images/s")
    return metric_table((samples, *CLASSIFICATION.metrics[:2], seen, *real, speed), scores)


def describe_input(model: nn.Module) -> str:
    """Returns the input size of a classifier, for a model card."""
    _, height, width = image_size(model)
    return f"{width} px" if height == width else f"{height} x {width} px"


class _Chosen(Dataset):
    """A subset of the images of a data set, with its own mode and transform, which timm's loader sets.

    With ``skip``, an unreadable image becomes a black one with :data:`BAD_LABEL`, so batches keep their shape.
    """

    def __init__(self, dataset: LabelledImages, indices: Sequence[int], mode: Mode, *, skip: bool) -> None:
        self._dataset = copy.copy(dataset)
        self._dataset.mode = mode
        self._indices = indices
        self._skip = skip

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        try:
            return self._dataset[self._indices[index]]
        except DataError:
            if not self._skip or self.transform is None:
                raise
        return self.transform(Image.new(self._dataset.mode, (64, 64))), BAD_LABEL

    @property
    def transform(self) -> Callable[..., Any] | None:
        return self._dataset.transform

    @transform.setter
    def transform(self, transform: Callable[..., Any] | None) -> None:
        self._dataset.transform = transform


def _loader(
    chosen: Any,  # timm annotates its own classes only
    config: dict[str, Any],
    batch_size: int,
    workers: int,
    device: torch.device,
) -> Any:
    cuda = device.type == "cuda"
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


def _read_real_labels(source: str | Path, model: nn.Module) -> RealLabels:
    real = RealLabels(source)
    if real.highest >= class_count(model):
        raise DataError(
            f"the ReaL labels go up to {real.highest} and the model has {class_count(model)} classes; "
            "use them with ImageNet-1k models only"
        )
    return real


def _check_classes(model: nn.Module, dataset: LabelledImages) -> None:
    classes, num_classes = dataset.classes, class_count(model)
    if classes is None:
        return
    if len(classes) != num_classes:
        raise DataError(
            f"{dataset.spec} has {len(classes)} classes and the model {num_classes}; their labels cannot match, unless "
            "the data have a subset of the model's classes and a class map assigns them (--class-map)"
        )
    cfg: dict[str, Any] = getattr(unwrap(model), "pretrained_cfg", None) or {}
    names = [nfc(name) for name in cfg.get("label_names") or ()]
    classes = [nfc(name) for name in classes]
    if names != classes and sorted(names) == sorted(classes):
        where = next(index for index, name in enumerate(names) if name != classes[index])
        raise DataError(
            f"{dataset.spec} has the model's classes in another order (label {where} is {classes[where]!r} in the data "
            f"and {names[where]!r} in the model); give a class map (--class-map model)"
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
        "classes": None if dataset.classes is None else _digest("\0".join(dataset.classes)),
        "first image": str(Path(dataset.filename(0)).absolute()),
        "size of the data": len(dataset),
        "number of images": images,
        "batch size": batch_size,
        "precision": precision,
        "device": device.type,
        "preprocessing": config,
        "model": type(model).__name__,
        "sha256 of the weights": weights_sha256(model),
        **settings_of(model),
    }


def _digest(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogateescape")).hexdigest()  # class names may be file names
