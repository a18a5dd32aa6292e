"""Several sets of masks for one model, of which one is active: adding sets, and switching between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lamzoo.adapters.add import add_lam, add_lam_to
from lamzoo.adapters.deploy import fuse_layers, is_fused
from lamzoo.adapters.hosts import HostTakeover, adapters_of
from lamzoo.adapters.state import lam_state_dict, load_masks, masks_of, remove_lam
from lamzoo.adapters.wrappers import check_free, compiled_parts, copy_into, full_tensor, host_path, unwrap
from lamzoo.errors import ConfigError, StateDictError, UnsupportedHostError, class_name
from lamzoo.lam import Lam, LamConfig, MaskNetwork

Model = TypeVar("Model", bound=nn.Module)

#: Name of the set of masks that :func:`lamzoo.add_lam` added, and of the one that is loaded without a name.
DEFAULT = "default"
_ALLOCATED = 2**24  # numbers that are allocated unchecked, so that a set which lacks a few keys is told by name


@dataclass
class MaskSet:
    """Masks of a model, and the other parameters that were trained with them.

    Attributes:
        config: of the masks; None for the model without masks.
        parts: the parts of the model that have masks, as of :func:`lamzoo.adapters.add_lam_to`; None for all of it.
        masks: state dict of the masks, which carries their ``LamConfig``.
        others: further tensors by their key in the model's state dict, such as those of the classifier.
        label_names: class names of that classifier.
        fresh: whether the masks are as they were initialised; see :class:`lamzoo.lam.Lam`.
    """

    config: LamConfig | None = None
    parts: Mapping[str, int | None] | None = None
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)
    label_names: tuple[str, ...] | None = None
    fresh: bool = False

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
        fused: whether masks get their fused form, where they have one.
        frozen: whether the parameters of new mask networks are frozen.
    """

    def __init__(self, model: nn.Module) -> None:
        host = unwrap(model)
        cfg = getattr(host, "pretrained_cfg", None) or {}
        self.stored: dict[str | None, MaskSet] = {None: MaskSet(label_names=cfg.get("label_names"))}
        self.active: str | None = None
        self.fused = self.frozen = False

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
        self._change(model, new, source)
        self.active, self.stored[name] = name, new

    def switch(self, model: nn.Module, name: str | None) -> None:
        """Makes a stored set the active one; on an error the model stays as it was."""
        self.update(model)
        self._change(model, self.stored[name], "The set")
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
            holder = current if key in current.others else plain
            if _fits(own, key, holder.others[key]):
                holder.others[key] = full_tensor(own[key]).detach().clone()
        masks = _masks(model)
        if current.config is not None and masks:  # which an interrupted switch may have removed
            current.masks = cloned_masks(model)
            current.fresh = all(lam.is_fresh for lam in masks)
            self.frozen = not any(parameter.requires_grad for lam in masks for parameter in lam.parameters())
            layers = (layer for layer in host.modules() if isinstance(layer, HostTakeover))
            if any(layer.no_fused_form() is None for layer in layers):
                self.fused = is_fused(host)

    def _change(self, model: nn.Module, target: MaskSet, source: str) -> None:
        """Installs a set; on an error, installs the active one again."""
        own = _state(model)
        for key, value in (self.stored[None].others | target.others).items():
            if not _fits(own, key, value):
                size = f"has it of shape {tuple(own[key].shape)}" if key in own else "lacks it"
                raise UnsupportedHostError(
                    f"The sets of masks have {key} of shape {tuple(value.shape)}, and the model "
                    f"({class_name(unwrap(model))}) {size} now; give it that size again, as model.reset_classifier "
                    "does, or call lamzoo.remove_lam(model), which forgets the sets."
                )
        before = self.stored[self.active]
        try:
            self._install(model, target, source)
        except BaseException:  # an interrupt as well
            self._install(model, before, source)
            raise

    def _install(self, model: nn.Module, target: MaskSet, source: str) -> None:
        """Gives the model the masks and other tensors of a set."""
        host: Any = unwrap(model)
        present = MaskSet(getattr(host, "lam_config", None), getattr(host, "lam_parts", None))
        if not target.has_layers_of(present) or bool(_masks(model)) != (target.config is not None):
            self._replace_masks(model, target, source)
        if target.config is not None:
            load_masks(model, target.masks, source, target.config)
            for lam in _masks(model):
                lam.is_fresh = target.fresh
        own, plain = _state(model), self.stored[None]
        with torch.no_grad():
            for key, value in (plain.others | target.others).items():
                if _fits(own, key, value):
                    copy_into(own[key], value)
        names = target.label_names or plain.label_names
        cfg = getattr(host, "pretrained_cfg", None)
        if cfg is not None and cfg.get("label_names") != names:
            host.pretrained_cfg = host.default_cfg = {**cfg, "label_names": names}

    def _replace_masks(self, model: nn.Module, target: MaskSet, source: str) -> None:
        host: Any = unwrap(model)
        masks = _masks(model)
        change = f"The masks of the model ({class_name(host)}) can't be replaced by masks of another LamConfig or none"
        reduced = ({"token_reduction", "prune_config"} & vars(module).keys() for module in host.modules())
        if masks and any(reduced):
            raise UnsupportedHostError(f"{change} while its tokens are merged or pruned; call remove_reduction first.")
        if any(lam.recorder is not None for lam in masks):
            raise UnsupportedHostError(f"{change} while capture_masks records them; leave its context first.")
        check_free(model)
        if masks and target.config is not None and (parts := compiled_parts(host)):
            raise UnsupportedHostError(f"{change} while {parts[0]} is compiled; compile the whole model instead.")
        sets = vars(host).get("lam_sets")
        try:
            if masks:
                remove_lam(model)
        finally:
            if sets is not None:
                host.lam_sets = sets  # which remove_lam forgets
        if target.config is None:
            return
        stored = sum(value.numel() for value in target.masks.values())
        if max(stored, _ALLOCATED) < (needed := _least_size(host, target)):  # from a file, before any is allocated
            raise StateDictError(
                f"{source} has no mask as large as its LamConfig says: at least {needed} numbers, and it has {stored}."
            )
        if target.parts is None:
            add_lam(model, target.config)
        else:
            add_lam_to(host, target.parts, target.config)
        if self.frozen:
            for lam in _masks(model):
                lam.requires_grad_(False)
        if self.fused:
            fuse_layers(host)


def set_lam(model: Model, name: str | None) -> Model:
    """Makes a set of masks that :func:`lamzoo.load_lam` loaded the active one of a model, in place.

    Only the active set is part of the model: of its ``state_dict``, of what is saved, exported, captured and trained.
    The tensors of the others are kept aside; those of the set that was active are kept as they are now. Parameters that
    sets bring besides masks, such as a classifier, are switched with them; a set without them has those of the base.

    Sets of one ``LamConfig`` share the mask networks, whose parameters get other values: optimisers, fused layers,
    merged tokens, ``capture_masks`` and wrappers stay valid. For a set of another configuration, and for None, the
    networks are replaced, which compiles a compiled model again. A fused model is fused again where the masks have a
    fused form, and frozen masks come back frozen, also after None. Such a switch is refused while tokens are merged or
    masks captured, of a distributed model, and of one that is compiled in parts.
    :func:`lamzoo.remove_lam` removes the active masks and forgets all sets.

    Args:
        model: a model with masks, or a wrapper around one.
        name: the name that the set was loaded under; ``"default"`` for masks of :func:`lamzoo.add_lam`; None for no
            masks, and the base's own values of all that sets replaced.

    Returns:
        The same model.

    Raises:
        ConfigError: there is no set of that name; lists the names.
        UnsupportedHostError: the model has no masks, or has them in some of its blocks only, can't get those of another
            configuration now, or lacks a parameter of the sets, or has it in another size, as after
            ``reset_classifier``.
        StateDictError: the layers of the model have changed, and the masks don't fit them.
            After each error the model has the masks that it had.
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
        UnsupportedHostError: peft holds the masks, or only some of the blocks have them.
    """
    host: Any = unwrap(model)
    if hasattr(host, "lam_blocks"):
        raise UnsupportedHostError(
            f"Only the blocks {host.lam_blocks} of the model ({class_name(host)}) have masks, and sets of masks have "
            "them in all; save and load the whole model with lamzoo.save_pretrained and lamzoo.create_model."
        )
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


def _least_size(host: nn.Module, target: MaskSet) -> int:
    """Returns how many numbers the masks of a set have, at one position for tables whose length the host says."""
    assert target.config is not None
    size, paths = 0, {path for path, _ in host.named_modules()}
    for path, length in (target.parts or {"": None}).items():
        part, config = host.get_submodule(path if path in paths else ""), target.config.with_length(length)
        sites = [site for adapter in adapters_of(part).values() for site in adapter.sites(part)]
        if config.layers == "single":
            sites = list({site.stack: site for site in sites}.values())
        modalities = getattr(part, "modality_lengths", ())
        with torch.device("meta"):
            networks = [
                MaskNetwork(config, each.query_dim, each.key_dim, each.num_heads, length=1, modality_lengths=modalities)
                for each in sites
            ]
        size += sum(parameter.numel() for network in networks for parameter in network.parameters())
    return size


def _masks(model: nn.Module) -> list[Lam]:
    return [module for module in unwrap(model).modules() if isinstance(module, Lam)]


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {host_path(key): value for key, value in unwrap(model).state_dict().items()}


def _fits(own: Mapping[str, Tensor], key: str, value: Tensor) -> bool:
    return key in own and own[key].shape == value.shape
