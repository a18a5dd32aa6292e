"""Several sets of masks for one model, of which one is active: adding sets, and switching between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lamzoo.adapters.add import add_lam, add_lam_to
from lamzoo.adapters.deploy import fuse_layers, is_fused
from lamzoo.adapters.state import lam_state_dict, load_masks, masks_of, remove_lam
from lamzoo.adapters.wrappers import copy_into, full_tensor, host_path, unwrap
from lamzoo.errors import ConfigError, LamzooError, UnsupportedHostError, class_name
from lamzoo.lam import Lam, LamConfig

Model = TypeVar("Model", bound=nn.Module)

#: Name of the set of masks that :func:`lamzoo.add_lam` added, and of the one that is loaded without a name.
DEFAULT = "default"


@dataclass
class MaskSet:
    """Masks of a model, and the other parameters that were trained with them.

    Attributes:
        config: of the masks; None for the model without masks.
        parts: the parts of the model that have masks, as of :func:`lamzoo.adapters.add_lam_to`; None for all of it.
        masks: state dict of the masks, which carries their ``LamConfig``.
        others: further tensors by their key in the model's state dict, such as those of the classifier.
        label_names: class names of that classifier.
    """

    config: LamConfig | None = None
    parts: Mapping[str, int | None] | None = None
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)
    label_names: tuple[str, ...] | None = None

    def has_layers_of(self, other: MaskSet) -> bool:
        """Returns whether masks of both sets fit into the same layers, without resizing."""
        if self.config is None or other.config is None:
            return self.config is other.config
        same_length = self.config.max_length == other.config.max_length
        return same_length and self.parts == other.parts and not self.config.differences(other.config)


class MaskSets:
    """The sets of masks of one model; the model itself has the tensors of the active one.

    Attributes:
        active: name of the active set; None for no masks.
        stored: the sets by name; None is the model without masks, with its own values of what sets replace.
    """

    def __init__(self, model: nn.Module) -> None:
        host = unwrap(model)
        cfg = getattr(host, "pretrained_cfg", None) or {}
        self.stored: dict[str | None, MaskSet] = {None: MaskSet(label_names=cfg.get("label_names"))}
        self.active: str | None = None

    def add(self, model: nn.Module, name: str, new: MaskSet, source: str) -> None:
        """Adds a set to the model and makes it the active one; on an error both stay as they were.

        Args:
            model: the model that has these sets.
            name: of the set; one of the same name is replaced.
            new: the set; tables of another image size are resized.
            source: what the set was read from, for messages.

        Raises:
            LamzooError: the set doesn't fit the model.
        """
        self.update(model)
        own = _state(model)
        plain = self.stored[None]
        plain.others |= {key: full_tensor(own[key]).detach().clone() for key in new.others if key not in plain.others}
        before = self.stored[self.active]
        try:
            self._install(model, new, source)
        except LamzooError:
            if not new.has_layers_of(before):
                self._install(model, before, source)
            raise
        self.active, self.stored[name] = name, new

    def switch(self, model: nn.Module, name: str | None) -> None:
        """Makes a stored set the active one."""
        self.update(model)
        self._install(model, self.stored[name], "The set")
        self.active = name

    def update(self, model: nn.Module) -> None:
        """Copies the tensors of the active set, which may have been trained, from the model."""
        host: Any = unwrap(model)
        if self.active is None and _masks(model):
            if DEFAULT in self.stored:
                raise UnsupportedHostError(
                    f"The model ({class_name(host)}) got masks besides its set {DEFAULT!r}; call "
                    "lamzoo.remove_lam(model), which forgets its sets, or don't call add_lam."
                )
            if getattr(host, "lam_config", None) is None:
                raise UnsupportedHostError(
                    f"The masks of the model ({class_name(host)}) were added to a part of it; load and switch sets of "
                    "that part."
                )
            self.active = DEFAULT
            self.stored[DEFAULT] = MaskSet(host.lam_config, getattr(host, "lam_parts", None))
        own, current, plain = _state(model), self.stored[self.active], self.stored[None]
        for key in plain.others:
            (current if key in current.others else plain).others[key] = full_tensor(own[key]).detach().clone()
        if current.config is not None:
            current.masks = cloned_masks(model)

    def _install(self, model: nn.Module, target: MaskSet, source: str) -> None:
        """Gives the model the masks and other tensors of a set."""
        host: Any = unwrap(model)
        present = MaskSet(getattr(host, "lam_config", None), getattr(host, "lam_parts", None))
        if not target.has_layers_of(present) or bool(_masks(model)) != (target.config is not None):
            self._replace_masks(model, target)
        if target.config is not None:
            load_masks(model, target.masks, source, target.config)
        own, plain = _state(model), self.stored[None]
        with torch.no_grad():
            for key, value in (plain.others | target.others).items():
                copy_into(own[key], value)
        names = target.label_names or plain.label_names
        cfg = getattr(host, "pretrained_cfg", None)
        if cfg is not None and cfg.get("label_names") != names:
            host.pretrained_cfg = host.default_cfg = {**cfg, "label_names": names}

    def _replace_masks(self, model: nn.Module, target: MaskSet) -> None:
        host: Any = unwrap(model)
        masks = _masks(model)
        change = f"The masks of the model ({class_name(host)}) can't be replaced by masks of another LamConfig or none"
        reduced = ({"token_reduction", "prune_config"} & vars(module).keys() for module in host.modules())
        if masks and any(reduced):
            raise UnsupportedHostError(f"{change} while its tokens are merged or pruned; call remove_reduction first.")
        if any(lam.recorder is not None for lam in masks):
            raise UnsupportedHostError(f"{change} while capture_masks records them; leave its context first.")
        fused = is_fused(host)
        frozen = bool(masks) and not any(parameter.requires_grad for lam in masks for parameter in lam.parameters())
        sets = vars(host).get("lam_sets")
        if masks:
            remove_lam(model)
        if sets is not None:
            host.lam_sets = sets  # which remove_lam forgets
        if target.config is None:
            return
        if target.parts is None:
            add_lam(model, target.config)
        else:
            add_lam_to(host, target.parts, target.config)
        if frozen:
            for lam in _masks(model):
                lam.requires_grad_(False)
        if fused:
            fuse_layers(host)


def set_lam(model: Model, name: str | None) -> Model:
    """Makes a set of masks that :func:`lamzoo.load_lam` loaded the active one of a model, in place.

    Only the active set is part of the model: of its ``state_dict``, of what is saved, exported, captured and trained.
    The tensors of the others are kept aside; those of the set that was active are kept as they are now. Parameters that
    sets bring besides masks, such as a classifier, are switched with them; a set without them has those of the base.

    Sets of one ``LamConfig`` share the mask networks, whose parameters get other values: optimisers, fused layers,
    merged tokens, ``capture_masks`` and wrappers stay valid. For a set of another configuration, and for None, the
    networks are replaced, which compiles a compiled model again. Then a fused model stays fused, frozen masks stay
    frozen, and it is refused while tokens are merged or masks captured, and of a distributed model.
    :func:`lamzoo.remove_lam` removes the active masks and forgets all sets.

    Args:
        model: a model with masks, or a wrapper around one.
        name: the name that the set was loaded under; ``"default"`` for masks of :func:`lamzoo.add_lam`; None for no
            masks, and the base's own values of all that sets replaced.

    Returns:
        The same model.

    Raises:
        ConfigError: there is no set of that name; lists the names.
        UnsupportedHostError: the model has no masks, or can't get those of another configuration now.
    """
    host: Any = unwrap(model)
    sets = sets_of(model)
    if not sets.stored.keys() - {None}:
        masks_of(model)
        sets.update(model)
    if name not in sets.stored:
        names = ", ".join(repr(each) for each in sets.stored if each is not None)
        raise ConfigError(
            f"The model ({class_name(host)}) has no set of masks named {name!r}, only {names}; load it with "
            f"lamzoo.load_lam(model, folder, name={name!r})."
        )
    sets.switch(model, name)
    host.lam_sets = sets
    return model


def sets_of(model: nn.Module) -> MaskSets:
    """Returns the sets of masks of a model; new ones, which the model doesn't have yet, if it has none.

    Raises:
        UnsupportedHostError: peft holds the masks.
    """
    host: Any = unwrap(model)
    if any(".modules_to_save." in path for path, module in host.named_modules() if isinstance(module, Lam)):
        raise UnsupportedHostError(
            f"The masks of the model ({class_name(host)}) are held by peft, which saves and switches them with its own "
            "save_pretrained and set_adapter; call merge_and_unload before this function."
        )
    return getattr(host, "lam_sets", None) or MaskSets(host)


def cloned_masks(model: nn.Module) -> dict[str, Tensor]:
    """Returns the result of :func:`lamzoo.lam_state_dict`, as copies."""
    state = lam_state_dict(model)
    for key, value in state.items():
        state[key] = value.detach().clone()  # in place, as the dictionary carries the LamConfig
    return state


def _masks(model: nn.Module) -> list[Lam]:
    return [module for module in unwrap(model).modules() if isinstance(module, Lam)]


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {host_path(key): value for key, value in unwrap(model).state_dict().items()}
