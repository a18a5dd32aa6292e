"""FSDP2: models and optimisers whose tensors are sharded over the processes, and their whole states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lamzoo.adapters.wrappers import copy_into, full_tensor, is_sharded
from lamzoo.errors import RecipeError

#: Methods of retrieval models that are called in place of forward.
_METHODS = ("encode_text", "encode_video", "similarity", "dual_similarity", "match")


def shard(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Shards a model with ``fully_shard``, in place: each block with attention, masks included, and the rest as one.

    Parameters that no input of a process used count as used with a zero gradient. Scalars are not sharded;
    :func:`lamzoo.training.gradients.average_gradients` averages their gradients.

    Args:
        accelerator: the accelerator of several processes.
        model: the model, the same on all processes.

    Returns:
        The model, on the device, with distributed parameters.

    Raises:
        RecipeError: this version of torch can't reduce parameters that only some processes used.
    """
    from torch.distributed.device_mesh import init_device_mesh  # seconds to import
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise RecipeError(f"run.fsdp needs torch 2.15 or newer, and this is {torch.__version__}; set it to false.")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    sharded: Any = model.to(accelerator.device)
    for block in reversed(list(_blocks(sharded))):  # the inner ones first
        fully_shard(block, mesh=mesh)
    scalars = {parameter for parameter in sharded.parameters() if parameter.ndim == 0}  # which can't be sharded
    fully_shard(sharded, mesh=mesh, reshard_after_forward=False, ignored_params=scalars)
    sharded.set_reduce_scatter_unused_params(True)
    for name in _METHODS:
        if hasattr(sharded, name):
            register_fsdp_forward_method(sharded, name)
    return sharded


def mixes_sharded(model: nn.Module) -> bool:
    """Returns whether a model has sharded tensors and others, such as buffers, which ``torch._foreach_`` can't mix."""
    tensors = (tensor for tensor in model.state_dict().values() if tensor.is_floating_point())
    return len({hasattr(tensor, "full_tensor") for tensor in tensors}) == 2


def whole_state(state: Any, keep: bool = True) -> Any:
    """Returns a state of nested dictionaries and lists with gathered tensors, on the CPU; call it on every process.

    Args:
        state: the state; tensors that are not distributed stay as they are.
        keep: whether this process needs the tensors; without it they are gathered one by one, and None replaces them.
    """
    if isinstance(state, Mapping):
        return {key: whole_state(value, keep) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole_state(value, keep) for value in state)
    if isinstance(state, Tensor) and hasattr(state, "full_tensor"):
        whole = full_tensor(state.detach())
        return whole.cpu() if keep else None
    return state


@torch.no_grad()
def gather_into(whole: nn.Module, model: nn.Module) -> None:
    """Copies the weights and buffers of a sharded model into a whole one, one by one; call it on every process."""
    own = whole.state_dict()
    for name, tensor in model.state_dict().items():
        own[name].copy_(full_tensor(tensor))


@torch.no_grad()
def load_whole(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads a whole state dict, the same on every process, into a sharded model.

    Raises:
        LookupError: keys are missing or unexpected; names one.
        ValueError: a tensor has another shape than its parameter.
    """
    own = model.state_dict()
    if different := own.keys() ^ state.keys():
        raise LookupError(f"the model and its state differ in {min(different)}")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise ValueError(f"{name} has the shape {tuple(state[name].shape)} and the model {tuple(tensor.shape)}")
        copy_into(tensor, state[name])


def sharded_state(optimizer: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """Shards the whole state of an optimiser like its parameters, for ``load_state_dict``."""
    from torch.distributed.tensor import distribute_tensor  # seconds to import

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def like(parameter: Any, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != parameter.shape or not hasattr(parameter, "full_tensor"):
            return value
        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)

    indices = [index for group in state["param_groups"] for index in group["params"]]
    owner = dict(zip(indices, parameters, strict=True))
    tensors = {
        index: {name: like(owner[index], value) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": tensors}


@torch.no_grad()
def clip_gradients(accelerator: Accelerator, model: nn.Module, limit: float) -> None:
    """Scales the gradients of a model, which may be sharded, as ``torch.nn.utils.clip_grad_norm_`` does."""
    if not is_sharded(model):
        accelerator.clip_grad_norm_(model.parameters(), limit)
        return
    gradients: list[Any] = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    shards = [gradient.to_local() for gradient in gradients if hasattr(gradient, "full_tensor")]
    others = [gradient for gradient in gradients if not hasattr(gradient, "full_tensor")]
    zero = torch.zeros((), device=accelerator.device)
    squares = accelerator.reduce(sum((part.float().square().sum() for part in shards), zero), "sum")
    norm = (squares + sum((other.float().square().sum() for other in others), zero)).sqrt()
    for gradient in (*shards, *others):
        gradient.mul_((limit / (norm + 1e-6)).clamp(max=1.0))


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the blocks with attention of all stacks, outer ones before inner ones."""
    apart = {
        inner for module in model.modules() if getattr(module, "reads_blocks", False) for inner in module.modules()
    }
    for stack in model.modules():
        if isinstance(stack, (nn.ModuleList, nn.Sequential)) and stack not in apart:
            yield from (block for block in stack if any("att" in path for path, _ in block.named_modules()))
