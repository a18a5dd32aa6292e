"""Reading what ``save_pretrained`` wrote: a folder, or a hub repository of the same format."""

from __future__ import annotations

import logging
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg
from timm.models._hub import _parse_model_cfg

from lamzoo import hub
from lamzoo.errors import ConfigError, UnsafeWeightsError, WeightsError, WeightsNotFoundError
from lamzoo.files import is_plain_name, is_sha256
from lamzoo.lam.config import LamConfig
from lamzoo.reading import parse_json, read_text
from lamzoo.records import Limits, build
from lamzoo.reduction.config import PruneConfig, TokenReduction
from lamzoo.registry.preprocessing import ARGUMENTS, check_preprocessing
from lamzoo.registry.refs import HF_PREFIX, TIMM_PREFIX, ModelRef
from lamzoo.weights.mask_folder import CONFIG_NAME, MasksOnlyError, find_mask_folder, has_masks_only
from lamzoo.weights.sources import SAFE_SUFFIXES, WeightsFile, find_in_folder, resolve_repo, way_out

_logger = logging.getLogger(__name__)

#: Precedes the name of an image model that timm doesn't have in its ``config.json``. timm refuses to build it, with an
#: error that names this module, unless the module has been imported.
ARCHITECTURE_PREFIX = "lamzoo.timm."
TOKENIZER_NAME = "tokenizer.json"
#: Value of an argument that names the folder itself.
HERE = "."
_TOKENIZERS = ("tokenizer_name", "clip.text_cfg.hf_tokenizer_name")
_EARLIER_PREFIX = f"lamzoo/{TIMM_PREFIX}"  # of 0.1.0, for timm models with masks

_NAME = re.compile(rf"({TIMM_PREFIX}|open_clip/)?[\w.-]+|{HF_PREFIX}([\w.-]+/)?[\w.-]+(@[\w./-]+)?")
#: Arguments with which a saved model is never built, and with which timm would read other files.
NOT_SAVED = frozenset(
    {
        "allow_pickle",
        "cache_dir",
        "checkpoint_path",
        "config",
        "lam",
        "lam_weights",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
    }
)
_MODULES = re.compile(r"depth|layers|blocks|stages")  # arguments that count modules
_COUNT, _ANY = Limits(least=0, most=1000), Limits(least=-(10**8), most=10**8)


@dataclass(frozen=True)
class SavedModel:
    """The configuration of a saved model.

    Attributes:
        name: registry name of the model.
        path: its ``config.json``.
        cfg: timm's record.
        args: arguments that the model was built with.
        lam: its masks.
        reduction: its token reduction.
        weights: its weights, if requested.
        external: whether it was written by timm, or by the authors of the weights, rather than by lamzoo.
        fused: whether its attention layers get their fused form.
    """

    name: str
    path: Path
    cfg: PretrainedCfg
    args: dict[str, Any]
    lam: LamConfig | None
    reduction: TokenReduction | None
    weights: WeightsFile | None
    external: bool
    fused: bool = False


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
        MasksOnlyError: there are masks without their model.
        WeightsError: the configuration is damaged.
    """
    if ref.path is not None:
        folder = ref.path
        if not folder.is_dir():
            raise WeightsNotFoundError(f"There is no saved model in {folder}: no such folder.")
        if has_masks_only(folder):
            raise MasksOnlyError(str(folder))
        if not (folder / "config.json").is_file():
            raise WeightsNotFoundError(f"There is no saved model in {folder}: it has no config.json.")
    else:
        try:
            folder = hub.download(ref.repo, "config.json", revision=ref.revision, cache_dir=cache_dir).parent
        except WeightsNotFoundError as error:
            known = hub.cached(ref.repo, CONFIG_NAME, revision=ref.revision, cache_dir=cache_dir)
            if known is None and not isinstance(error, hub.HubEntryMissingError):
                raise  # without waiting for the hub again
            try:
                find_mask_folder(ref.text, cache_dir)
            except WeightsError:
                raise error from None
            raise MasksOnlyError(ref.text) from error
    path = folder / "config.json"
    saved, promised = _read_config(path)
    if argument := _tokenizer_argument(saved.args):
        if ref.path is None:
            hub.download(ref.repo, TOKENIZER_NAME, revision=folder.name, cache_dir=cache_dir)  # to the same folder
        set_argument(saved.args, argument, str(folder.absolute()))
    weights = None
    filename, sha256 = next(iter(promised.items()), (None, None))
    if with_weights and ref.path is not None:
        file = folder / filename if filename else find_in_folder(folder)
        weights = WeightsFile(file, sha256, str(file))
    elif with_weights:
        try:
            weights = resolve_repo(  # of the commit that the configuration is of; the branch may have moved on
                ref.repo, revision=folder.name, filename=filename, sha256=sha256, cache_dir=cache_dir,
                allow_pickle=allow_pickle,
            )  # fmt: skip
        except (hub.HubEntryMissingError, UnsafeWeightsError):
            hub.discard(path)  # the next call asks the hub for a newer commit, which may have the weights
            raise
    cfg = saved.cfg
    if ref.path is not None:
        cfg.source, cfg.file, cfg.hf_hub_id = "local-dir", str(folder), None
    else:
        cfg.source, cfg.file = "hf-hub", None
        cfg.hf_hub_id = ref.repo + (f"@{ref.revision}" if ref.revision else "")
    return replace(saved, weights=weights)


@dataclass(frozen=True)
class _Own:
    """The keys of a ``config.json`` under ``lamzoo``."""

    name: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Config:
    """The keys of a ``config.json`` that are used, apart from those of ``PretrainedCfg``."""

    architecture: str
    model_args: Mapping[str, Any] = field(default_factory=dict)
    lam_config: Mapping[str, Any] | None = None
    prune_config: Mapping[str, Any] | None = None
    token_reduction: Mapping[str, Any] | None = None
    fused: bool = False
    lamzoo: _Own = field(default_factory=_Own)


@dataclass(frozen=True)
class _Arguments:
    """Arguments of a constructor that timm's parser reads as well."""

    img_size: int | tuple[int, int] | None = None
    in_chans: int | None = None
    num_classes: int | None = None


def _read_config(path: Path) -> tuple[SavedModel, Mapping[str, str]]:
    """Reads a ``config.json``; returns the model, without weights, and the sha256 by file name.

    Raises:
        WeightsError: a value has another type, or is out of range; names file, key and value.
    """
    try:
        raw = parse_json(read_text(path), file_names=True)
        if not isinstance(raw, dict):
            raise ConfigError("it must be a table")
        if "architectures" in raw and "architecture" not in raw:
            raise WeightsError(
                f"{path} describes a model of Hugging Face transformers; load it with lamzoo.from_pretrained if it was "
                "saved with masks, or else with transformers, and call lamzoo.add_lam."
            )
        own = raw.get("lamzoo") or {}
        if isinstance(own, dict):  # later versions may add keys
            raw["lamzoo"] = {key: value for key, value in own.items() if key in _names(_Own)}
        known = {key: raw[key] for key in _names(_Config) if raw.get(key) is not None}
        config = build(_Config, known, source="its", error=ConfigError)
        for name, sha256 in config.lamzoo.sha256.items():
            if not is_plain_name(name) or not name.endswith(SAFE_SUFFIXES) or not is_sha256(sha256):
                raise ConfigError(
                    f"its key lamzoo.sha256 has {reprlib.repr(name)} = {reprlib.repr(sha256)}, which is no safetensors "
                    "file of its folder and its sha256"
                )
        arch = config.architecture.removeprefix(ARCHITECTURE_PREFIX).removeprefix(_EARLIER_PREFIX)
        for key, model in (("lamzoo.name", config.lamzoo.name), ("architecture", arch)):
            if model is not None and not _NAME.fullmatch(model):
                raise ConfigError(f"its key {key} is {reprlib.repr(model)}, which is not the name of an architecture")
        _check_arguments(config.model_args)
        saved = SavedModel(
            name=config.lamzoo.name or TIMM_PREFIX + arch,
            path=path,
            cfg=PretrainedCfg(**{**_preprocessing(raw, config), "architecture": arch, "custom_load": False}),
            args=_tuples(config.model_args),
            lam=LamConfig.from_dict(config.lam_config) if config.lam_config else None,
            reduction=_reduction(config),
            weights=None,
            external=config.lamzoo.name is None,
            fused=config.fused,
        )
    except (OSError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error).rstrip(".")
        raise WeightsError(f"{path} is not the configuration of a saved model: {reason}; {way_out(path)}.") from error
    return saved, config.lamzoo.sha256


def _reduction(config: _Config) -> TokenReduction | None:
    if config.prune_config and config.token_reduction is not None:
        raise ConfigError("its keys prune_config and token_reduction exclude each other")
    if config.prune_config:
        return PruneConfig.from_dict(config.prune_config)
    return TokenReduction.from_dict(config.token_reduction) if config.token_reduction is not None else None


def _preprocessing(raw: dict[str, Any], config: _Config) -> dict[str, Any]:
    """Returns the values of timm's ``PretrainedCfg``, checked, from either of timm's formats."""
    where = "pretrained_cfg" if "pretrained_cfg" in raw else ""
    stated = raw["pretrained_cfg"] if where else {k: v for k, v in raw.items() if k not in _names(_Config)}
    if not where:  # timm's older format
        stated.pop("num_features", None)
        stated |= {"label_names": stated.pop("labels")} if "labels" in stated else {}
    values = check_preprocessing(stated, where, source="its", error=ConfigError)
    cfg, _, _ = _parse_model_cfg(
        {**raw, "model_args": dict(config.model_args), "pretrained_cfg": values, "architecture": config.architecture},
        {},
    )
    names, classes = cfg.get("label_names"), cfg.get("num_classes")
    if "label_names" not in raw and names is not None and isinstance(classes, int) and len(names) != classes:
        _logger.warning(
            "The %d label names in pretrained_cfg are ignored: the head has %d classes.", len(names), classes
        )
        del cfg["label_names"]
    return check_preprocessing(cfg, source="its", error=ConfigError)


def _check_arguments(args: Mapping[str, Any]) -> None:
    """Checks arguments of a model's constructor as far as their names say what they are."""
    build(
        _Arguments, {k: args[k] for k in _names(_Arguments) if k in args}, "model_args", source="its", error=ConfigError
    )
    for key, value in args.items():
        if key in NOT_SAVED:
            raise ConfigError(f"its key model_args.{key} is not an argument of a saved model")
        limits = ARGUMENTS.get(key, _COUNT if _MODULES.search(key) else _ANY)
        if problem := next(filter(None, map(limits.problem, _numbers(value))), ""):
            raise ConfigError(f"its key model_args.{key} is {reprlib.repr(value)}; {problem}")


def _tokenizer_argument(args: Mapping[str, Any]) -> str | None:
    """Returns the argument that names the saved folder's own tokenizer, with dots before keys of tables; or None."""
    for name in _TOKENIZERS:
        value: Any = args
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value == HERE:
            return name
    return None


def set_argument(args: dict[str, Any], name: str, value: str) -> None:
    """Sets an argument of a model, whose name has dots before keys of tables, in place."""
    *tables, key = name.split(".")
    for table in tables:
        args = args[table]
    args[key] = value


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)


def _names(cls: type) -> list[str]:
    return [entry.name for entry in fields(cls)]


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
