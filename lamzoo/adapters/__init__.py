"""Learnable masks in models that exist already: :func:`add_lam` and what goes with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from lamzoo.adapters import mha, timm, zoo
from lamzoo.adapters.capture import capture_masks
from lamzoo.adapters.decay import exempt_from_weight_decay
from lamzoo.adapters.hosts import EnterBlock, LeaveBlock, Slot, watch_block
from lamzoo.adapters.state import lam_parameters, lam_state_dict, load_lam_state_dict, remove_lam
from lamzoo.adapters.wrappers import check_free, compiled_parts, unwrap
from lamzoo.errors import ConfigError, UnsupportedHostError
from lamzoo.lam import Lam, LamConfig, MaskNetwork, SharedState
from lamzoo.lazy import submodules_of

__all__ = [
    "add_lam",
    "capture_masks",
    "lam_parameters",
    "lam_state_dict",
    "load_lam_state_dict",
    "remove_lam",
]

if not TYPE_CHECKING:  # a type checker would believe any name
    __getattr__ = submodules_of(__name__)

Model = TypeVar("Model", bound=nn.Module)


def _open_clip_slots(model: nn.Module) -> Iterator[Slot]:
    # open_clip is an optional dependency: whoever has a model of it has it.
    if any(cls.__module__.startswith("open_clip.") for module in model.modules() for cls in type(module).__mro__):
        from lamzoo.adapters import open_clip

        yield from open_clip.slots(model)


def _transformers_slots(model: nn.Module) -> Iterator[Slot]:
    """Yields nothing: attention of Hugging Face transformers can't carry a mask.

    Its models would otherwise get masks in the few ``nn.MultiheadAttention`` that some have beside their own attention,
    such as SigLIP's pooling head. Its wrappers of timm models have no attention of their own.

    Raises:
        UnsupportedHostError: the model is, or contains, one of its models or a part of one with attention; names it.
    """
    for path, module in model.named_modules():
        classes = [f"{cls.__module__}.{cls.__name__}" for cls in type(module).__mro__]
        if not any(name.startswith("transformers.") for name in classes):
            continue
        attends = any(isinstance(child, nn.MultiheadAttention) for child in module.children())
        wraps_timm = classes[0].startswith("transformers.models.timm_")
        if attends or ("transformers.modeling_utils.PreTrainedModel" in classes and not wraps_timm):
            raise UnsupportedHostError(
                f"{path or 'The model'} is a {type(module).__name__} of Hugging Face transformers, whose attention "
                "lamzoo can't mask; give add_lam a part of the model without it, or a model of timm or open_clip."
            )
    return iter(())


_ADAPTERS = (timm.slots, _open_clip_slots, _transformers_slots, mha.slots, zoo.slots)


def add_lam(model: Model, config: LamConfig | Mapping[str, Any] | bool | None = None) -> Model:
    """Gives every attention layer of a model a learnable mask, in place.

    Serves timm's vision transformers, open_clip's towers and every ``torch.nn.MultiheadAttention``, those of torch's
    own transformer layers included. The state-dict keys of the host stay as they are; those of the masks contain
    ``.lam.``. With the default ``init="identity"`` the model's outputs don't change until the masks are trained.

    Args:
        model: the host; ``torch.compile`` or ``nn.DataParallel`` may be around it, and compile it anew.
        config: what the masks are made of, also as a dict of the fields; ``LamConfig()`` by default.

    Returns:
        The same object. The model in it now has the attribute ``lam_config``, and the masks' position tables and biases
        in its ``no_weight_decay()``.

    Raises:
        UnsupportedHostError: the model has a block that can't carry a mask (named), no such block at all, masks
            already, or a part that is a model of Hugging Face transformers, or it is distributed (DDP, FSDP) or
            compiled in parts. The model is left as it was.
        ConfigError: position keys in a host of unknown length, or in one whose tokens have no fixed positions; a
            configuration that means nothing.
    """
    config = LamConfig() if config is None else LamConfig.of(config)
    if any(isinstance(module, Lam) for module in model.modules()):
        raise UnsupportedHostError(
            f"This {type(model).__name__} already has learnable masks; call lamzoo.remove_lam(model) first."
        )
    check_free(model)
    host = unwrap(model)
    if parts := compiled_parts(host):
        raise UnsupportedHostError(f"{parts[0]} of this {type(host).__name__} is compiled; add masks before that.")
    slots = [slot for adapter in _ADAPTERS for slot in adapter(host)]
    if not slots:
        raise UnsupportedHostError(
            f"{type(host).__name__} has no attention layer that lamzoo knows; "
            "it serves timm's vision transformers, open_clip's towers and nn.MultiheadAttention."
        )
    stacks = [list(stack) for _, stack in groupby(slots, key=lambda slot: slot.stack)]
    built = [(stack, *_build_stack(host, stack, config)) for stack in stacks]
    # Nothing of the model is touched before every mask could be built.
    for stack, shared, lams in built:
        _watch_passes(host, stack, config, shared)
        for slot, lam in zip(stack, lams, strict=True):
            slot.attach(lam)
    host.lam_config = config  # type: ignore[assignment]
    exempt_from_weight_decay(host)
    return model


def _build_stack(model: nn.Module, slots: list[Slot], config: LamConfig) -> tuple[SharedState, list[Lam]]:
    shared = SharedState()
    uses = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    places = [uses[model.get_submodule(slot.path)] for slot in slots]
    lams = []
    for index, slot in enumerate(slots):
        if config.has_positions and slot.no_positions is not None:
            raise ConfigError(
                f"{slot.path} can't have a mask with keys='position': {slot.no_positions}; use keys='content'."
            )
        network = None
        if config.layers == "multi" or index == 0:
            network = MaskNetwork(
                config,
                slot.query_dim,
                slot.key_dim,
                slot.num_heads,
                length=slot.length,
                num_prefix_tokens=slot.num_prefix_tokens,
                grid=slot.grid,
            ).to(slot.like)
        lam = Lam(config, network, shared, is_last=places[-1] == 1 and index == len(slots) - 1)
        lams.append(lam.train(model.get_submodule(slot.path).training))
        if all(count == 1 for count in places):
            shared.join(lam, index)
    return shared, lams


def _watch_passes(model: nn.Module, slots: list[Slot], config: LamConfig, shared: SharedState) -> None:
    watch_grid = slots[0].watch_grid if config.has_positions else None
    if watch_grid is not None:
        watch_grid(shared)
    if watch_grid is not None or config.layers == "single":
        for index, slot in enumerate(slots):
            block = model.get_submodule(slot.path.rpartition(".")[0])
            watch_block(block, EnterBlock(shared, watch_grid is not None or index > 0), LeaveBlock(shared))
