"""Preprocessing of a photograph for a model, with the same crop at a higher resolution for figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn

from lamzoo.data import open_image
from lamzoo.profiling.inputs import image_config, image_mode


@dataclass(frozen=True)
class View:
    """A preprocessed photograph.

    Attributes:
        images: the model's input, ``(1, C, H, W)``, in its dtype and on its device.
        seen: the same, unnormalised for drawing: ``(H, W, 3)``, float32 on the CPU, 0 to 1.
        sharp: the same crop at a higher resolution, ``(kH, kW, 3)``.
    """

    images: Tensor
    seen: Tensor
    sharp: Tensor


def view(model: nn.Module, photo: str | Path | Image.Image, sharp_side: int = 320) -> View:
    """Preprocesses a photograph as in evaluation.

    Args:
        model: a model with timm's ``pretrained_cfg``; timm's defaults replace missing values.
        photo: a file or a Pillow image.
        sharp_side: minimum length of the shorter side of ``sharp``, pixels.

    Raises:
        UnsupportedHostError: Pillow has no mode with the model's number of channels.
        ConfigError: the model doesn't state its image size.
        DataError: the photograph can't be read.
    """
    config = image_config(model)
    image = open_image(photo, image_mode(config))

    pixels = _crop(config, image)
    like = next(model.parameters())
    return View(
        images=pixels[None].to(like.device, like.dtype),
        seen=_drawable(config, pixels),
        sharp=sharp_crop(config, image, sharp_side),
    )


def sharp_crop(config: Mapping[str, Any], image: Image.Image, sharp_side: int) -> Tensor:
    """Returns what a model sees of an image, at a higher resolution and unnormalised: ``(kH, kW, 3)``, 0 to 1.

    Args:
        config: timm's preprocessing.
        image: in the mode of its number of channels.
        sharp_side: minimum length of the shorter side, pixels.
    """
    return _drawable(config, _crop(config, image, math.ceil(sharp_side / min(config["input_size"][1:]))))


def _crop(config: Mapping[str, Any], image: Image.Image, scale: int = 1) -> Tensor:
    channels, height, width = config["input_size"]
    size = (channels, height * scale, width * scale)
    return create_transform(**{**config, "input_size": size}, is_training=False)(image)


def _drawable(config: Mapping[str, Any], pixels: Tensor) -> Tensor:
    mean, std = torch.tensor(config["mean"]), torch.tensor(config["std"])
    values = (pixels.permute(1, 2, 0) * std + mean).clamp(0, 1)
    return values.expand(-1, -1, 3) if len(pixels) == 1 else values[..., :3]
