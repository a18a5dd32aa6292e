"""Sums and gradients of a global batch, which passes through the model in parts and is spread over processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn


def global_counts(accelerator: Accelerator, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Adds up what the losses of a global batch are divided by.

    Args:
        accelerator: of all processes, each of which calls this.
        parts: of each of this process's batches the same names, int64 scalars.

    Returns:
        The sums over the batches of all processes, by name.
    """
    sums = torch.stack([torch.stack(list(part.values())) for part in parts]).sum(dim=0)
    return dict(zip(parts[0], accelerator.reduce(sums, "sum"), strict=True))


def average_gradients(accelerator: Accelerator, model: nn.Module) -> None:
    """Replaces the gradients of a model that is not wrapped by their mean over the processes.

    A parameter that takes part in the batches of some processes alone, such as the projection of a modality that few
    clips have, has a gradient of zero on the others. One that takes part on none keeps its lack of a gradient, as it
    would in a single process.

    Args:
        accelerator: of all processes, each of which calls this.
        model: the same on each process.
    """
    if accelerator.num_processes == 1:
        return
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    there = torch.tensor([parameter.grad is not None for parameter in parameters], device=accelerator.device)
    somewhere = accelerator.reduce(there.long(), "sum").tolist()
    parameters = [parameter for parameter, count in zip(parameters, somewhere, strict=True) if count]
    if not parameters:
        return
    own = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    mean = accelerator.reduce(torch.cat([gradient.flatten() for gradient in own]), "mean")
    for parameter, part in zip(parameters, mean.split([each.numel() for each in parameters]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)
