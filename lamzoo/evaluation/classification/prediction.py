"""Predictions of a classifier for single images, with the names of its classes."""

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
from lamzoo.evaluation.runtime import Precision, check_batches, class_count, data_config, inference, resolve_device
from lamzoo.profiling.inputs import image_mode


@dataclass(frozen=True)
class Prediction:
    """One guess: the class number, its name, and the softmax probability, 0 to 1."""

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
    """Classifies images, preprocessed as the model's ``pretrained_cfg`` says.

    Args:
        model: a timm model; it is moved to ``device``, and left in the mode that it was in.
        images: paths, or images that Pillow has opened, read batch by batch and turned upright as their EXIF
            orientation says.
        topk: guesses per image, at most one for each class.
        batch_size: images at a time.
        device: as torch writes it, or ``"auto"``.
        precision: of the autocast.

    Returns:
        For each image its likeliest classes, the likeliest first.

    Raises:
        ConfigError: a device, precision, batch size or ``topk`` that is not possible.
        DataError: an image cannot be read.
        UnsupportedHostError: the model is no classifier of images that Pillow has a mode for.
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
            probabilities = logits.float().softmax(dim=1)
            top = probabilities.topk(min(topk, probabilities.shape[1]), dim=1)
        names = class_names(model, probabilities.shape[1])
        for values, indices in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            results.append(
                [Prediction(index, names[index], value) for index, value in zip(indices, values, strict=True)]
            )
    return results


def preprocess(model: nn.Module, images: Iterable[Image.Image | str | Path]) -> Tensor:
    """Turns images into a model's input, ``(B, C, H, W)`` float32, as its ``pretrained_cfg`` says.

    Raises:
        DataError: an image cannot be read.
        UnsupportedHostError: the model is no classifier of images that Pillow has a mode for.
    """
    return torch.stack(list(map(_transform(model), images)))


def class_names(model: nn.Module, num_classes: int) -> list[str]:
    """Returns the names of a classifier's classes: those of its weights, ImageNet's, or ``"class 0"`` and so on."""
    cfg: dict[str, Any] = getattr(unwrap(model), "pretrained_cfg", None) or {}
    names = cfg.get("label_names")
    if names is not None and len(names) == num_classes:
        return list(names)
    subset = timm.data.infer_imagenet_subset(cfg)
    if subset is not None and cfg["num_classes"] == num_classes:
        return list(timm.data.ImageNetInfo(subset).label_descriptions())
    return [f"class {index}" for index in range(num_classes)]


def label_names(model: nn.Module) -> list[str]:
    """Returns what the folders of a classifier's classes are called: names of its weights, or ImageNet's WordNet ids.

    Raises:
        DataError: nothing says what the classes are.
    """
    cfg: dict[str, Any] = getattr(unwrap(model), "pretrained_cfg", None) or {}
    names = list(cfg.get("label_names") or ())
    subset = timm.data.infer_imagenet_subset(cfg)
    if not names and subset is not None:
        names = list(timm.data.ImageNetInfo(subset).label_names())
    if len(names) != class_count(model):
        raise DataError(f"nothing says what the {class_count(model)} classes of the model are; give a class map's file")
    return names


def _transform(model: nn.Module) -> Callable[[Image.Image | str | Path], Tensor]:
    config = data_config(model)
    transform: Any = timm.data.create_transform(**config, is_training=False)
    return lambda image: transform(open_image(image, image_mode(config)))
