"""``save_lam`` and ``load_lam``: the masks of a model in a small folder of their own, and back into their base."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn

from lamzoo.adapters.mask_sets import DEFAULT, MaskSet, cloned_masks, sets_of
from lamzoo.adapters.state import few, fit_tables, masks_of
from lamzoo.adapters.wrappers import full_state_dict, host_path, is_sharded, unwrap
from lamzoo.errors import ConfigError, StateDictError, UnsupportedHostError, class_name
from lamzoo.files import atomic_files
from lamzoo.lam.layer import carried_configs, carry_configs
from lamzoo.reading import to_json
from lamzoo.registry.preprocessing import check_label_names
from lamzoo.registry.refs import HF_PREFIX, TIMM_PREFIX
from lamzoo.version import __version__
from lamzoo.weights.files import read_state_dict, stage_state_dict
from lamzoo.weights.mask_folder import (
    CONFIG_NAME,
    MASKS_NAME,
    BaseModel,
    MaskFolder,
    find_mask_folder,
    read_mask_folder,
)

_logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def save_lam(
    model: nn.Module,
    folder: str | Path,
    *,
    also: Sequence[str] | None = None,
    label_names: Sequence[str] | None = None,
) -> Path:
    """Writes the masks of a model to a small folder of their own, for :func:`lamzoo.load_lam`.

    The folder gets ``lam_model.safetensors`` and ``lam_config.json``: the ``LamConfig``, the attention layers, and the
    base: its class, its name and revision where known, and a hash of the weights of its attention layers. Files of an
    earlier save are replaced only when the new ones are complete. :func:`lamzoo.push_to_hub` uploads the folder.

    Args:
        model: a model with masks, or a wrapper around one. Under FSDP2 every process must call this, and the first one
            writes. Of several sets of masks, the active one is written.
        folder: created if missing.
        also: paths of modules or parameters that were trained with the masks and are stored as well, such as
            ``["head"]``; by default those that the active set was loaded with.
        label_names: class names, in the order of the outputs of a stored classifier; by default those in the model's
            ``pretrained_cfg``.

    Returns:
        The folder.

    Raises:
        ConfigError: the model has no module or parameter at a path of ``also``, or the label names don't fit its
            number of classes, or no classifier is stored.
        UnsupportedHostError: the model has no masks, only a part of it or some of its blocks have, or peft holds them.
        WeightsError: a file cannot be written; what was there before is unchanged.
    """
    folder, host = Path(folder), unwrap(model)
    masks = masks_of(model)
    sets = sets_of(model)
    config = getattr(host, "lam_config", None)
    if config is None:
        parts = (path for path, module in host.named_modules() if getattr(module, "lam_config", None) is not None)
        raise UnsupportedHostError(
            f"The masks of the model ({class_name(host)}) were added to {next(parts, 'a part of it')}; save the masks "
            "of that part."
        )
    state = full_state_dict(model)
    others = _others(state, sets.stored[sets.active].others if also is None else also)
    _warn_of_trained(host, others)
    if label_names is not None:
        if not others:
            raise ConfigError("label_names name the outputs of a classifier, and none is stored; use also=['head'].")
        of_transformers = getattr(getattr(host, "config", None), "num_labels", None)
        check_label_names(label_names, getattr(host, "num_classes", of_transformers))
    elif others:
        label_names = (getattr(host, "pretrained_cfg", None) or {}).get("label_names")
    layers = [path.removesuffix(".lam") for path in masks]
    record = MaskFolder(
        lam_config=config.to_dict(),
        base_model=_base_of(host, layers, state),
        layers=tuple(layers),
        parts=getattr(host, "lam_parts", None),
        also=tuple(others),
        label_names=tuple(label_names) if label_names else None,
    )
    tensors = {**cloned_masks(model), **others}
    fit_tables(model, tensors)
    stored = carry_configs(tensors, {path: lam.config for path, lam in masks.items()})
    if is_sharded(host) and torch.distributed.get_rank() > 0:
        return folder
    with atomic_files() as stage:
        weights = stage_state_dict(stage, stored, folder / MASKS_NAME, None)
        table = {key: value for key, value in dataclasses.asdict(record).items() if value not in (None, ())}
        table["lamzoo"] = {"version": __version__, "sha256": weights.sha256}
        stage(folder / CONFIG_NAME).write_text(to_json(table, indent=2) + "\n", encoding="utf-8")
    return folder


def load_lam(
    model: Model,
    source: str | os.PathLike[str],
    *,
    name: str = DEFAULT,
    cache_dir: str | Path | None = None,
) -> Model:
    """Loads masks that :func:`lamzoo.save_lam` wrote into their base model, in place, as a set that becomes active.

    A model without masks gets them. Masks that it has are kept aside, for :func:`lamzoo.set_lam`, unless ``name`` is
    the name of their set: then they are replaced. Position tables of another image size are resized. What was stored
    besides masks, such as a classifier, is loaded as well; the base's own values are kept for ``set_lam(model, None)``.

    The class of the model, its layers and their widths have to be those of the base. Attention layers with other
    weights than the base's, as of another checkpoint or a fine-tuned or quantised model, are a warning in the log, not
    an error.

    Args:
        model: the base model, with or without masks, or a wrapper around one.
        source: the folder, a repository of the Hugging Face hub, ``"hf-hub:OWNER/NAME[@revision]"``, or the name of
            masks that come with lamzoo, such as ``"vit_small_patch14_dinov2.clothing10"``.
        name: of the set.
        cache_dir: folder for downloads; the hub's own cache by default.

    Returns:
        The same model.

    Raises:
        WeightsNotFoundError: the folder, repository or a file of it does not exist.
        WeightsError: a file is damaged.
        StateDictError: the masks are of another base: another class, other layers or other shapes, or keys are missing
            or unexpected; names them. The model is left unchanged.
        UnsupportedHostError: as for :func:`lamzoo.add_lam`, and as for :func:`lamzoo.set_lam` if the model has sets.
            The model is left unchanged.
    """
    host: Any = unwrap(model)
    sets = sets_of(model)
    if not isinstance(name, str):
        raise ConfigError(f"name is {name!r}; the name of a set of masks must be a string.")
    folder = find_mask_folder(source, cache_dir)
    record = read_mask_folder(folder)
    base = record.base_model
    if base.model_class != _class_of(host):
        raise StateDictError(
            f"The masks in {source} were trained on {base}, and this model is a {_class_of(host)}; load them into "
            "their base."
        )
    own = {host_path(path) for path, _ in host.named_modules(remove_duplicate=False)}
    missing = [path for path in record.layers if path not in own]
    if missing:
        raise StateDictError(
            f"The masks in {source} were trained on {base}, and this {_class_of(host)} has no {few(missing)}; create "
            "it with the arguments of the base."
        )
    tensors = read_state_dict(folder / MASKS_NAME, sha256=record.lamzoo.sha256)
    others = {key: tensors[key] for key in record.also if key in tensors}
    masks = {key: value for key, value in tensors.items() if key not in others}
    _check(host, record, masks, others, str(source))
    masks = carry_configs(masks, carried_configs(tensors))
    new = MaskSet(record.config, record.parts, masks, others, record.label_names)
    sets.add(model, name, new, f"{source}, of {base},")
    host.lam_sets = sets
    actual = _attention_sha256(full_state_dict(model), record.layers)
    if base.attention_sha256 not in (None, actual):
        _logger.warning(
            "The masks in %s were trained on %s, and the attention layers of this model have other weights; expect "
            "other outputs, unless the model was only quantised or cast. To get the base, load its own weights.",
            source, base,
        )  # fmt: skip
    return model


def _others(state: Mapping[str, Tensor], paths: Iterable[str]) -> dict[str, Tensor]:
    """Returns the tensors of modules and parameters by their keys, without masks."""
    found: dict[str, Tensor] = {}
    for path in paths:
        keys = [key for key in state if (key == path or key.startswith(f"{path}.")) and ".lam." not in key]
        if not keys:
            raise ConfigError(f"also has {path!r}, and the model has no parameters there; name modules such as 'head'.")
        found |= {key: state[key] for key in keys}
    return found


def _warn_of_trained(host: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Warns of parameters that seem to be trained with the masks, because others are frozen, and are not stored."""
    own = {key: parameter for key, parameter in host.named_parameters() if ".lam." not in key}
    trained = [key for key, parameter in own.items() if parameter.requires_grad]
    lost = [key for key in map(host_path, trained) if key not in stored]
    if lost and len(trained) < len(own):
        _logger.warning(
            "save_lam doesn't store %s, which require gradients while other parameters are frozen; if they were "
            "trained with the masks, name them in also=.", few(lost),
        )  # fmt: skip


def _check(
    host: nn.Module, record: MaskFolder, masks: Mapping[str, Tensor], others: Mapping[str, Tensor], source: str
) -> None:
    """Checks what is stored besides the masks, and sizes and kinds of all; raises a :class:`StateDictError`."""
    config = record.config
    lengths = [*(record.parts or {}).values(), config.max_length] if config.has_positions else []
    stored = sum(value.numel() for value in masks.values())
    if max([config.rank, *config.hidden, *(length or 0 for length in lengths)]) > stored:  # before any is allocated
        raise StateDictError(
            f"{source} has no mask as large as its {CONFIG_NAME} says, rank={config.rank}, hidden={config.hidden} and "
            f"max_length={config.max_length}; save it again."
        )
    own = {host_path(key): value for key, value in host.state_dict().items()}
    lacking = [key for key in record.also if key not in others]
    if lacking:
        raise StateDictError(f"{source} lacks {few(lacking)}, which its {CONFIG_NAME} lists; save it again.")
    for key, value in others.items():
        if key not in own or ".lam." in key:
            raise StateDictError(
                f"{source} has {key}, which this {_class_of(host)} lacks; create the model with that part, as "
                "num_classes= does for a classifier."
            )
        if own[key].shape != value.shape:
            raise StateDictError(
                f"{source} has {key} of shape {tuple(value.shape)}, and the model's has {tuple(own[key].shape)}; build "
                f"it with that size, such as num_classes={value.shape[0] if value.ndim else 1} for a classifier."
            )
    odd = [key for key, value in masks.items() if not value.is_floating_point()]
    odd += [key for key, value in others.items() if value.is_floating_point() != own[key].is_floating_point()]
    if odd:
        raise StateDictError(f"{source} has whole numbers or floats in the wrong place, in {few(odd)}; save it again.")


def _base_of(host: nn.Module, layers: Sequence[str], state: Mapping[str, Tensor]) -> BaseModel:
    name, revision = _name_of(host)
    return BaseModel(_class_of(host), name, revision, _attention_sha256(state, layers))


def _name_of(host: Any) -> tuple[str | None, str | None]:
    """Returns the name of a model for ``create_model``, and the revision of its repository, as far as it knows them."""
    config = getattr(host, "config", None)  # of transformers
    cfg: Mapping[str, Any] = getattr(host, "pretrained_cfg", None) or {}  # of timm
    registered = str(getattr(host, "registry_name", None) or "")
    if registered.startswith(HF_PREFIX):
        name, _, at = registered.partition("@")
        return name, at or getattr(config, "_commit_hash", None)
    revision = (cfg.get("hf_hub_id") or "").partition("@")[2] or None
    if registered:
        weights = str(getattr(host, "weights_source", None))
        return (weights, revision) if weights.startswith(f"{registered}.") else (registered, None)
    if cfg.get("architecture"):
        return TIMM_PREFIX + cfg["architecture"], None  # timm doesn't say whether the weights of the tag were loaded
    name = str(getattr(config, "_name_or_path", ""))
    if _HUB_NAME.fullmatch(name) and not os.path.exists(name):  # else a folder of this machine
        return HF_PREFIX + name, getattr(config, "_commit_hash", None)
    return None, None


def _class_of(host: nn.Module) -> str:
    """Returns library and name of a model's class, which FSDP2 replaces by a subclass."""
    classes = type(host).__mro__
    cls = next(each for each in classes if not any(base.__name__ == "FSDPModule" for base in each.__mro__))
    return f"{cls.__module__.partition('.')[0]}.{cls.__qualname__}"


def _attention_sha256(state: Mapping[str, Tensor], layers: Sequence[str]) -> str:
    """Returns a hash of the weights of attention layers without their masks.

    In bfloat16, so that a model in half of the precision is the same base, and without signs of zeros, which averaging
    loses. Sizes of image and classifier, which change other weights, don't matter.
    """
    digest = hashlib.sha256()
    prefixes = tuple(f"{path}." for path in layers)
    for key in sorted(key for key in state if key.startswith(prefixes) and ".lam." not in key):
        value = state[key].detach()
        value = value.to(torch.bfloat16) + 0.0 if value.is_floating_point() else value
        digest.update(f"{key} {tuple(value.shape)} ".encode())
        digest.update(value.cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
