"""``save_pretrained``: writes a model to a folder in timm's hub format."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from timm.models import is_model
from timm.models._features import FeatureDictNet, FeatureGetterNet, FeatureHookNet
from timm.models._features_fx import FeatureGraphNet
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from lamzoo.adapters.deploy import is_fused
from lamzoo.adapters.state import few, fit_tables
from lamzoo.adapters.wrappers import first_parameter, full_state_dict, is_sharded, unwrap
from lamzoo.errors import ConfigError, UnknownModelError, WeightsError, class_name
from lamzoo.files import atomic_files
from lamzoo.reading import parse_json, read_text, to_json
from lamzoo.reduction.config import TokenReduction
from lamzoo.registry.cards import ModelSpec
from lamzoo.registry.catalog import find_spec
from lamzoo.registry.factory import create_model
from lamzoo.registry.huggingface import spec_of_name
from lamzoo.registry.preprocessing import check_label_names
from lamzoo.registry.refs import HF_PREFIX, SAVED_WEIGHTS, TIMM_PREFIX
from lamzoo.tasks.classification import CLASSIFICATION
from lamzoo.version import __version__
from lamzoo.weights.files import stage_state_dict
from lamzoo.weights.saved import ARCHITECTURE_PREFIX, HERE, NOT_SAVED, TOKENIZER_NAME, set_argument
from lamzoo.weights.sources import INDEX_SUFFIX, WEIGHTS_NAME, read_index

__all__ = ["save_pretrained"]

_logger = logging.getLogger(__name__)

_WITHOUT_TENSORS = ("fused", "prune_config", "token_reduction")  # what of a configuration adds no tensors


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    label_names: Sequence[str] | None = None,
    max_shard_bytes: int | None = None,
) -> Path:
    """Writes a model to a folder, for ``create_model(folder)`` or, once uploaded, ``create_model("hf-hub:<repo>")``.

    The folder gets ``model.safetensors`` (or shards and their index) and ``config.json`` in timm's hub format. timm
    itself reads a plain model of a timm architecture, without its token merging, and refuses one with masks unless
    ``lamzoo.timm`` has been imported. The configuration has more keys: ``lam_config``, ``token_reduction``
    (``prune_config`` for pruning, which lamzoo 0.1 reads), ``fused`` (a fused model is saved with its unfused weights,
    and fused when it is created) and ``lamzoo`` (registry name, version, sha256 of the weights). A tokenizer that the
    model reads from a folder is copied, as ``tokenizer.json``. Files of an earlier save are replaced only when the new
    ones are complete.

    Args:
        model: a model of :func:`lamzoo.create_model` or of timm, with or without masks; wrappers of ``torch.compile``
            and data parallelism are removed. Under FSDP2 every process must call this, and the first one writes.
        folder: created if missing.
        label_names: class names, in the order of the head's outputs.
        max_shard_bytes: maximum size of a weights file; larger weights are split.

    Returns:
        The folder.

    Raises:
        ConfigError: the model has no ``pretrained_cfg`` of timm, its architecture is unknown, the label names don't
            fit its head, it is the part of a model that ``features_only`` makes, it is on the meta device, or its
            tensors aren't those of the model that ``create_model`` would build.
        UnsupportedHostError: ``FullyShardedDataParallel`` (FSDP1) hides its parameters, or it is an exported program.
        WeightsError: a file cannot be written; what was there before is unchanged.
    """
    folder, model = Path(folder), unwrap(model)
    first_parameter(model)
    spec = _spec_of(model)
    if label_names is not None:
        check_label_names(label_names, getattr(model, "num_classes", 0))
    config = _config(model, spec, label_names)
    state = full_state_dict(model)
    if is_sharded(model) and torch.distributed.get_rank() > 0:
        return folder
    if meta := next((key for key, value in state.items() if value.is_meta), None):
        raise ConfigError(
            f"{spec.name} cannot be saved, because its {meta} is on the meta device; call to_empty and load_state_dict "
            "first."
        )
    fit_tables(model, state)
    read_tokenizer: Callable[[], tuple[str, str] | None] = getattr(model, "tokenizer_to_save", lambda: None)
    tokenizer = read_tokenizer()
    if tokenizer is not None:
        set_argument(config.setdefault("model_args", {}), tokenizer[0], HERE)
    config["lamzoo"] = {"name": spec.name, "version": __version__}
    _check_rebuilt(spec, config, state, tokenizer and tokenizer[1])
    with atomic_files() as stage:
        if tokenizer is not None:
            stage(folder / TOKENIZER_NAME).write_text(tokenizer[1], encoding="utf-8")
        # The last files to appear are those that name and hash the others.
        weights = stage_state_dict(stage, state, folder / WEIGHTS_NAME, max_shard_bytes)
        config["lamzoo"]["sha256"] = {weights.path.name: weights.sha256}
        stage(folder / "config.json").write_text(to_json(config, indent=2) + "\n", encoding="utf-8")
    _remove_stale(folder, weights.path)
    return folder


def _spec_of(model: nn.Module) -> ModelSpec:
    if any(class_name(cls) == "transformers.modeling_utils.PreTrainedModel" for cls in type(model).__mro__):
        raise ConfigError(
            f"This {type(model).__name__} is a model of Hugging Face transformers; call its own save_pretrained, and "
            "load it with lamzoo.from_pretrained."
        )
    if isinstance(model, (FeatureDictNet, FeatureGetterNet, FeatureGraphNet, FeatureHookNet)):
        raise ConfigError(
            f"This {type(model).__name__} is a part of a model, made by features_only; save the whole model, and load "
            "that with features_only=True."
        )
    cfg = getattr(model, "pretrained_cfg", None) or {}
    arch = cfg.get("architecture") or ""
    name = getattr(model, "registry_name", None) or (TIMM_PREFIX + arch if is_model(arch) else arch)
    if name.startswith(HF_PREFIX):
        return spec_of_name(name)
    try:
        return find_spec(name)
    except UnknownModelError as error:
        raise ConfigError(
            f"This {type(model).__name__} cannot be saved, because its architecture is not registered: create it with "
            f"lamzoo.create_model or timm.create_model. ({error})"
        ) from error


def _config(model: nn.Module, spec: ModelSpec, label_names: Sequence[str] | None) -> dict[str, Any]:
    extra = {"label_names": list(label_names)} if label_names is not None else {}
    masks = getattr(model, "lam_config", None)
    # A callable (a stem, a norm) can't be written to a file; the builder sets it again.
    args = {key: None for key, value in getattr(model, "_model_args", {}).items() if not _is_plain(value)}
    try:
        with tempfile.TemporaryDirectory(prefix="lamzoo-") as scratch:
            path = Path(scratch) / "config.json"
            save_config_for_hf(model, str(path), model_config=extra, model_args=args)
            config: dict[str, Any] = parse_json(read_text(path), file_names=True)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{spec.name} cannot be described in timm's hub format ({type(error).__name__}: {error})."
        ) from error
    except OSError as error:
        raise WeightsError(f"The configuration of {spec.name} cannot be written ({error}).") from error
    for key in NOT_SAVED & config.get("model_args", {}).keys():
        del config["model_args"][key]
    # timm would build a timm architecture without its masks, so a model with masks gets a name that timm refuses.
    name = spec.name.removeprefix(TIMM_PREFIX)
    own = ARCHITECTURE_PREFIX + name if spec.task == CLASSIFICATION.name else name
    config["architecture"] = spec.backbone.get("timm", own) if masks is None else own
    config["lam_config"] = masks.to_dict() if masks is not None else None
    reduction: TokenReduction | None = getattr(model, "token_reduction", None)
    if reduction is not None:
        config["prune_config" if reduction.method == "prune" else "token_reduction"] = reduction.to_dict()
    if is_fused(model):
        config["fused"] = True
    return config


def _check_rebuilt(
    spec: ModelSpec, config: Mapping[str, Any], state: Mapping[str, Tensor], tokenizer: str | None
) -> None:
    """Builds the model of a configuration, without memory for its weights, and compares the shapes of its tensors.

    Raises:
        ConfigError: they differ from those of the state dict.
    """
    weightless = {key: value for key, value in config.items() if key not in _WITHOUT_TENSORS}
    with tempfile.TemporaryDirectory(prefix="lamzoo-") as scratch:
        try:
            (Path(scratch) / "config.json").write_text(to_json(weightless), encoding="utf-8")
            if tokenizer is not None:
                (Path(scratch) / TOKENIZER_NAME).write_text(tokenizer, encoding="utf-8")
            with torch.device("meta"):
                rebuilt = create_model(f"local-dir:{scratch}").state_dict()
        except Exception:  # a plug-in may not build on the meta device, and is saved all the same
            _logger.info("%s is saved without a trial of create_model, which failed", spec.name, exc_info=True)
            return
    got, built = ({key: tuple(value.shape) for key, value in each.items()} for each in (state, rebuilt))
    differing = [key for key in built | got if got.get(key) != built.get(key)]
    if differing:
        shapes = [f"{key} ({got.get(key, 'missing')} instead of {built.get(key, 'none')})" for key in differing]
        raise ConfigError(
            f"{spec.name} cannot be saved, because it was changed after it was created, and create_model would build "
            f"another one: {few(shapes)}; set the head by its reset_classifier, and depth and widths by arguments of "
            "create_model."
        )


def _remove_stale(folder: Path, weights: Path) -> None:
    current = {weights.name}
    if weights.name.endswith(INDEX_SUFFIX):
        current |= set(read_index(weights).shard_of.values())
    for path in folder.glob("model*.safetensors*"):
        if SAVED_WEIGHTS.fullmatch(path.name) and path.name not in current:
            path.unlink()


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
