"""The masks of a model on their own: their parameters, their state dict, and removing them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lamzoo.adapters.decay import restore_no_weight_decay
from lamzoo.adapters.hosts import (
    HostTakeover,
    SharedStateHook,
    adapters_of,
    check_restorable,
    remove_hooks,
    token_layout,
)
from lamzoo.adapters.wrappers import check_free, copy_into, full_state_dict, full_tensor, host_path, unwrap
from lamzoo.errors import MaskShapeError, StateDictError, UnsupportedHostError, class_name
from lamzoo.lam import Lam, LamConfig
from lamzoo.lam.layer import carried_configs, carried_grids, carry_configs
from lamzoo.lam.masks import PositionTable, drop_dead_biases
from lamzoo.lam.resize import Grid

_logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def lam_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yields the parameters of a model's masks, each once, and none of its host.

    Args:
        model: a model with masks, or a wrapper around one.

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
    """Returns the part of ``model.state_dict()`` that belongs to the masks, with the keys of the unwrapped model.

    Under FSDP2 the tensors are gathered, so every process has to call this. The ``LamConfig`` and the patch grids of
    position tables are stored in the ``_metadata`` of the result, where torch's state dicts keep the versions of
    modules; ``torch.save`` preserves it, a copy into a plain dictionary doesn't.

    Args:
        model: a model with masks, or a wrapper around one.

    Raises:
        UnsupportedHostError: the model has no masks.
    """
    masks = masks_of(model)
    prefixes = tuple(f"{path}." for path in masks)
    state = {key: value for key, value in full_state_dict(model).items() if key.startswith(prefixes)}
    tables = {path: lam.network.table for path, lam in masks.items() if lam.network is not None and lam.has_positions}
    grids: dict[str, Any] = {path: table.grid for path, table in tables.items() if table.grid is not None}
    return carry_configs(state, {path: lam.config for path, lam in masks.items()}, grids)


def load_lam_state_dict(model: nn.Module, state: Mapping[str, Tensor], *, config: LamConfig | None = None) -> list[str]:
    """Loads the result of :func:`lam_state_dict` into the masks of a model; the host doesn't change.

    A position table of another length or patch grid is resized by :func:`lamzoo.lam.resize_table`. A table of patches
    whose grid is unknown, of another length than the model's, is assumed to be a square, as timm assumes of position
    embeddings.

    Args:
        model: a model with masks of the same configuration, or a wrapper around one. Under FSDP2 every process has to
            call this with the same tensors.
        state: tensors by key, for every parameter of the masks and nothing else.
        config: the configuration that they were trained with, for a state dict without a ``LamConfig``; with neither,
            the state dict is loaded with a warning.

    Returns:
        The keys of the resized tables.

    Raises:
        StateDictError: the ``LamConfig`` differs, keys are missing or unexpected, or a shape doesn't fit; names them.
            Nothing is loaded.
        UnsupportedHostError: the model has no masks.
    """
    return load_masks(model, state, "The LAM state dict", config)


def load_masks(
    model: nn.Module, state: Mapping[str, Tensor], source: str, config: LamConfig | None = None
) -> list[str]:
    """Does :func:`load_lam_state_dict`, for a state dict that messages call ``source``."""
    check_lam_config(model, state, source, config)
    grids = {host_path(path): grid for path, grid in carried_grids(state).items()}
    prefixes = tuple(f"{path}." for path in masks_of(model))
    own = {host_path(key): value for key, value in unwrap(model).state_dict().items()}
    own = {key: value for key, value in own.items() if key.startswith(prefixes)}
    state = {host_path(key): full_tensor(value) for key, value in state.items()}
    if all(key.startswith("module.") for key in state) and not own.keys() & state.keys():
        state = {key.removeprefix("module."): value for key, value in state.items()}  # saved by 0.1.0 under DDP
    dead = [key for path, lam in masks_of(model).items() for key in drop_dead_biases(lam, state, f"{path}.")]
    if dead:
        _logger.info("dropped key-side biases, which have no effect in additive masks: %s", few(dead))
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        wrong = [f"{name} {few(keys)}" for name, keys in (("lacks", missing), ("has unexpected", unexpected)) if keys]
        raise StateDictError(
            f"{source} {' and '.join(wrong)}; load it into a model with the same host and the LamConfig that it was "
            "saved with."
        )
    fitting, resized = dict(state), list[str]()
    for path, table in unwrap(model).named_modules():
        if isinstance(table, PositionTable):
            weight, bias = (f"{host_path(path)}.{name}" for name in ("weight", "bias"))
            grid = grids.get(weight.removesuffix(".network.table.weight")) if table.grid is not None else None
            fits = grid in (None, table.grid) and state[weight].shape[1:2] == table.weight.shape[1:2]
            if not fits and _is_table(state[weight], state[bias], table):
                fitting[weight], fitting[bias] = _adapted(weight, state[weight], state[bias], table, grid)
                resized += [weight, bias]
    for key, value in state.items():
        if fitting[key].shape != own[key].shape:
            raise StateDictError(
                f"{source} has {key} of shape {tuple(value.shape)}, and the model's has {tuple(own[key].shape)}; use a "
                "host of the same widths, and the LamConfig that it was saved with."
            )
    with torch.no_grad():
        for key, value in fitting.items():
            copy_into(own[key], value)
    for lam in masks_of(model).values():
        lam.is_fresh = False
    for layer in unwrap(model).modules():
        if isinstance(layer, HostTakeover) and layer.is_fused:
            layer.fuse()
    return resized


def fit_tables(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Resizes the position tables in a model's state dict to the input size that the model has now, in place.

    A model whose input size was changed resizes its tables in each forward pass; one that is built at that size has
    tables of it.

    Args:
        model: a model, with masks or without.
        state: its state dict.
    """
    host = unwrap(model)
    for path, lam in host.named_modules():
        if not isinstance(lam, Lam) or lam.network is None or not lam.has_positions or lam.config.max_length:
            continue
        table: Any = lam.network.table
        layout = token_layout(host, path.rpartition(".")[0])
        if layout.length is None or layout.grid is None or table.grid in (None, layout.grid):
            continue
        weight, bias = (f"{host_path(path)}.network.table.{name}" for name in ("weight", "bias"))
        resized = table.resized(state[weight], state[bias], table.grid, layout.length, layout.grid)
        state[weight], state[bias] = resized


def check_lam_config(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    config: LamConfig | None = None,
    way_out: str = "give the model masks of {config}",
) -> None:
    """Compares the ``LamConfig`` in a state dict with the model's, since shapes alone don't tell masks apart.

    Args:
        model: a model with masks.
        state: a state dict with masks.
        source: name of the state dict, for messages.
        config: the configuration of its masks, if it carries none.
        way_out: ends the error message; ``{config}`` in it is replaced by the configuration of the masks in ``state``.

    Raises:
        StateDictError: the configurations differ; names the fields.
    """
    carried = carried_configs(state)
    unplaced = config or next(iter(carried.values()), None)  # if a converter renamed the layers
    for path, lam in masks_of(model).items():
        saved = carried.get(path, unplaced)
        if saved is None:
            _logger.warning(
                "%s doesn't contain the LamConfig that its masks were trained with; they are loaded as %s. If they had "
                "another one, pass it as lam=, or leave the masks out with lam_weights='fresh' in create_model, or "
                "pass config= to load_lam_state_dict; a file saved again with lamzoo contains it.",
                source, lam.config,
            )  # fmt: skip
            return
        different = lam.config.differences(saved)
        if different:
            theirs, ours = (
                ", ".join(f"{name}={getattr(it, name)!r}" for name in different) for it in (saved, lam.config)
            )
            raise StateDictError(
                f"{source} has masks with {theirs} and the model has {ours}; {way_out.format(config=_spelled(saved))}."
            )


def _spelled(config: LamConfig) -> str:
    changed = (f for f in dataclasses.fields(config) if getattr(config, f.name) != f.default)
    return f"LamConfig({', '.join(f'{f.name}={getattr(config, f.name)!r}' for f in changed)})"


def remove_lam(model: Model) -> Model:
    """Removes the masks of a model, and its token reduction, in place; attention layers get their original class back.

    Sets of masks that :func:`lamzoo.load_lam` loaded are forgotten; ``lamzoo.set_lam(model, None)`` keeps them.

    Args:
        model: a model with masks, or a wrapper around one.

    Returns:
        The same model. With its current weights, it computes the host's function without masks.

    Raises:
        UnsupportedHostError: the model has no masks, is distributed (DDP, FSDP), or has an attention layer that can't
            be replaced (named). The model is left unchanged.
    """
    masks_of(model)
    check_free(model)
    check_restorable(model)
    for adapter in adapters_of(model).values():
        adapter.unwrap(model)
    for module in model.modules():
        remove_hooks(module, (SharedStateHook,))
        for name in ("lam_blocks", "lam_config", "lam_parts", "lam_sets", "prune_config", "token_reduction"):
            vars(module).pop(name, None)
        restore_no_weight_decay(module)
    return model


def masks_of(model: nn.Module) -> dict[str, Lam]:
    """Returns the masks of a model by their path in the unwrapped model, such as ``"blocks.3.attn.lam"``.

    Raises:
        UnsupportedHostError: the model has no masks, or has a wrapper that hides them.
    """
    model = unwrap(model)
    masks = {host_path(path): module for path, module in model.named_modules() if isinstance(module, Lam)}
    if not masks:
        raise UnsupportedHostError(
            f"The model ({class_name(model)}) has no learnable masks; call lamzoo.add_lam(model) first."
        )
    return masks


def has_masks(module: nn.Module) -> bool:
    """Returns whether any layer of a module has a learnable mask, or the module is one."""
    return any(isinstance(part, Lam) for part in module.modules())


def _is_table(weight: Tensor, bias: Tensor, table: PositionTable) -> bool:
    """Returns whether these are the parameters of a table like this one, of whatever length."""
    return weight.ndim == 3 and bias.shape == weight.shape[:2] and weight.shape[0] == table.weight.shape[0]


def _adapted(key: str, weight: Tensor, bias: Tensor, table: PositionTable, grid: Grid | None) -> tuple[Tensor, Tensor]:
    try:
        return table.adapt(weight, bias, grid)
    except MaskShapeError as error:
        raise StateDictError(
            f"{key} can't be resized to {table.weight.shape[1]} positions: {error} Create the model with the image "
            "size that it was saved with."
        ) from None


def few(keys: Collection[str]) -> str:
    """Joins the first three names, for messages, and counts the others."""
    shown = ", ".join(list(keys)[:3])
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"
