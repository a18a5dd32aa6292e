"""``create_model``: from a name to a built model with its weights, masks and timm's records."""

from __future__ import annotations

import inspect
import logging
import math
import os
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

import torch
from timm.models import PretrainedCfg
from timm.models._input import _init_model_traits
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lamzoo.adapters import add_lam, remove_lam
from lamzoo.adapters.deploy import fuse_layers
from lamzoo.data.images.decode import of_channels
from lamzoo.errors import (
    ConfigError,
    HashMismatchError,
    HubUnreachableError,
    LamzooError,
    StateDictError,
    UnknownArgumentError,
    UnsafeWeightsError,
    WeightsError,
    WeightsNotFoundError,
)
from lamzoo.files import shortened
from lamzoo.lam import LamConfig
from lamzoo.reduction.budget import reduce_tokens
from lamzoo.reduction.config import TokenReduction
from lamzoo.registry.cards import ModelSpec, PretrainedWeights
from lamzoo.registry.catalog import (
    builder_of,
    bundled_models,
    find_spec,
    find_weights,
    model_ref,
    pretrained_cfg_of,
    spec_of_saved,
)
from lamzoo.registry.huggingface import create_transformers_model, with_timms_interface
from lamzoo.registry.preprocessing import ARGUMENTS
from lamzoo.registry.refs import ModelRef
from lamzoo.weights.files import read_state_dict
from lamzoo.weights.loading import load_into, with_rank_of
from lamzoo.weights.saved import read_saved
from lamzoo.weights.sources import WeightsFile, location, resolve, resolve_repo
from lamzoo.weights.tower_files import load_towers

__all__ = ["create_for_images", "create_model", "find_weights_file", "obtain"]

_logger = logging.getLogger(__name__)

_FEATURE_ARGS = ("features_only", "out_indices", "feature_cls")  # of timm, which wraps the built model
# Arguments of timm for the weights, which its constructors ignore without weights of timm's own.
_INSTEAD = {
    "pretrained_cfg": "name its weights, as arch.tag",
    "pretrained_cfg_overlay": "pass checkpoint_path= for weights, and set preprocessing in the created model's "
    "pretrained_cfg",
    "pretrained_strict": "weights are loaded strictly, and the arguments that change the model adapt them",
}


@dataclass(frozen=True)
class _Plan:
    """What to build: the spec, timm's record, the arguments that come with the weights, and the weights."""

    spec: ModelSpec
    tag: PretrainedWeights | None
    cfg: PretrainedCfg
    args: Mapping[str, Any]
    lam: LamConfig | None
    weights: WeightsFile | None
    external: bool
    reduction: TokenReduction | None = None
    config: Path | None = None  # of a saved model
    fused: bool = False


def create_model(
    name: str | os.PathLike[str],
    pretrained: bool = False,
    *,
    lam: LamConfig | Mapping[str, Any] | bool | None = None,
    lam_weights: Literal["pretrained", "fresh"] = "pretrained",
    num_classes: int | None = None,
    in_chans: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    global_pool: str | None = None,
    drop_path_rate: float | None = None,
    checkpoint_path: str | Path | None = None,
    cache_dir: str | Path | None = None,
    allow_pickle: bool = False,
    **timm_kwargs: Any,
) -> nn.Module:
    """Creates a model by name; arguments of timm's ``create_model`` have the same meaning.

    Args:
        name: ``arch`` or ``arch.tag`` of the registry, ``timm/<name>[.tag]``, ``open_clip/<name>[:tag]`` (plain
            CLIP4Clip on these towers), ``hf/<owner>/<name>[@revision]`` (a model of Hugging Face transformers, whose
            ``config.json`` is always downloaded), the folder of :func:`lamzoo.save_pretrained` or of a training run,
            or ``hf-hub:<owner>/<name>[@revision]``. A registered name has priority over a folder of the same name,
            which ``./<name>`` or ``local-dir:<name>`` refers to. A weights file is not a model name, except
            ``model.safetensors`` in a saved folder: pass it as ``checkpoint_path``.
        pretrained: load weights: those of ``arch.tag`` or, for a bare name, of the first available tag; tags on the
            hub are preferred to bundled ones. The choice is logged, and stored in ``model.pretrained_cfg["tag"]``.
        lam: the masks, a LamConfig or a dict of its fields; None takes those of the weights, of the saved model or, for
            a bare name without weights, of the card, True these or, if there are none, the default LamConfig, False
            builds the plain backbone.
        lam_weights: ``"fresh"`` ignores the masks of all weights, which is needed if ``lam`` describes other masks
            than the trained ones.
        num_classes: width of the head, which stays fresh if the weights have another; 0 for none.
        in_chans: input channels, to which the weights of the first convolution and the preprocessing are adapted.
        img_size: input size, to which position embeddings and mask tables are resized.
        global_pool: pooling of the tokens.
        drop_path_rate: stochastic depth.
        checkpoint_path: weights to load last, a safetensors file of the same architecture. Unless ``lam`` is given, the
            masks get the rank of those in the file.
        cache_dir: folder for downloads; the hub's own cache by default.
        allow_pickle: also read pickles, with ``weights_only=True``.
        **timm_kwargs: further arguments of the model's constructor; fields of the configuration for ``hf/`` models,
            which take ``num_classes`` and ``img_size`` beside those.

    Returns:
        The model, in training mode, with ``pretrained_cfg`` (and its alias ``default_cfg``; ``hf/`` models have
        neither), ``lam_config`` (None for a plain model), ``registry_name`` and ``weights_source`` (what was loaded
        last; None without weights).

    Raises:
        UnknownModelError: no such model or tag.
        ConfigError: invalid masks, or an argument that the model's builder doesn't take or whose value it refuses.
        WeightsError: the weights are unavailable, damaged or don't fit; masks of another ``LamConfig`` never fit,
            whatever their shapes.
    """
    if lam_weights not in ("pretrained", "fresh"):
        raise ConfigError(f"lam_weights is {lam_weights!r}; it must be 'pretrained' or 'fresh'.")
    for key, path in (("checkpoint_path", checkpoint_path), ("cache_dir", cache_dir)):
        if path is not None and not isinstance(path, (str, os.PathLike)):
            raise ConfigError(f"{key} is {shortened(repr(path))}; it must be a path.")
    given = {
        "num_classes": num_classes, "in_chans": in_chans, "img_size": img_size, "global_pool": global_pool,
        "drop_path_rate": drop_path_rate, **timm_kwargs,
    }  # fmt: skip
    given = {key: value for key, value in given.items() if value is not None}
    for name_of_timm, instead in _INSTEAD.items():
        if name_of_timm in given:
            raise UnknownArgumentError(f"create_model takes no {name_of_timm}; {instead}.")
    lam = lam if lam is None or isinstance(lam, bool) else LamConfig.of(lam)
    ref = model_ref(name)
    if ref.kind == "hf":
        if checkpoint_path is not None:
            raise ConfigError(f"{ref.text} takes no checkpoint_path; load the file with the model's load_state_dict.")
        try:
            _check_arguments({"img_size": img_size})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{ref.text} cannot be built with img_size={img_size!r:.60} ({error}).") from error
        return create_transformers_model(
            ref, pretrained=pretrained, lam=lam, fresh_masks=lam_weights == "fresh", arguments=given,
            cache_dir=cache_dir, allow_pickle=allow_pickle,
        )  # fmt: skip
    plan = _plan(ref, pretrained, cache_dir, allow_pickle)
    checkpoint = None if checkpoint_path is None else read_state_dict(checkpoint_path, allow_pickle=allow_pickle)
    file = plan.weights
    state_dict = None if file is None else read_state_dict(file.path, sha256=file.sha256, allow_pickle=allow_pickle)
    # Checkpoints, and folders that timm has saved, don't say which masks they have.
    silent = checkpoint if checkpoint is not None else state_dict if plan.external else None
    if lam is None and silent is not None and lam_weights == "pretrained" and plan.lam is not None:
        plan = replace(plan, lam=with_rank_of(plan.lam, silent, str(checkpoint_path or ref.text)))
    if plan.config is not None and "clip" not in given and _names_towers(plan.args):  # before any is looked for
        raise ConfigError(f"{plan.config} names files of towers, which a saved model contains; remove their names.")
    model: Any = _build(plan, lam, given)
    if not any(parameter.is_meta for parameter in model.parameters()):
        load_towers(model)
    part = None
    if given.get("features_only") and (pretrained or checkpoint_path is not None):
        whole = {key: value for key, value in given.items() if key not in _FEATURE_ARGS}
        part, model = model, _build(plan, lam, whole)
    _load(model, plan, lam, given, state_dict, checkpoint, str(checkpoint_path), fresh_masks=lam_weights == "fresh")
    model = model if part is None else _features(model, part)
    if plan.fused:
        fuse_layers(model)
    return model


def create_for_images(name: str | os.PathLike[str], pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Does :func:`create_model`, and gives an image model of transformers timm's interface: images in, one tensor out.

    Raises:
        ConfigError: also, a model of transformers that takes more than images.
    """
    ref = model_ref(name)
    if ref.kind != "hf":
        return create_model(name, pretrained, **kwargs)
    from lamzoo.registry.huggingface import find_transformers_spec

    spec = find_transformers_spec(ref, kwargs.get("cache_dir"))  # refuses other models before their weights are read
    cfg = pretrained_cfg_of(spec, None)
    size: tuple[int, int] = cfg.input_size[1:]
    given_size = kwargs.pop("img_size", None)
    if given_size is not None:
        size = (given_size, given_size) if isinstance(given_size, int) else tuple(given_size)
        with torch.device("meta"):
            plain, _ = with_timms_interface(create_model(name, **{**kwargs, "lam": False}), size)
        if not plain.takes(size):
            kwargs["img_size"] = given_size
    host: Any = create_model(name, pretrained, **kwargs)
    model, args = with_timms_interface(host, size)
    plan = _Plan(spec, None, cfg, args, spec.lam, None, external=False)
    given = {"num_classes": model.num_classes, "in_chans": plan.cfg.input_size[0], "img_size": model.image_size}
    _label(model, plan, plan.cfg, {**args, **given})
    model.weights_source = host.weights_source
    return model.train()


def find_weights_file(name: str | os.PathLike[str]) -> WeightsFile:
    """Finds the weights that ``create_model(name, pretrained=True)`` loads, downloading them if necessary.

    Raises:
        UnknownModelError: no such model or tag.
        WeightsError: the weights are unavailable.
    """
    ref = model_ref(name)
    if ref.kind == "hf":
        return resolve_repo(ref.repo, revision=ref.revision)
    file = _plan(ref, True, None, False).weights
    assert file is not None  # requested by the True above
    return file


def obtain(
    spec: ModelSpec, name: str | ModelRef, *, cache_dir: str | Path | None = None, allow_pickle: bool = False
) -> tuple[PretrainedWeights, WeightsFile]:
    """Finds the weights of a name: those of its tag or, for a bare name, of the first available tag.

    Args:
        spec: the model.
        name: its name, with or without tag.
        cache_dir: folder for downloads; the hub's own cache by default.
        allow_pickle: also accept pickles.

    Raises:
        UnknownModelError: no such tag.
        WeightsNotFoundError: the weights of the tag, or of all tags of a bare name, are unavailable.
        UnsafeWeightsError: the only file is a pickle, which is not allowed.
    """
    ref = name if isinstance(name, ModelRef) else model_ref(name)
    if ref.tag is not None:
        tag = find_weights(spec, ref)
        assert tag is not None  # find_weights raises for a tag that isn't there
        try:
            return tag, _resolve(spec, tag, cache_dir, allow_pickle)
        except HubUnreachableError as error:
            raise _unreachable(spec, error) from error
    order = sorted(spec.tags.values(), key=lambda tag: not tag.on_hub)  # stable: keeps the card's order within each
    if not order:
        raise WeightsNotFoundError(
            f"{spec.name} has no weights yet; use pretrained=False, or pass a safetensors file as checkpoint_path=."
        )
    errors: list[WeightsError] = []
    unreachable = False
    for tag in order:
        if unreachable and location(tag, weights_dir=spec.weights_dir, cache_dir=cache_dir) in ("hub", "missing"):
            continue  # waits only once for an unreachable hub
        try:
            file = _resolve(spec, tag, cache_dir, allow_pickle)
        except (HashMismatchError, UnsafeWeightsError):
            raise  # a wrong file is not silently replaced by another tag's
        except WeightsError as error:
            errors.append(error)
            unreachable = unreachable or isinstance(error, HubUnreachableError)
            continue
        if tag is order[0]:
            _logger.info("%s: using the weights %s.%s", spec.name, spec.name, tag.name)
        else:
            _logger.warning(
                "%s: using the weights %s.%s, because %s.%s is not available: %s",
                spec.name, spec.name, tag.name, spec.name, order[0].name, str(errors[0]).partition("\n")[0],
            )  # fmt: skip
        return tag, file
    for failure in errors:
        if isinstance(failure, HubUnreachableError):
            raise _unreachable(spec, failure) from failure
    raise WeightsNotFoundError(
        f"None of the weights of {spec.name} ({', '.join(tag.name for tag in order)}) are available here: {errors[0]}"
    ) from errors[0]


def _load(
    model: Any,
    plan: _Plan,
    lam: LamConfig | bool | None,
    given: Mapping[str, Any],
    state_dict: Mapping[str, Tensor] | None,
    checkpoint: Mapping[str, Tensor] | None,
    path: str,
    *,
    fresh_masks: bool,
) -> None:
    """Loads the weights of a plan into its model, and then those of a checkpoint at ``path``; either may be None."""
    how: dict[str, Any] = {
        "given": {*given, *(["lam"] if lam is False else [])}, "arch": plan.spec.backbone.get("timm")
    }  # fmt: skip
    fresh = "of lam_weights='fresh'" if fresh_masks else ""
    if plan.weights is not None and state_dict is not None:
        source = plan.weights.source
        replaced = "those of checkpoint_path are loaded" if any(".lam." in key for key in checkpoint or ()) else ""
        load_into(
            model, state_dict, source=source, external=plan.external, lam=plan.lam, fresh_lam=fresh or replaced, **how
        )
        model.weights_source = source if plan.tag is None else f"{plan.spec.name}.{plan.tag.name}"
    if checkpoint is not None:
        try:
            load_into(model, checkpoint, source=path, fresh_lam=fresh, **how)
        except StateDictError as error:
            other = None if lam is not None else _tag_with_masks(plan, given, checkpoint)
            if other is None:
                raise
            raise StateDictError(f"{error} It has the masks of {other}: use that name.") from error
        model.weights_source = path


def _tag_with_masks(plan: _Plan, given: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> str | None:
    """Returns the name of another tag of the model, whose masks are those of a file; None if there is none."""
    masks = {key: value.shape for key, value in weights.items() if ".lam." in key}
    for tag in plan.spec.tags.values():
        if tag is plan.tag or tag.lam is None or not masks:
            continue
        with torch.device("meta"):
            model = _build(replace(plan, lam=tag.lam), None, given)
        if masks == {key: value.shape for key, value in model.state_dict().items() if ".lam." in key}:
            return f"{plan.spec.name}.{tag.name}"
    return None


def _features(whole: Any, features: Any) -> nn.Module:
    """Copies the weights of a whole model into the part of it that ``features_only=True`` built."""
    weights = whole.state_dict()
    # timm's wrappers keep the model's names, or put one of their own before them.
    found = {key: weights.get(key, weights.get(key.partition(".")[2])) for key in features.state_dict()}
    missing = next((key for key, value in found.items() if value is None), None)
    if missing is not None:
        raise ConfigError(
            f"features_only=True renames the weights of {whole.registry_name} ({missing}); create the whole model and "
            "call its forward_intermediates."
        )
    features.load_state_dict(found)
    features.weights_source = whole.weights_source
    return features


def _unreachable(spec: ModelSpec, error: HubUnreachableError) -> HubUnreachableError:
    def of_another_kind(name: str) -> bool:
        return str(find_spec(name).builder).partition(":")[0] != str(spec.builder).partition(":")[0]

    here = sorted(bundled_models(), key=of_another_kind)[:3]
    bundled = f", or a bundled model ({', '.join(here)}, ...)" if here else ""
    works = (
        f"Works without it: {spec.name} with pretrained=False, or with your own file as checkpoint_path= "
        f"(--checkpoint){bundled}."
    )
    return HubUnreachableError(f"{spec.name}: {error.missing}", works, error.bring)


def _resolve(spec: ModelSpec, tag: PretrainedWeights, cache_dir: str | Path | None, allow_pickle: bool) -> WeightsFile:
    return resolve(
        f"{spec.name}.{tag.name}", tag, weights_dir=spec.weights_dir, cache_dir=cache_dir, allow_pickle=allow_pickle
    )


def _plan(ref: ModelRef, pretrained: bool, cache_dir: str | Path | None, allow_pickle: bool) -> _Plan:
    if ref.is_saved:
        saved = read_saved(ref, with_weights=pretrained, cache_dir=cache_dir, allow_pickle=allow_pickle)
        spec = spec_of_saved(saved)
        return _Plan(
            spec, None, saved.cfg, saved.args, spec.lam, saved.weights, saved.external, saved.reduction, saved.path,
            saved.fused,
        )  # fmt: skip
    spec = find_spec(ref)
    tag, weights = find_weights(spec, ref), None
    if pretrained:
        tag, weights = obtain(spec, ref, cache_dir=cache_dir, allow_pickle=allow_pickle)
        if tag.note is not None:
            _logger.info("%s.%s: %s", spec.name, tag.name, tag.note)
    cfg = pretrained_cfg_of(spec, tag)
    if tag is None:
        return _Plan(spec, None, cfg, {}, spec.lam, None, external=False)
    # A bare name without weights has the masks of the card, for training anew.
    lam = spec.of_tag(tag).lam if pretrained or ref.tag is not None else spec.lam
    return _Plan(spec, tag, cfg, tag.args, lam, weights, tag.external, tag.reduction)


def _build(plan: _Plan, lam: LamConfig | bool | None, given: Mapping[str, Any]) -> nn.Module:
    spec, cfg = plan.spec, plan.cfg
    masks = lam if isinstance(lam, LamConfig) else plan.lam
    if lam is False:
        masks = None
    elif lam is True and masks is None:
        masks = LamConfig()
    arguments = {**plan.args, **given}
    if isinstance(spec.builder, str):
        arguments = {**_defaults(cfg), **arguments}
        model = _call(plan, (dict(spec.backbone),), {"lam": masks, **arguments})
    else:
        if plan.weights is not None and plan.tag is not None:
            stated = {**spec.pretrained_cfg, **plan.tag.pretrained_cfg}
            wanted = {key: value for key, value in _defaults(cfg).items() if _CFG_KEY[key] in stated}
            arguments = {**wanted, **arguments}
        model = _call(plan, (), arguments)
        if masks is not None and getattr(model, "lam_config", None) is None:
            add_lam(model, masks)
        elif lam is False and getattr(model, "lam_config", None) is not None:
            remove_lam(model)
        if plan.tag is not None or not plan.args:
            base = getattr(model, "pretrained_cfg", None)
            cfg = pretrained_cfg_of(spec, plan.tag, PretrainedCfg(**base) if base else None)
    stated = {} if "clip" in given else {**spec.pretrained_cfg, **(plan.tag.pretrained_cfg if plan.tag else {})}
    if plan.config is None or "clip" in given:  # the record of a saved model is that of its towers
        towers = {key: value for key, value in getattr(model, "tower_preprocessing", {}).items() if key not in stated}
        cfg = replace(cfg, **towers)
    _label(model, plan, cfg, arguments)
    reduction = plan.reduction
    if reduction is not None and (masks is not None or reduction.method == "merge"):  # pruning needs the masks
        try:
            reduce_tokens(model, reduction)
        except LamzooError as error:
            where = plan.config or f"{spec.name}.{plan.tag.name if plan.tag is not None else ''}"
            raise ConfigError(f"The token reduction of {where} does not fit the model: {error}") from error
    return model


def _call(plan: _Plan, config: tuple[dict[str, Any], ...], arguments: Mapping[str, Any]) -> nn.Module:
    build = builder_of(plan.spec)
    try:
        if isinstance(plan.spec.builder, str):  # an argument of a plug-in may have the name and another meaning
            _check_arguments(arguments)
        inspect.signature(build).bind(*config, **arguments)
        with _MemoryLimit():
            return build(*config, **arguments)
    except LamzooError:
        raise
    except (Exception, SystemExit) as error:  # builders of timm and plug-ins raise anything for values that don't fit
        if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
            culprit = str(error).rsplit("unexpected keyword argument", 1)[1].strip()
            raise UnknownArgumentError(f"{plan.spec.name} takes no argument {culprit}; leave it out.") from error
        values = ", ".join(f"{key}={reprlib.repr(value)}" for key, value in arguments.items() if key != "lam")
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".removesuffix(": ")
        where = f" {plan.config} states some of them;" if plan.config else ""
        raise ConfigError(
            f"{plan.spec.name} cannot be built with {values or 'its defaults'} ({reason});{where} pass other values."
        ) from error


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    """Checks the arguments that timm's models share, which timm itself notices late or not at all.

    Raises:
        TypeError: one has another type; a tuple is checked element by element.
        ValueError: one is out of range.
    """
    for key in ARGUMENTS.keys() & arguments.keys():
        kind, value = Real if key.endswith("_rate") else Integral, arguments[key]
        if key in ("img_size", "patch_size") and isinstance(value, (tuple, list)) and len(value) != 2:
            raise ValueError(f"{key} must be a height and a width")
        for one in _parts(value):
            if not isinstance(one, kind) or isinstance(one, bool):
                raise TypeError(f"{key} must be {'an integer' if kind is Integral else 'a number'}")
            if problem := ARGUMENTS[key].problem(float(one)):
                raise ValueError(f"{key} is {one!r:.60}; {problem}")


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for inner in value:
            yield from _parts(inner)
    elif value is not None:
        yield value


class _MemoryLimit(TorchDispatchMode):
    """Ends the building of a model whose tensors exceed this machine's memory, before the system ends the process."""

    def __init__(self) -> None:
        super().__init__()
        self.left = math.inf
        if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
            self.left = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor):
            return result
        before = next((arg for arg in args if isinstance(arg, Tensor)), None)
        if before is None and result.device.type == "cpu":
            self.left -= result.nbytes
            if self.left < 0:
                raise ConfigError("The model needs more memory than this machine has; build a smaller one.")
        elif before is not None and result.is_meta and not before.is_meta:  # accelerate's init_empty_weights
            self.left += result.nbytes
        return result


def _defaults(cfg: PretrainedCfg) -> dict[str, Any]:
    """Returns the constructor arguments that timm also takes from the record of the weights."""
    defaults: dict[str, Any] = {"in_chans": cfg.input_size[0]}
    if cfg.num_classes >= 0:
        defaults["num_classes"] = cfg.num_classes
    if cfg.fixed_input_size:
        defaults["img_size"] = tuple(cfg.input_size[-2:])
    return defaults


def _of_channels(cfg: PretrainedCfg, channels: int) -> PretrainedCfg:
    """Adapts timm's record of the preprocessing to the number of input channels."""
    fitted: dict[str, Any] = {
        key: (channels, *size[1:])
        for key in ("input_size", "test_input_size", "min_input_size")
        if (size := getattr(cfg, key)) is not None
    }
    fitted |= {key: of_channels(getattr(cfg, key), channels) for key in ("mean", "std")}
    return replace(cfg, **fitted)


def _names_towers(arguments: Mapping[str, Any]) -> bool:
    """Returns whether arguments of CLIP4Clip name files or folders of pretrained towers."""
    clip = arguments.get("clip")
    vision, text = ((clip.get(key) if isinstance(clip, Mapping) else None) for key in ("vision_cfg", "text_cfg"))
    vision, text = (each if isinstance(each, Mapping) else {} for each in (vision, text))
    folder = "hf_model_name" in text and "hf_config" not in text
    return bool(vision.get("timm_model_pretrained") or text.get("hf_model_pretrained") or folder)


_CFG_KEY = {"in_chans": "input_size", "num_classes": "num_classes", "img_size": "input_size"}


def _label(model: Any, plan: _Plan, cfg: PretrainedCfg, arguments: Mapping[str, Any]) -> None:
    model.pretrained_cfg = _of_channels(cfg, arguments.get("in_chans", cfg.input_size[0])).to_dict()
    model.default_cfg = model.pretrained_cfg
    model.pretrained_model_args = dict(plan.args)
    model.registry_name = plan.spec.name
    model.task = plan.spec.task
    model.weights_source = None
    if getattr(model, "lam_config", None) is None:
        model.lam_config = None
    # What timm's own factory records, for timm's data configuration and export.
    kept = {key: value for key, value in arguments.items() if key not in ("device", "dtype")}
    kept |= getattr(model, "resolved_args", {})
    model._model_args = {**getattr(model, "_model_args", {}), **kept}
    if not hasattr(model, "_traits"):
        _init_model_traits(model, kept, model.pretrained_cfg)
