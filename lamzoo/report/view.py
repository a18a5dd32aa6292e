"""A photograph as a model gets it, and as a reader wants to see it; knows timm's preprocessing and no model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from lamzoo.errors import UnsupportedHostError
from lamzoo.profiling.inputs import image_size


@dataclass(frozen=True)
class View:
    """A photograph as a model gets it.

    Attributes:
        images: the model's input, ``(1, 3, H, W)``, in its dtype and on its device.
        seen: the same, unnormalised for drawing: ``(H, W, 3)``, float32 on the CPU, 0 to 1.
        sharp: the same crop at a higher resolution, ``(kH, kW, 3)``.
    """

    images: Tensor
    seen: Tensor
    sharp: Tensor


def view(model: nn.Module, photo: Image.Image, sharp_side: int = 320) -> View:
    """Preprocesses an RGB photograph the way the model is evaluated.

    Args:
        model: one with timm's ``pretrained_cfg``; timm's defaults stand in for what it leaves out.
        photo: an RGB image.
        sharp_side: the shorter side, in pixels, that ``sharp`` has at least.

    Raises:
        UnsupportedHostError: the model takes other images than RGB.
        ConfigError: the model does not say what size its images have.
    """
    channels, height, width = image_size(model)
    if channels != 3:
        raise UnsupportedHostError(
            f"{type(model).__name__} takes images of {channels} channels and a photograph has 3; "
            "use a model with in_chans=3."
        )
    config: dict[str, Any] = resolve_model_data_config(model, {"input_size": (3, height, width)})

    def crop(scale: int) -> Tensor:
        size = (3, height * scale, width * scale)
        return create_transform(**{**config, "input_size": size}, is_training=False)(photo)

    def drawable(image: Tensor) -> Tensor:
        mean, std = torch.tensor(config["mean"]), torch.tensor(config["std"])
        return (image.permute(1, 2, 0) * std + mean).clamp(0, 1)

    image = crop(1)
    like = next(model.parameters())
    return View(
        images=image[None].to(like.device, like.dtype),
        seen=drawable(image),
        sharp=drawable(crop(math.ceil(sharp_side / min(height, width)))),
    )
