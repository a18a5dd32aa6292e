"""Models wrapped by torch.compile, data parallelism or FSDP: the model inside, and its state dict."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lamzoo.errors import UnsupportedHostError, class_name
from lamzoo.files import shortened

_COMPILED = "_orig_mod"  # the name that torch.compile gives the wrapped module


def check_model(model: object) -> None:
    """Raises an :class:`UnsupportedHostError` for an argument that is not a model, such as the name of one."""
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type):
        raise UnsupportedHostError(f"The model is the class {class_name(model)}; pass an instance of it.")
    given = shortened(repr(model)) if model is None or isinstance(model, str) else f"of class {class_name(model)}"
    made = (
        f"lamzoo.create_model({given})" if isinstance(model, str) else "a model, for example from lamzoo.create_model"
    )
    raise UnsupportedHostError(f"The model is {given}, which is not a torch.nn.Module; pass {made}.")


def first_parameter(model: nn.Module) -> nn.Parameter:
    """Returns the first parameter of a model, which tells its dtype and device.

    Raises:
        UnsupportedHostError: it has no parameters, as an exported program.
    """
    for parameter in model.parameters():
        return parameter
    raise UnsupportedHostError(
        f"The model ({class_name(model)}) has no parameters, as exported programs have none; pass the model that was "
        "exported."
    )


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the model inside ``torch.compile``, ``nn.DataParallel`` and ``DistributedDataParallel``, in any order.

    A model under FSDP2 (``fully_shard``) has no wrapper and is returned unchanged.

    Raises:
        UnsupportedHostError: the model is wrapped by ``FullyShardedDataParallel`` (FSDP1), which hides the parameters,
            or is not a ``torch.nn.Module``.
    """
    check_model(model)
    *_, innermost = _layers(model)
    if any("_fsdp_wrapped_module" in module._modules for module in innermost.modules()):
        raise UnsupportedHostError(
            "FullyShardedDataParallel hides the parameters of the model inside; use "
            "torch.distributed.fsdp.fully_shard, or the model before it was wrapped."
        )
    return innermost


def check_free(model: nn.Module) -> None:
    """Checks that parameters can still be added to a model, or removed from it.

    Raises:
        UnsupportedHostError: the model is distributed (DDP, FSDP).
    """
    inner = unwrap(model)
    if any(isinstance(layer, DistributedDataParallel) for layer in _layers(model)):
        raise UnsupportedHostError(
            f"DistributedDataParallel only synchronises the parameters that the model ({class_name(inner)}) had when "
            "it was wrapped; add or remove masks before that."
        )
    if is_sharded(inner):
        raise UnsupportedHostError(
            f"The model ({class_name(inner)}) is sharded by FSDP; add or remove masks before that."
        )


def compiled_parts(model: nn.Module) -> list[str]:
    """Returns the paths of the submodules that ``torch.compile`` wraps."""
    return [path for path, module in unwrap(model).named_modules() if _COMPILED in module._modules]


def is_sharded(model: nn.Module) -> bool:
    """Returns whether a model is sharded by FSDP2, or has distributed tensors among its parameters and buffers."""
    # The tensors alone don't tell: those of FSDP2's root module are gathered after a forward pass.
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # seconds to import, and imported where a model is sharded
    if fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules()):
        return True
    return any(hasattr(tensor, "full_tensor") for tensor in chain(model.parameters(), model.buffers()))


def host_path(path: str) -> str:
    """Returns the path of a module or parameter in the uncompiled model."""
    return path.replace(f"{_COMPILED}.", "")


def full_state_dict(model: nn.Module) -> OrderedDict[str, Tensor]:
    """Returns the state dict of a model without its wrappers, with its metadata.

    Distributed tensors are gathered, so under FSDP2 every process has to call this.

    Raises:
        UnsupportedHostError: as for :func:`unwrap`.
    """
    state = unwrap(model).state_dict()
    full = OrderedDict((host_path(key), full_tensor(value)) for key, value in state.items())
    metadata: dict[str, Any] = getattr(state, "_metadata", {})
    vars(full)["_metadata"] = OrderedDict((host_path(path), entry) for path, entry in metadata.items())
    return full


def full_tensor(value: Tensor) -> Tensor:
    """Gathers a distributed tensor on every process; returns any other tensor unchanged."""
    gather: Any = getattr(value, "full_tensor", None)
    return value if gather is None else gather()


def copy_into(parameter: Tensor, value: Tensor) -> None:
    """Copies a tensor into a parameter of the same shape, which may be a distributed tensor."""
    mesh: Any = getattr(parameter, "device_mesh", None)
    if mesh is not None:
        from torch.distributed.tensor import distribute_tensor  # seconds to import, and imported where there is a mesh

        placements: Any = parameter.placements  # type: ignore[attr-defined]
        value = distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
    parameter.copy_(value)


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yields a model and the models that it wraps, the innermost last."""
    yield model
    if _COMPILED in model._modules:
        yield from _layers(model.get_submodule(_COMPILED))
    elif isinstance(model, (nn.DataParallel, DistributedDataParallel)):
        yield from _layers(model.module)
