"""Reading what ``save_pretrained`` wrote: a folder, or a hub repository of the same format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg
from timm.models._hub import load_model_config_from_path

from lamzoo import hub
from lamzoo.errors import WeightsError, WeightsNotFoundError
from lamzoo.lam.config import LamConfig
from lamzoo.reduction.config import PruneConfig
from lamzoo.registry.refs import TIMM_PREFIX, ModelRef
from lamzoo.weights.sources import WeightsFile, find_in_folder, resolve_repo

#: Precedes the architecture of a timm model with masks in its ``config.json``, so that timm refuses to build it plain.
MASKED_TIMM = f"lamzoo/{TIMM_PREFIX}"


@dataclass(frozen=True)
class SavedModel:
    """The configuration of a saved model.

    Attributes:
        name: registry name of the model.
        cfg: timm's record.
        args: arguments that the model was built with.
        lam: its masks.
        prune: its token pruning.
        weights: its weights, if requested.
        external: whether it was written by timm, or by the authors of the weights, rather than by lamzoo.
    """

    name: str
    cfg: PretrainedCfg
    args: dict[str, Any]
    lam: LamConfig | None
    prune: PruneConfig | None
    weights: WeightsFile | None
    external: bool


def read_saved(
    ref: ModelRef, *, with_weights: bool, cache_dir: str | Path | None = None, allow_pickle: bool = False
) -> SavedModel:
    """Reads the configuration of a saved model, and finds its weights if requested.

    Args:
        ref: a folder or a hub repository.
        with_weights: also find the weights.
        cache_dir: replaces the hub's cache folder.
        allow_pickle: accept the pickle of a hub repository without safetensors.

    Raises:
        WeightsNotFoundError: the folder, repository or file does not exist.
        WeightsError: the configuration is damaged.
    """
    if ref.path is not None:
        folder = ref.path
        if not folder.is_dir():
            raise WeightsNotFoundError(f"There is no saved model in {folder}: no such folder.")
        if not (folder / "config.json").is_file():
            raise WeightsNotFoundError(f"There is no saved model in {folder}: it has no config.json.")
    else:
        folder = hub.download(ref.repo, "config.json", revision=ref.revision, cache_dir=cache_dir).parent
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        own = raw.get("lamzoo") or {}
        cfg, arch, args = load_model_config_from_path(folder)
        if not isinstance(arch, str):
            raise TypeError(f"architecture is {arch!r}")
        arch = arch.removeprefix(MASKED_TIMM)
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
    if with_weights and ref.path is not None:
        path = folder / filename if filename else find_in_folder(folder)
        weights = WeightsFile(path, sha256, str(path))
    elif with_weights:
        weights = resolve_repo(
            ref.repo, revision=ref.revision, filename=filename, sha256=sha256, cache_dir=cache_dir,
            allow_pickle=allow_pickle,
        )  # fmt: skip
    if ref.path is not None:
        cfg.source, cfg.file, cfg.hf_hub_id = "local-dir", str(folder), None
    else:
        cfg.source, cfg.file = "hf-hub", None
        cfg.hf_hub_id = ref.repo + (f"@{ref.revision}" if ref.revision else "")
    return SavedModel(own.get("name", TIMM_PREFIX + arch), cfg, _tuples(args), lam, prune, weights, "name" not in own)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
