"""Sums, gradients and statistics of a global batch, split over forward passes and processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from timm.utils import distribute_bn
from torch import Tensor, nn


def global_counts(accelerator: Accelerator, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Sums the denominators of the losses over a global batch.

    Args:
        accelerator: the accelerator; every process must call this.
        parts: counts of each of this process's batches: int64 scalars with the same names.

    Returns:
        The sums over all batches and processes, by name.
    """
    sums = torch.stack([torch.stack(list(part.values())) for part in parts]).sum(dim=0)
    return dict(zip(parts[0], accelerator.reduce(sums, "sum"), strict=True))


def average_gradients(accelerator: Accelerator, model: nn.Module) -> None:
    """Averages the gradients of an unwrapped model over the processes.

    A parameter used in the batches of only some processes, such as the projection of a rare modality, gets a zero
    gradient on the others. A parameter used on none keeps ``grad = None``, as in a single process. Sharded gradients
    are averages already.

    Args:
        accelerator: the accelerator; every process must call this.
        model: the same model on every process.
    """
    parameters = [each for each in model.parameters() if each.requires_grad and not hasattr(each, "full_tensor")]
    if accelerator.num_processes == 1 or not parameters:
        return
    there = torch.tensor([parameter.grad is not None for parameter in parameters], device=accelerator.device)
    somewhere = accelerator.reduce(there.long(), "sum").tolist()
    parameters = [parameter for parameter, count in zip(parameters, somewhere, strict=True) if count]
    if not parameters:
        return
    own = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    mean = accelerator.reduce(torch.cat([gradient.flatten() for gradient in own]), "mean")
    for parameter, part in zip(parameters, mean.split([each.numel() for each in parameters]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)


def share_statistics(accelerator: Accelerator, *models: nn.Module | None) -> None:
    """Gives the batch norms of models the statistics of the main process, which saves them, on every process."""
    if accelerator.num_processes > 1:
        for model in models:
            if model is not None:
                distribute_bn(model, accelerator.num_processes)
