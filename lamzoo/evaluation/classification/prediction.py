"""Predictions of a classifier for single images, with class names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import timm.data
import torch
from PIL import Image
from torch import Tensor, nn

from lamzoo.adapters.wrappers import unwrap
from lamzoo.data import open_image
from lamzoo.errors import ConfigError, DataError
from lamzoo.evaluation.runtime import (
    Precision,
    check_batches,
    check_logits,
    class_count,
    data_config,
    inference,
    resolve_device,
)
from lamzoo.profiling.inputs import image_mode


@dataclass(frozen=True)
class Prediction:
    """One prediction: the class index, its name, and the softmax probability from 0 to 1."""

    index: int
    label: str
    probability: float


def predict(
    model: nn.Module,
    images: Iterable[Image.Image | str | Path],
    *,
    topk: int = 5,
    batch_size: int = 64,
    device: str | torch.device = "auto",
    precision: Precision = "float32",
) -> list[list[Prediction]]:
    """Classifies images, preprocessed according to the model's ``pretrained_cfg``.

    Args:
        model: a timm model; it is moved to ``device`` and keeps its training or evaluation mode.
        images: paths or Pillow images, read batch by batch and rotated according to their EXIF orientation.
        topk: predictions per image, at most the number of classes.
        batch_size: images per batch.
        device: a torch device, or ``"auto"``.
        precision: autocast precision.

    Returns:
        For each image its most likely classes, the most likely first.

    Raises:
        ConfigError: an invalid device, precision, batch size or ``topk``, or a logit is infinite or not a number.
        DataError: an image cannot be read.
        UnsupportedHostError: the model does not classify, returns no logits, or its number of input channels has no
            Pillow mode.
    """
    check_batches(batch_size, precision=precision)
    if topk < 1:
        raise ConfigError(f"topk is {topk}; it must be 1 or more")
    device = resolve_device(device)
    transform = _transform(model)
    model.to(device)
    results: list[list[Prediction]] = []
    rest = iter(images)
    while batch := [transform(image) for image in islice(rest, batch_size)]:
        with inference(model, device, precision, batch_size):
            logits = model(torch.stack(batch).to(device))
            check_logits(logits, class_count(model))
            probabilities = logits.float().softmax(dim=1)
            top = probabilities.topk(min(topk, probabilities.shape[1]), dim=1)
        names = class_names(model, probabilities.shape[1])
        for values, indices in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            results.append(
                [Prediction(index, names[index], value) for index, value in zip(indices, values, strict=True)]
            )
    return results


def preprocess(model: nn.Module, images: Iterable[Image.Image | str | Path]) -> Tensor:
    """Preprocesses images into a model's input, ``(B, C, H, W)`` float32, according to its ``pretrained_cfg``.

    Raises:
        DataError: an image cannot be read.
        UnsupportedHostError: the model does not classify, or its number of input channels has no Pillow mode.
    """
    return torch.stack(list(map(_transform(model), images)))


def class_names(model: nn.Module, num_classes: int) -> list[str]:
    """Returns the class names of a classifier: those of its weights, ImageNet's, or ``"class 0"`` and so on."""
    cfg: dict[str, Any] = getattr(unwrap(model), "pretrained_cfg", None) or {}
    names = cfg.get("label_names")
    if names is not None and len(names) == num_classes:
        return list(names)
    subset = timm.data.infer_imagenet_subset(cfg)
    if subset is not None and cfg["num_classes"] == num_classes:
        return list(timm.data.ImageNetInfo(subset).label_descriptions())
    return [f"class {index}" for index in range(num_classes)]


def label_names(model: nn.Module) -> list[str]:
    """Returns the folder names of a classifier's classes: label names of its weights, or ImageNet's WordNet ids.

    Raises:
        DataError: the model's classes are unknown.
    """
    cfg: dict[str, Any] = getattr(unwrap(model), "pretrained_cfg", None) or {}
    names = list(cfg.get("label_names") or ())
    subset = timm.data.infer_imagenet_subset(cfg)
    if not names and subset is not None:
        names = list(timm.data.ImageNetInfo(subset).label_names())
    if len(names) != class_count(model):
        raise DataError(f"the names of the model's {class_count(model)} classes are unknown; give a class map file")
    return names


def _transform(model: nn.Module) -> Callable[[Image.Image | str | Path], Tensor]:
    config = data_config(model)
    transform: Any = timm.data.create_transform(**config, is_training=False)
    return lambda image: transform(open_image(image, image_mode(config)))
