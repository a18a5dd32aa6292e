"""Adding learnable masks to existing models: :func:`add_lam`, and :func:`add_lam_to` for parts of a model."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from lamzoo.adapters.decay import exempt_from_weight_decay
from lamzoo.adapters.hosts import (
    AttentionSite,
    EnterBlock,
    HostAdapter,
    LeaveBlock,
    NoteGrid,
    TakeoverAdapter,
    TokenLayout,
    adapters_of,
    check_replaceable,
    floating_parameter,
    watch_block,
    watch_grid,
)
from lamzoo.adapters.state import has_masks
from lamzoo.adapters.wrappers import check_free, check_model, compiled_parts, unwrap
from lamzoo.errors import ConfigError, UnsupportedHostError, class_name
from lamzoo.lam import Lam, LamConfig, MaskNetwork, SharedState
from lamzoo.lam.unmasked import Unmasked

_logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def add_lam(model: Model, config: LamConfig | Mapping[str, Any] | bool | None = None) -> Model:
    """Adds a learnable mask to every attention layer of a model, in place.

    Supports timm's vision transformers, open_clip's towers, the models of Hugging Face transformers that use its
    ``AttentionInterface``, ViLT, FLAVA and TimeSformer, and every ``torch.nn.MultiheadAttention``, those of torch's own
    transformer layers included.
    The state-dict keys of the host don't change; those of the masks contain ``.lam.``. With the default
    ``init="identity"`` the outputs of the model don't change until the masks are trained.

    Args:
        model: the host, possibly wrapped by ``torch.compile``, which recompiles it, or ``nn.DataParallel``.
        config: configuration of the masks, also as a dict of its fields; ``LamConfig()`` by default.

    Returns:
        The same object. The model in it gets the attribute ``lam_config``, and its ``no_weight_decay()`` includes the
        position tables and biases of the masks.

    Raises:
        UnsupportedHostError: the model has an attention layer that can't carry a mask or be replaced (named), no
            attention layer, or masks already; it is distributed (DDP, FSDP) or compiled in parts, or no
            ``torch.nn.Module``. The model is left unchanged.
        ConfigError: the configuration is invalid, or has position keys for a host of unknown length or without fixed
            token positions.
    """
    check_model(model)
    config = LamConfig() if config is None else LamConfig.of(config)
    if has_masks(model):
        raise UnsupportedHostError(
            f"The model ({class_name(model)}) already has learnable masks; call lamzoo.remove_lam(model) first."
        )
    if any(isinstance(module, Unmasked) for module in model.modules()):
        raise UnsupportedHostError(
            f"The tokens of the model ({class_name(model)}) are merged; call lamzoo.remove_reduction(model), add the "
            "masks, and merge again."
        )
    check_free(model)
    host = unwrap(model)
    if _is_of_peft(host):
        raise UnsupportedHostError(
            f"The model ({class_name(host)}) is wrapped by peft, which stores no masks that are added to it now; add "
            "the masks before peft.get_peft_model, and name them in its modules_to_save."
        )
    if parts := compiled_parts(host):
        raise UnsupportedHostError(
            f"{parts[0]} of the model ({class_name(host)}) is compiled; add masks before compiling."
        )
    found = {site: adapter for adapter in adapters_of(host).values() for site in adapter.sites(host)}
    if not found:
        raise UnsupportedHostError(
            f"The model ({class_name(host)}) has no attention layer that can carry a mask; add_lam supports timm's "
            "vision transformers, open_clip's towers, the AttentionInterface of Hugging Face transformers and "
            "nn.MultiheadAttention."
        )
    for site, adapter in found.items():
        layer = host.get_submodule(site.path)
        if isinstance(adapter, TakeoverAdapter) and type(layer) in adapter.takeovers:
            check_replaceable(site.path, layer)
    sites: dict[str, dict[AttentionSite, HostAdapter]] = {}  # by stack
    for site, adapter in found.items():
        sites.setdefault(site.stack, {})[site] = adapter
    stacks = [_Stack(host, stack, config) for stack in sites.values()]  # all masks, before the model is changed
    for stack in stacks:
        stack.watch_passes(host, config)
    for adapter in dict.fromkeys(found.values()):
        lams = {site: lam for stack in stacks for site, lam in stack.lams.items() if found[site] is adapter}
        adapter.wrap(host, lams)
    host.lam_config = config  # type: ignore[assignment]
    exempt_from_weight_decay(host)
    if any(map(_is_of_peft, host.modules())):
        _logger.warning(
            "The model (%s) has layers of peft, whose save_pretrained stores no masks that are added to it now; store "
            "them with lamzoo.save_lam, or add them before peft.get_peft_model and name them in its modules_to_save.",
            class_name(host),
        )
    return model


def add_lam_to(model: Model, lengths: Mapping[str, int | None], config: LamConfig) -> Model:
    """Adds learnable masks to parts of a model, in place; the model itself gets the ``lam_config``.

    Args:
        model: the host.
        lengths: path of each part to the number of its key positions, for masks with ``keys="position"`` and no
            ``max_length``; None if the part's adapter determines it.
        config: configuration of the masks.

    Returns:
        The same object, which also has the attribute ``lam_parts``, a copy of ``lengths``.

    Raises:
        UnsupportedHostError: as for :func:`add_lam`, or the model has no such part.
        ConfigError: as for :func:`add_lam`.
    """
    check_model(model)
    paths = {path for path, _ in model.named_modules()}
    if unknown := next((path for path in lengths if path not in paths), None):
        raise UnsupportedHostError(
            f"The model ({class_name(model)}) has no part {unknown!r} for masks; create it with that part."
        )
    for path, length in lengths.items():
        part = add_lam(model.get_submodule(path), config.with_length(length))
        del part.lam_config
    model.lam_config, model.lam_parts = config, dict(lengths)  # type: ignore[assignment]
    exempt_from_weight_decay(model)
    return model


def _is_of_peft(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "peft"


class _Stack:
    """The masks of a stack of attention layers, before they are put into the model."""

    def __init__(self, model: nn.Module, sites: Mapping[AttentionSite, HostAdapter], config: LamConfig) -> None:
        self.shared = SharedState()
        self.lams: dict[AttentionSite, Lam] = {}
        self.layout = TokenLayout()  # of the first layer
        uses = Counter(module for _, module in model.named_modules(remove_duplicate=False))
        uses_here = [uses[model.get_submodule(site.path)] for site in sites]
        for index, (site, adapter) in enumerate(sites.items()):
            layer = model.get_submodule(site.path)
            layout = adapter.token_layout(model, site.path) or TokenLayout()
            if config.has_positions and layout.no_positions is not None:
                raise ConfigError(
                    f"{site.path} can't have a mask with keys='position': {layout.no_positions}; use keys='content'."
                )
            if config.layers == "single" and layout.no_sharing is not None:
                raise ConfigError(
                    f"{site.path} can't share a mask with layers='single': {layout.no_sharing}; use layers='multi'."
                )
            network = None
            if config.layers == "multi" or index == 0:
                network = MaskNetwork(
                    config,
                    site.query_dim,
                    site.key_dim,
                    site.num_heads,
                    length=layout.length,
                    num_prefix_tokens=layout.num_prefix_tokens,
                    grid=layout.grid,
                    modality_lengths=getattr(model, "modality_lengths", ()),
                ).to(floating_parameter(site.path, layer))
            is_last = uses_here[-1] == 1 and index == len(sites) - 1
            lam = Lam(config, network, self.shared, is_last=is_last)
            self.lams[site] = lam.train(layer.training)
            if all(count == 1 for count in uses_here):
                self.shared.join(lam, index)
            if index == 0:
                self.layout = layout

    def watch_passes(self, model: nn.Module, config: LamConfig) -> None:
        """Registers the hooks that tell forward passes apart, where layers share something during a pass."""
        patch_embed = self.layout.patch_embed if config.has_positions else None
        if patch_embed is not None:
            watch_grid(patch_embed, NoteGrid(self.shared, self.layout.grid_at), LeaveBlock(self.shared))
        if patch_embed is not None or config.layers == "single":
            for index, site in enumerate(self.lams):
                watched = site.path.rpartition(".")[0] if site.watched is None else site.watched
                block = model.get_submodule(watched)
                needs_pass = patch_embed is not None or index > 0
                enter = EnterBlock(self.shared, needs_pass, inside=watched == site.path)
                watch_block(block, enter, LeaveBlock(self.shared))
