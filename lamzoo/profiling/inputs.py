"""Example inputs and evaluation mode for measuring a model, based on timm's conventions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import timm.data
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lamzoo.adapters.wrappers import first_parameter, unwrap
from lamzoo.data.images.decode import MODES, Mode, of_channels
from lamzoo.errors import ConfigError, UnsupportedHostError, class_name

#: The input of a model: one tensor, or positional arguments, which are tensors or structures of them.
Inputs: TypeAlias = Tensor | Sequence[Any]


def image_size(model: nn.Module) -> tuple[int, int, int]:
    """Returns ``(channels, height, width)`` of the images that a model, or a wrapped model, was built for.

    What ``img_size=`` changes takes precedence over ``pretrained_cfg``, which it does not change. Of a CLIP model of
    open_clip, they are those of its image tower.

    Raises:
        ConfigError: neither the patch embedding, ``pretrained_cfg`` nor an image tower defines the size.
    """
    model = unwrap(model)
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    known = cfg.get("input_size")
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    size = size or getattr(getattr(model, "visual", model), "image_size", None)
    size = size or (getattr(model, "_model_args", None) or {}).get("img_size")  # of timm's create_model
    size = size or (known and known[1:])
    size = size or getattr(getattr(model, "config", None), "image_size", None)  # of transformers
    size = (size, size) if isinstance(size, int) else size
    if not size:
        raise ConfigError(
            f"The image size of {class_name(model)} is unknown: no patch_embed.img_size, pretrained_cfg, image_size; "
            "pass an input."
        )
    convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    first = next(convolutions, None)
    channels = known[0] if first is None and known else 3 if first is None else first.in_channels
    return int(channels), int(size[0]), int(size[1])


def image_config(model: nn.Module) -> dict[str, Any]:
    """Returns timm's preprocessing configuration for a model, at the size and channels that it was built with.

    Raises:
        UnsupportedHostError: Pillow has no mode with that number of channels.
        ConfigError: as of :func:`image_size`.
    """
    model = unwrap(model)
    channels, height, width = image_size(model)
    if channels not in MODES:
        raise UnsupportedHostError(
            f"{class_name(model)} takes images of {channels} channels, but images have 1 (grey), 3 (RGB) or 4 (RGBA); "
            "create it with one of these as in_chans."
        )
    config = timm.data.resolve_model_data_config(model, {"input_size": (channels, height, width)})
    return config | {key: of_channels(config[key], channels) for key in ("mean", "std")}


def image_mode(config: Mapping[str, Any]) -> Mode:
    """Returns the Pillow mode for :func:`image_config`."""
    return MODES[config["input_size"][0]]


def default_input(model: nn.Module, batch_size: int = 1) -> Inputs:
    """Returns random inputs in the dtype and on the device of the model's first parameter.

    Images ``(batch_size, C, H, W)``, or the result of the model's own ``example_inputs(batch_size)``.

    Raises:
        UnsupportedHostError: the model has no parameters, as an exported program.
        ConfigError: as of :func:`image_size`.
    """
    model = unwrap(model)
    own: Any = getattr(model, "example_inputs", None)
    if own is not None:
        return own(batch_size)
    like = first_parameter(model)
    return torch.rand(batch_size, *image_size(model), device=like.device).to(like.dtype)


def as_arguments(input: Inputs) -> tuple[Any, ...]:
    """Returns an input as positional arguments."""
    return (input,) if isinstance(input, Tensor) else tuple(input)


def first_tensor(input: Inputs) -> Tensor:
    """Returns the first tensor of an input, to determine its device."""
    tensor: Tensor = tree_leaves(input)[0]
    return tensor


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Switches models to evaluation mode and restores the mode of each submodule afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
