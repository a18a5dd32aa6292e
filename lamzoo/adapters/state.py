"""The masks of a model as something of its own: their parameters, their state dict, and taking them out again."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from lamzoo.adapters.decay import restore_no_weight_decay
from lamzoo.adapters.hosts import HostTakeover, SharedStateHook, remove_hooks, replace_module
from lamzoo.adapters.wrappers import check_free, copy_into, full_state_dict, full_tensor, host_path, unwrap
from lamzoo.errors import MaskShapeError, StateDictError, UnsupportedHostError
from lamzoo.lam import Lam, LamConfig
from lamzoo.lam.layer import carried_configs, carry_configs
from lamzoo.lam.masks import PositionTable, drop_dead_biases

_logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def lam_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yields the parameters of a model's masks and none of its host's, each once.

    Args:
        model: a model that :func:`lamzoo.add_lam` gave masks, or a wrapper around one.

    Raises:
        UnsupportedHostError: the model has no masks.
    """
    seen: set[nn.Parameter] = set()
    for lam in masks_of(model).values():
        for parameter in lam.parameters():
            if parameter not in seen:
                seen.add(parameter)
                yield parameter


def lam_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns the part of ``model.state_dict()`` that belongs to the masks, under the keys of the unwrapped model.

    Under FSDP2 it is gathered, so that every process has to call this. It carries the ``LamConfig`` in its
    ``_metadata``, as torch's state dicts carry the versions of modules; ``torch.save`` keeps that, a copy into a plain
    dictionary doesn't.

    Args:
        model: a model that :func:`lamzoo.add_lam` gave masks, or a wrapper around one.

    Raises:
        UnsupportedHostError: the model has no masks.
    """
    masks = masks_of(model)
    prefixes = tuple(f"{path}." for path in masks)
    state = {key: value for key, value in full_state_dict(model).items() if key.startswith(prefixes)}
    return carry_configs(state, {path: lam.config for path, lam in masks.items()})


def load_lam_state_dict(model: nn.Module, state: Mapping[str, Tensor], *, config: LamConfig | None = None) -> list[str]:
    """Loads into a model's masks what :func:`lam_state_dict` gave; the host stays as it is.

    A position table of another length is resized to the model's, as :func:`lamzoo.lam.resize_table` does. A table
    of patches is taken to be square where it isn't as long as the model's, like timm takes position embeddings.

    Args:
        model: a model with masks of the same configuration, or a wrapper around one; under FSDP2 too, where every
            process has to call this with the same tensors.
        state: tensors by key, for every parameter of the masks and nothing else.
        config: what they were trained with, for a state dict that carries no ``LamConfig``; without either, it is
            loaded with a warning.

    Returns:
        The keys of the tables that were resized.

    Raises:
        StateDictError: another ``LamConfig``, a key too many or too few, or a shape that doesn't fit; names them.
            Nothing is loaded.
        UnsupportedHostError: the model has no masks.
    """
    check_lam_config(model, state, "The LAM state dict", config)
    prefixes = tuple(f"{path}." for path in masks_of(model))
    own = {host_path(key): value for key, value in unwrap(model).state_dict().items()}
    own = {key: value for key, value in own.items() if key.startswith(prefixes)}
    state = {host_path(key): full_tensor(value) for key, value in state.items()}
    if all(key.startswith("module.") for key in state) and not own.keys() & state.keys():
        state = {key.removeprefix("module."): value for key, value in state.items()}  # saved by 0.1.0 under DDP
    dead = [key for path, lam in masks_of(model).items() for key in drop_dead_biases(lam, state, f"{path}.")]
    if dead:
        _logger.info("key-side biases left out, which change nothing in additive masks: %s", few(dead))
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        wrong = [f"{name} {few(keys)}" for name, keys in (("lacks", missing), ("has too", unexpected)) if keys]
        raise StateDictError(
            f"The LAM state dict {' and '.join(wrong)}; load it into a model with the same host and the LamConfig that "
            "it was saved with."
        )
    fitting, resized = dict(state), list[str]()
    for path, table in unwrap(model).named_modules():
        if isinstance(table, PositionTable):
            weight, bias = (f"{host_path(path)}.{name}" for name in ("weight", "bias"))
            if state[weight].shape[1:2] != table.weight.shape[1:2] and _is_table(state[weight], state[bias], table):
                fitting[weight], fitting[bias] = _adapted(weight, state[weight], state[bias], table)
                resized += [weight, bias]
    for key, value in state.items():
        if fitting[key].shape != own[key].shape:
            raise StateDictError(
                f"{key} has shape {tuple(value.shape)} in the LAM state dict and {tuple(own[key].shape)} in the model; "
                "the LamConfig must be the one it was saved with."
            )
    with torch.no_grad():
        for key, value in fitting.items():
            copy_into(own[key], value)
    for lam in masks_of(model).values():
        lam.is_fresh = False
    return resized


def check_lam_config(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    config: LamConfig | None = None,
    way_out: str = "give the model masks of {config}",
) -> None:
    """Compares the masks in a state dict with a model's by their meaning, which shapes don't tell.

    Args:
        model: with masks.
        state: holds masks.
        source: what to call it in messages.
        config: that of its masks, where it carries none.
        way_out: for the message; ``{config}`` in it becomes the configuration of the masks in ``state``.

    Raises:
        StateDictError: they differ; names the fields.
    """
    carried = carried_configs(state)
    unplaced = config or next(iter(carried.values()), None)  # where a converter has renamed the layers
    for path, lam in masks_of(model).items():
        saved = carried.get(path, unplaced)
        if saved is None:
            _logger.warning(
                "%s doesn't say which LamConfig its masks were trained with; they are loaded as masks of %s. If they "
                "are others, pass theirs as lam= or leave them out with lam_weights='fresh' in create_model, or pass "
                "config= to load_lam_state_dict; a file saved again with lamzoo carries it.",
                source, lam.config,
            )  # fmt: skip
            return
        different = lam.config.differences(saved)
        if different:
            theirs, ours = (
                ", ".join(f"{name}={getattr(it, name)!r}" for name in different) for it in (saved, lam.config)
            )
            raise StateDictError(
                f"{source} has masks of {theirs} and the model's are of {ours}; "
                f"{way_out.format(config=_spelled(saved))}."
            )


def _spelled(config: LamConfig) -> str:
    changed = (f for f in dataclasses.fields(config) if getattr(config, f.name) != f.default)
    return f"LamConfig({', '.join(f'{f.name}={getattr(config, f.name)!r}' for f in changed)})"


def remove_lam(model: Model) -> Model:
    """Takes masks, and pruning by them, out of a model again, in place: every attention layer gets its own class back.

    Args:
        model: a model that :func:`lamzoo.add_lam` gave masks.

    Returns:
        The same model, which computes what it did before it had masks, with the weights it has now.

    Raises:
        UnsupportedHostError: the model has no masks, or is distributed (DDP, FSDP).
    """
    masks_of(model)
    check_free(model)
    released: dict[nn.Module, nn.Module] = {}  # a layer may be used in several places
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, HostTakeover):
            if module not in released:
                released[module] = module.release()
            replace_module(model, path, released[module])
    for module in model.modules():
        remove_hooks(module, (SharedStateHook,))
        for name in ("lam_config", "prune_config"):
            vars(module).pop(name, None)
        restore_no_weight_decay(module)
    return model


def masks_of(model: nn.Module) -> dict[str, Lam]:
    """Returns a model's masks by their path in the unwrapped model, such as ``"blocks.3.attn.lam"``.

    Raises:
        UnsupportedHostError: the model has none, or a wrapper that hides them.
    """
    model = unwrap(model)
    masks = {host_path(path): module for path, module in model.named_modules() if isinstance(module, Lam)}
    if not masks:
        raise UnsupportedHostError(
            f"This {type(model).__name__} has no learnable masks; call lamzoo.add_lam(model) first."
        )
    return masks


def _is_table(weight: Tensor, bias: Tensor, table: PositionTable) -> bool:
    """Returns whether these are the parameters of a table like this one, of whatever length."""
    return weight.ndim == 3 and bias.shape == weight.shape[:2] and weight.shape[0] == table.weight.shape[0]


def _adapted(key: str, weight: Tensor, bias: Tensor, table: PositionTable) -> tuple[Tensor, Tensor]:
    try:
        return table.adapt(weight, bias)
    except MaskShapeError as error:
        raise StateDictError(
            f"{key} can't be resized to {table.weight.shape[1]} positions: {error} Create the model with the image "
            "size that it was saved with."
        ) from None


def few(keys: Collection[str]) -> str:
    """Returns the first names of many, for messages."""
    shown = ", ".join(list(keys)[:3])
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"
