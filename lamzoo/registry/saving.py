"""``save_pretrained`` and its way back, a folder in timm's hub format; the public face of everything about weights."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch.distributed
from timm.models import PretrainedCfg, is_model
from timm.models._hub import load_model_config_from_path, save_config_for_hf
from torch import nn

import lamzoo
from lamzoo import hub
from lamzoo.adapters.wrappers import full_state_dict, is_sharded, unwrap
from lamzoo.errors import ConfigError, UnknownModelError, WeightsError, WeightsNotFoundError
from lamzoo.files import atomic_files
from lamzoo.lam import LamConfig
from lamzoo.reduction.config import PruneConfig
from lamzoo.registry.cards import ModelSpec
from lamzoo.registry.catalog import find_spec
from lamzoo.registry.external import TIMM_PREFIX
from lamzoo.weights.files import (
    INDEX_SUFFIX,
    WEIGHTS_NAME,
    WeightsFile,
    find_in_folder,
    resolve_repo,
    stage_state_dict,
)

__all__ = ["SavedModel", "read_saved", "save_pretrained"]


_MASKED_TIMM = f"lamzoo/{TIMM_PREFIX}"  # in front of the architecture of a timm model with masks
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@dataclass(frozen=True)
class SavedModel:
    """What a saved folder, or a hub repository of the same format, says.

    Attributes:
        name: registry name of the model.
        cfg: timm's record.
        args: the arguments that the model was built with.
        lam: its masks.
        prune: how its tokens are pruned.
        weights: its weights, where they were asked for.
        external: whether timm, or its authors, wrote it rather than lamzoo.
    """

    name: str
    cfg: PretrainedCfg
    args: dict[str, Any]
    lam: LamConfig | None
    prune: PruneConfig | None
    weights: WeightsFile | None
    external: bool


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    label_names: Sequence[str] | None = None,
    max_shard_bytes: int | None = None,
) -> Path:
    """Writes a model to a folder, for ``create_model("local-dir:<folder>")`` or, uploaded, ``"hf-hub:<repo>"``.

    The folder gets ``model.safetensors`` (or shards and their index) and ``config.json`` in timm's hub format, so that
    timm itself reads a plain model of an architecture that it knows, and refuses one with masks. ``lam_config``,
    ``prune_config`` and ``lamzoo`` (registry name, version, sha256 of the weights) are further keys. Files of an
    earlier save are replaced when the new ones are complete.

    Args:
        model: a model of :func:`lamzoo.create_model`, or of timm, with or without masks; wrappers of ``torch.compile``
            and data parallelism are left out. Under FSDP2 every process has to call this, and the first one writes.
        folder: made where it isn't there.
        label_names: class names, in the order of the head.
        max_shard_bytes: split the weights into files of at most this size.

    Returns:
        The folder.

    Raises:
        ConfigError: the model has no ``pretrained_cfg`` of timm, its architecture is unknown, or the label names
            don't fit its head.
        UnsupportedHostError: ``FullyShardedDataParallel`` (FSDP1) hides its parameters.
        WeightsError: a file cannot be written; what was there before is unchanged.
    """
    folder, model = Path(folder), unwrap(model)
    card = _card_of(model)
    if label_names is not None and len(label_names) != getattr(model, "num_classes", None):
        raise ConfigError(
            f"{len(label_names)} label names were given for a head of {getattr(model, 'num_classes', 0)} classes."
        )
    config = _config(model, card, label_names)
    state = full_state_dict(model)
    if is_sharded(model) and torch.distributed.get_rank() > 0:
        return folder
    with atomic_files() as stage:
        # The last files to appear are those that name and hash the others.
        weights = stage_state_dict(stage, state, folder / WEIGHTS_NAME, max_shard_bytes)
        config["lamzoo"] = {
            "name": card.name,
            "version": lamzoo.__version__,
            "sha256": {weights.path.name: weights.sha256},
        }
        stage(folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _remove_stale(folder, weights.path)
    return folder


def read_saved(
    source: Literal["local-dir", "hf-hub"],
    place: str,
    *,
    with_weights: bool,
    cache_dir: str | Path | None = None,
    allow_pickle: bool = False,
) -> SavedModel:
    """Reads the configuration of a saved model, and finds its weights where asked to.

    Args:
        source: where it is.
        place: the folder, or that of the run that trained it, or ``owner/name[@revision]``.
        with_weights: also find the weights.
        cache_dir: in place of the hub's cache folder.
        allow_pickle: whether a hub repository may give its pickle.

    Raises:
        WeightsNotFoundError: there is no such folder, repository or file.
        WeightsError: the configuration is damaged or of a model that is unknown here.
    """
    if source == "local-dir":
        folder, repo, revision = Path(place).expanduser(), "", ""
        if not (folder / "config.json").is_file():
            if not (folder / "model" / "config.json").is_file():  # where training leaves it
                raise WeightsNotFoundError(f"There is no saved model in {folder}: it has no config.json.")
            folder = folder / "model"
    else:
        repo, _, revision = place.partition("@")
        folder = hub.download(repo, "config.json", revision=revision or None, cache_dir=cache_dir).parent
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        own = raw.get("lamzoo") or {}
        cfg, arch, args = load_model_config_from_path(folder)
        if not isinstance(arch, str):
            raise TypeError(f"architecture is {arch!r}")
        arch = arch.removeprefix(_MASKED_TIMM)
        cfg = PretrainedCfg(**_tuples({**cfg, "architecture": arch, "custom_load": False}))
        masks = raw.get("lam_config")
        lam = LamConfig.from_dict(masks) if masks else None
        pruned = raw.get("prune_config")
        prune = PruneConfig.from_dict(pruned) if pruned else None
        promised = dict(own.get("sha256", {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise WeightsError(
            f"{folder / 'config.json'} is not the configuration of a saved model ({error!r})."
        ) from error
    weights = None
    filename, sha256 = next(iter(promised.items()), (None, None))
    if with_weights and source == "local-dir":
        path = folder / filename if filename else find_in_folder(folder)
        weights = WeightsFile(path, sha256, str(path))
    elif with_weights:
        weights = resolve_repo(
            repo, revision=revision or None, filename=filename, sha256=sha256, cache_dir=cache_dir,
            allow_pickle=allow_pickle,
        )  # fmt: skip
    cfg.source, cfg.file = source, (str(folder) if source == "local-dir" else None)
    cfg.hf_hub_id = place if source == "hf-hub" else None
    return SavedModel(own.get("name", TIMM_PREFIX + arch), cfg, _tuples(args), lam, prune, weights, "name" not in own)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _card_of(model: nn.Module) -> ModelSpec:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    arch = cfg.get("architecture") or ""
    name = getattr(model, "registry_name", None) or (TIMM_PREFIX + arch if is_model(arch) else arch)
    try:
        return find_spec(name)
    except UnknownModelError as error:
        raise ConfigError(
            f"This {type(model).__name__} cannot be saved, since nothing says how to build it again: create it by "
            f"lamzoo.create_model or timm.create_model. ({error})"
        ) from error


def _config(model: nn.Module, card: ModelSpec, label_names: Sequence[str] | None) -> dict[str, Any]:
    extra = {"label_names": list(label_names)} if label_names is not None else {}
    masks = getattr(model, "lam_config", None)
    # A callable (a stem, a norm) has no place in a file; the card's builder, or timm's, chooses it again.
    args = {key: None for key, value in getattr(model, "_model_args", {}).items() if not _is_plain(value)}
    try:
        with tempfile.TemporaryDirectory(prefix="lamzoo-") as scratch:
            path = Path(scratch) / "config.json"
            save_config_for_hf(model, str(path), model_config=extra, model_args=args)
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{card.name} cannot be described in timm's hub format ({type(error).__name__}: {error})."
        ) from error
    except OSError as error:
        raise WeightsError(f"The configuration of {card.name} cannot be written ({error}).") from error
    # timm builds the architecture that is named here without masks: a model with masks has a name that timm refuses.
    masked = _MASKED_TIMM + card.name.removeprefix(TIMM_PREFIX) if card.source == "timm" else card.name
    config["architecture"] = card.backbone.get("timm", card.name) if masks is None else masked
    config["lam_config"] = masks.to_dict() if masks is not None else None
    if getattr(model, "prune_config", None) is not None:
        config["prune_config"] = model.prune_config.to_dict()  # type: ignore[union-attr, operator]
    return config


def _remove_stale(folder: Path, weights: Path) -> None:
    current = {weights.name}
    if weights.name.endswith(INDEX_SUFFIX):
        current |= set(json.loads(weights.read_text(encoding="utf-8"))["weight_map"].values())
    for path in folder.glob("model*.safetensors*"):
        if _OURS.fullmatch(path.name) and path.name not in current:
            path.unlink()


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
