"""Device, precision and batch settings of an evaluation, checked before loading."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lamzoo.adapters.wrappers import unwrap
from lamzoo.errors import ConfigError, UnsupportedHostError
from lamzoo.profiling.inputs import evaluating, image_config
from lamzoo.records import Limits

_BATCH, _WORKERS = Limits(least=1, most=2**31 - 1), Limits(least=0, most=1024)

Precision = Literal["float32", "bfloat16", "float16"]


class Items(Dataset[Any]):
    """The items of a data set that reads one with ``read(index)``, for a loader."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        return self._dataset.read(index)


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """Returns an available device.

    Args:
        name: a torch device, or ``"auto"``: CUDA if available, else the CPU.

    Raises:
        ConfigError: an unknown or unavailable device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        raise ConfigError(f"there is no device {str(name)!r}; use 'auto', 'cpu', or 'cuda' with a GPU") from error
    if device.type == "meta":
        raise ConfigError("the device 'meta' computes nothing; use 'auto', 'cpu' or 'cuda'")
    return device


def check_batches(batch_size: int, workers: int = 0, precision: Precision = "float32") -> None:
    """Raises a :class:`ConfigError` for an impossible batch size or number of workers, or an unknown precision."""
    for what, value, limits in (("batch size", batch_size, _BATCH), ("number of workers", workers, _WORKERS)):
        if problem := limits.problem(value):
            raise ConfigError(f"the {what} is {value}; {problem}")
    if precision not in get_args(Precision):
        raise ConfigError(f"the precision is {precision!r}; it must be one of {', '.join(get_args(Precision))}")


def data_config(model: nn.Module) -> dict[str, Any]:
    """Returns timm's preprocessing configuration for a model, at the input size that it was built for.

    Raises:
        UnsupportedHostError: the model does not classify, or its number of input channels has no Pillow mode.
    """
    model = unwrap(model)
    config = image_config(model)
    class_count(model)
    return config


def class_count(model: nn.Module) -> int:
    """Returns the number of classes of a model.

    Raises:
        UnsupportedHostError: the model is not a classifier, or has no head.
    """
    model = unwrap(model)
    count = getattr(model, "num_classes", 0)
    if not isinstance(count, int) or count < 1:
        raise UnsupportedHostError(
            f"{type(model).__name__} has no classes; choose an image classifier, or create the model with num_classes "
            "above 0"
        )
    return count


def check_finite(outputs: Tensor) -> None:
    """Raises a :class:`ConfigError` if a number that a model computed is infinite or not a number."""
    if not outputs.isfinite().all():
        raise ConfigError("the model's outputs are not finite; use another precision, or check the weights")


def check_logits(logits: object, num_classes: int) -> None:
    """Checks what a classifier returned.

    Raises:
        ConfigError: a logit is infinite or not a number.
        UnsupportedHostError: it is not ``(B, num_classes)`` logits.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] != num_classes:
        found = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise UnsupportedHostError(
            f"the model returns {found} in place of {num_classes} logits per image; choose an image classifier"
        )
    check_finite(logits)


@contextmanager
def inference(model: nn.Module, device: torch.device, precision: Precision, batch_size: int) -> Iterator[None]:
    """Runs a model in evaluation mode, without gradients, under autocast.

    Raises:
        ConfigError: the batch does not fit into the device's memory.
    """
    dtype = getattr(torch, precision)
    try:
        with (
            evaluating(model),
            torch.inference_mode(),
            torch.autocast(device.type, dtype, enabled=precision != "float32"),
        ):
            yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"a batch of {batch_size} does not fit on {device}; use a smaller one") from error
