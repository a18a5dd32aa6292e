"""Wrappers around a model, of torch.compile, data parallelism and FSDP: the model inside, and its state dict."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lamzoo.errors import UnsupportedHostError

_COMPILED = "_orig_mod"  # torch.compile's name for what it wraps, also within a model


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the model inside ``torch.compile``, ``nn.DataParallel`` and ``DistributedDataParallel``, in any order.

    A model under FSDP2 (``fully_shard``) has no wrapper, and is returned as it is.

    Raises:
        UnsupportedHostError: ``FullyShardedDataParallel`` (FSDP1), which hides the parameters.
    """
    *_, innermost = _layers(model)
    if any("_fsdp_wrapped_module" in module._modules for module in innermost.modules()):
        raise UnsupportedHostError(
            "FullyShardedDataParallel hides the parameters of the model in it; use torch.distributed.fsdp.fully_shard, "
            "or the model before it was wrapped."
        )
    return innermost


def check_free(model: nn.Module) -> None:
    """Checks that parameters may still be added to a model, or taken out of it.

    Raises:
        UnsupportedHostError: the model is distributed, by DDP or FSDP.
    """
    way_out = "add or remove masks before that"
    inner = unwrap(model)
    if any(isinstance(layer, DistributedDataParallel) for layer in _layers(model)):
        raise UnsupportedHostError(
            f"DistributedDataParallel synchronises the parameters that this {type(inner).__name__} had when it was "
            f"wrapped, and no others; {way_out}."
        )
    if is_sharded(inner):
        raise UnsupportedHostError(f"This {type(inner).__name__} is sharded by FSDP; {way_out}.")


def compiled_parts(model: nn.Module) -> list[str]:
    """Returns the paths of the submodules that ``torch.compile`` has wrapped."""
    return [path for path, module in unwrap(model).named_modules() if _COMPILED in module._modules]


def is_sharded(model: nn.Module) -> bool:
    """Returns whether parameters of a model are distributed tensors, as under FSDP2."""
    # Not model.parameters(), some of which are whole after a forward pass.
    return any(hasattr(value, "full_tensor") for value in model.state_dict().values())


def host_path(path: str) -> str:
    """Returns the path that a module or parameter has in an uncompiled model."""
    return path.replace(f"{_COMPILED}.", "")


def full_state_dict(model: nn.Module) -> OrderedDict[str, Tensor]:
    """Returns the state dict that a model has without its wrappers, its metadata too.

    Distributed tensors are gathered: under FSDP2 every process has to call this.

    Raises:
        UnsupportedHostError: as for :func:`unwrap`.
    """
    state = unwrap(model).state_dict()
    full = OrderedDict((host_path(key), full_tensor(value)) for key, value in state.items())
    metadata: dict[str, Any] = getattr(state, "_metadata", {})
    vars(full)["_metadata"] = OrderedDict((host_path(path), entry) for path, entry in metadata.items())
    return full


def full_tensor(value: Tensor) -> Tensor:
    """Gathers a distributed tensor, on every process; returns another one as it is."""
    gather: Any = getattr(value, "full_tensor", None)
    return value if gather is None else gather()


def copy_into(parameter: Tensor, value: Tensor) -> None:
    """Copies a tensor into one of the same shape, of which this process may hold a shard."""
    mesh: Any = getattr(parameter, "device_mesh", None)
    if mesh is not None:
        from torch.distributed.tensor import distribute_tensor  # seconds to import, and there where a mesh is

        placements: Any = parameter.placements  # type: ignore[attr-defined]
        value = distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
    parameter.copy_(value)


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yields a model and what it wraps, the innermost last."""
    yield model
    if _COMPILED in model._modules:
        yield from _layers(model.get_submodule(_COMPILED))
    elif isinstance(model, (nn.DataParallel, DistributedDataParallel)):
        yield from _layers(model.module)
