"""From a name to a built model, with its weights, masks and timm's records on it; the public face of the registry."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from timm.models import PretrainedCfg
from timm.models._input import _init_model_traits
from torch import nn

from lamzoo import hub
from lamzoo.adapters import add_lam, remove_lam
from lamzoo.data.images.decode import of_channels
from lamzoo.errors import (
    ConfigError,
    HashMismatchError,
    HubUnreachableError,
    UnsafeWeightsError,
    WeightsError,
    WeightsNotFoundError,
)
from lamzoo.lam import LamConfig
from lamzoo.reduction import PruneConfig
from lamzoo.reduction.hooks import prune
from lamzoo.registry.cards import ModelSpec, PretrainedWeights
from lamzoo.registry.catalog import (
    builder_of,
    bundled_models,
    find_spec,
    find_weights,
    pretrained_cfg_of,
    split_name,
)
from lamzoo.registry.external import OPEN_CLIP_PREFIX
from lamzoo.registry.saving import read_saved
from lamzoo.weights.files import WeightsFile, read_state_dict, resolve
from lamzoo.weights.loading import load_into

__all__ = ["create_model", "obtain"]

_logger = logging.getLogger(__name__)

_Source = Literal["local-dir", "hf-hub"]
_FEATURE_ARGS = ("features_only", "out_indices", "feature_cls")  # of timm, which wraps a model that is built already


@dataclass(frozen=True)
class _Plan:
    """What is to be built: the card, timm's record, the arguments that come with the weights, and the weights."""

    card: ModelSpec
    tag: PretrainedWeights | None
    cfg: PretrainedCfg
    args: Mapping[str, Any]
    lam: LamConfig | None
    weights: WeightsFile | None
    external: bool
    prune: PruneConfig | None = None


def create_model(
    name: str,
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
    """Creates a model by name; what timm has an argument for means what it means there.

    Args:
        name: ``arch`` or ``arch.tag`` of the registry, ``timm/<timm name>``, ``open_clip/<open_clip name>[:tag]`` for
            plain CLIP4Clip on those towers, ``local-dir:<folder>`` as written by :func:`lamzoo.save_pretrained`, or
            ``hf-hub:<owner>/<name>[@revision]``.
        pretrained: load weights: exactly those of ``arch.tag``, or, for a bare name, the first of its tags that can
            be had here, those of the hub before the bundled ones; which one is logged, and is in
            ``model.pretrained_cfg["tag"]``.
        lam: the masks, as a LamConfig or a dict of its fields; None takes the card's (or the saved model's), True
            those or, where it has none, the default LamConfig, False builds the plain backbone.
        lam_weights: ``"fresh"`` leaves the masks of all weights out, which is needed where ``lam`` describes other
            masks than those that were trained.
        num_classes: width of the head, which stays fresh where the weights have another; 0 for none.
        in_chans: input channels, to which the weights of the first convolution and the preprocessing are adapted.
        img_size: input size, to which position embeddings and mask tables are resized.
        global_pool: how tokens become one vector.
        drop_path_rate: stochastic depth.
        checkpoint_path: weights to load at the end, from a safetensors file of the same architecture.
        cache_dir: folder for downloads, in place of the hub's own cache.
        allow_pickle: also read pickles, with ``weights_only=True``.
        **timm_kwargs: further arguments of the model's constructor.

    Returns:
        The model, in training mode, with ``pretrained_cfg`` (and its alias ``default_cfg``), ``lam_config`` (None
        for a plain model), ``registry_name`` and ``weights_source`` (what was loaded last; None without weights).

    Raises:
        UnknownModelError: no such model or tag.
        ConfigError: an argument that the model's builder doesn't take, masks that mean nothing, or an unknown source
            before the colon.
        WeightsError: the weights cannot be had, are damaged, or do not fit; masks of another ``LamConfig`` don't fit
            either, whatever their shapes.
    """
    if lam_weights not in ("pretrained", "fresh"):
        raise ConfigError(f"lam_weights is {lam_weights!r}; it must be 'pretrained' or 'fresh'.")
    given = {
        "num_classes": num_classes, "in_chans": in_chans, "img_size": img_size, "global_pool": global_pool,
        "drop_path_rate": drop_path_rate, **timm_kwargs,
    }  # fmt: skip
    given = {key: value for key, value in given.items() if value is not None}
    lam = lam if lam is None or isinstance(lam, bool) else LamConfig.of(lam)
    plan = _plan(name, pretrained, cache_dir, allow_pickle)
    model: Any = _build(plan, lam, given)
    part = None
    if given.get("features_only") and (pretrained or checkpoint_path is not None):
        whole = {key: value for key, value in given.items() if key not in _FEATURE_ARGS}
        part, model = model, _build(plan, lam, whole)
    checkpoint = None if checkpoint_path is None else read_state_dict(checkpoint_path, allow_pickle=allow_pickle)
    how: dict[str, Any] = {
        "given": {*given, *(["lam"] if lam is False else [])}, "arch": plan.card.backbone.get("timm")
    }  # fmt: skip
    fresh = "lam_weights='fresh' was asked for" if lam_weights == "fresh" else ""
    if plan.weights is not None:
        file = plan.weights
        state_dict = read_state_dict(file.path, sha256=file.sha256, allow_pickle=allow_pickle)
        replaced = "those of checkpoint_path follow" if any(".lam." in key for key in checkpoint or ()) else ""
        load_into(
            model, state_dict, source=file.source, external=plan.external, lam=plan.lam,
            fresh_lam=fresh or replaced, **how,
        )  # fmt: skip
        model.weights_source = f"{plan.card.name}.{plan.tag.name}" if plan.tag is not None else file.source
    if checkpoint is not None:
        load_into(model, checkpoint, source=str(checkpoint_path), fresh_lam=fresh, **how)
        model.weights_source = str(checkpoint_path)
    return model if part is None else _features(model, part)


def obtain(
    card: ModelSpec, name: str, *, cache_dir: str | Path | None = None, allow_pickle: bool = False
) -> tuple[PretrainedWeights, WeightsFile]:
    """Finds the weights that a name asks for: those of its tag, or of a bare name's first tag that can be had here.

    Raises:
        WeightsNotFoundError: the tag's, or those of any tag of a bare name, cannot be had here.
        UnsafeWeightsError: the only file is a pickle, and not allowed.
    """
    if split_name(name)[1] is not None:
        tag = find_weights(card, name)
        assert tag is not None  # find_weights raises for a tag that isn't there
        try:
            return tag, _resolve(card, tag, cache_dir, allow_pickle)
        except HubUnreachableError as error:
            raise _unreachable(card, error) from error
    order = sorted(card.tags.values(), key=lambda tag: not tag.on_hub)  # stable: the card's order within each
    if not order:
        raise WeightsNotFoundError(
            f"{card.name} has no weights yet; use pretrained=False, or pass a safetensors file as checkpoint_path=."
        )
    errors: list[WeightsError] = []
    unreachable = False
    for tag in order:
        if unreachable and not _on_disk(card, tag, cache_dir):
            continue  # one wait for a network that isn't there is enough
        try:
            file = _resolve(card, tag, cache_dir, allow_pickle)
        except (HashMismatchError, UnsafeWeightsError):
            raise  # the file is there and wrong: no reason to take another quietly
        except WeightsError as error:
            errors.append(error)
            unreachable = unreachable or isinstance(error, HubUnreachableError)
            continue
        if tag is order[0]:
            _logger.info("%s: using the weights %s.%s", card.name, card.name, tag.name)
        else:
            _logger.warning(
                "%s: using the weights %s.%s, because %s.%s cannot be had here: %s",
                card.name, card.name, tag.name, card.name, order[0].name, str(errors[0]).partition("\n")[0],
            )  # fmt: skip
        return tag, file
    for failure in errors:
        if isinstance(failure, HubUnreachableError):
            raise _unreachable(card, failure) from failure
    raise WeightsNotFoundError(
        f"None of the weights of {card.name} ({', '.join(tag.name for tag in order)}) can be had here: {errors[0]}"
    ) from errors[0]


def _features(whole: Any, features: Any) -> nn.Module:
    """Moves the weights of a whole model into the part of it that ``features_only=True`` made."""
    weights = whole.state_dict()
    found = {key: weights.get(key, weights.get(key.removeprefix("model."))) for key in features.state_dict()}
    missing = next((key for key, value in found.items() if value is None), None)
    if missing is not None:
        raise ConfigError(
            f"features_only=True renames the weights of {whole.registry_name} ({missing}); create the whole model and "
            "call its forward_intermediates."
        )
    features.load_state_dict(found)
    features.weights_source = whole.weights_source
    return features


def _unreachable(card: ModelSpec, error: HubUnreachableError) -> HubUnreachableError:
    def of_another_kind(name: str) -> bool:
        return str(find_spec(name).builder).partition(":")[0] != str(card.builder).partition(":")[0]

    here = sorted(bundled_models(), key=of_another_kind)[:3]
    bundled = f", or a bundled model ({', '.join(here)}, ...)" if here else ""
    works = (
        f"Works without it: {card.name} with pretrained=False, or with your own file as checkpoint_path= "
        f"(--checkpoint){bundled}."
    )
    return HubUnreachableError(f"{card.name}: {error.missing}", works, error.bring)


def _resolve(card: ModelSpec, tag: PretrainedWeights, cache_dir: str | Path | None, allow_pickle: bool) -> WeightsFile:
    return resolve(
        f"{card.name}.{tag.name}", tag, weights_dir=card.weights_dir, cache_dir=cache_dir, allow_pickle=allow_pickle
    )


def _on_disk(card: ModelSpec, tag: PretrainedWeights, cache_dir: str | Path | None) -> bool:
    if tag.file is not None and card.weights_dir is not None and (card.weights_dir / tag.file).is_file():
        return True
    repo = pretrained_cfg_of(card, tag).hf_hub_id
    return repo is not None and hub.cached(repo, tag.hub_file, revision=tag.revision, cache_dir=cache_dir) is not None


def _plan(name: str, pretrained: bool, cache_dir: str | Path | None, allow_pickle: bool) -> _Plan:
    source, colon, place = name.partition(":")
    if not colon or name.startswith(OPEN_CLIP_PREFIX):
        card = find_spec(name)
        tag, weights = find_weights(card, name), None
        if pretrained:
            tag, weights = obtain(card, name, cache_dir=cache_dir, allow_pickle=allow_pickle)
        args = dict(tag.args) if tag is not None else {}
        external, pruning = (tag.external, tag.prune) if tag is not None else (False, None)
        return _Plan(card, tag, pretrained_cfg_of(card, tag), args, card.lam, weights, external, pruning)
    if source not in get_args(_Source) or not place:
        raise ConfigError(
            f"{name!r} is no model name: before a colon stands one of {', '.join(get_args(_Source))}, after it a place."
        )
    saved = read_saved(
        cast(_Source, source), place, with_weights=pretrained, cache_dir=cache_dir, allow_pickle=allow_pickle
    )
    return _Plan(
        find_spec(saved.name), None, saved.cfg, saved.args, saved.lam, saved.weights, saved.external, saved.prune
    )


def _build(plan: _Plan, lam: LamConfig | bool | None, given: Mapping[str, Any]) -> nn.Module:
    card, cfg = plan.card, plan.cfg
    masks = lam if isinstance(lam, LamConfig) else plan.lam
    if lam is False:
        masks = None
    elif lam is True and masks is None:
        masks = LamConfig()
    arguments = {**plan.args, **given}
    if isinstance(card.builder, str):
        arguments = {**_defaults(cfg), **arguments}
        model = _call(card, (dict(card.backbone),), {"lam": masks, **arguments})
    else:
        if plan.weights is not None and plan.tag is not None:
            stated = {**card.pretrained_cfg, **plan.tag.pretrained_cfg}
            wanted = {key: value for key, value in _defaults(cfg).items() if _CFG_KEY[key] in stated}
            arguments = {**wanted, **arguments}
        model = _call(card, (), arguments)
        if masks is not None and getattr(model, "lam_config", None) is None:
            add_lam(model, masks)
        elif lam is False and getattr(model, "lam_config", None) is not None:
            remove_lam(model)
        if plan.tag is not None or not plan.args:
            base = getattr(model, "pretrained_cfg", None)
            cfg = pretrained_cfg_of(card, plan.tag, PretrainedCfg(**base) if base else None)
    _label(model, plan, cfg, arguments)
    if plan.prune is not None and masks is not None:
        prune(model, plan.prune)
    return model


def _call(card: ModelSpec, config: tuple[dict[str, Any], ...], arguments: Mapping[str, Any]) -> nn.Module:
    build = builder_of(card)
    try:
        inspect.signature(build).bind(*config, **arguments)
        return build(*config, **arguments)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        culprit = str(error).rsplit("unexpected keyword argument", 1)[1].strip()
        raise ConfigError(f"{card.name} takes no argument {culprit}; leave it out.") from error


def _defaults(cfg: PretrainedCfg) -> dict[str, Any]:
    """The constructor arguments that timm, too, takes from the record of the weights."""
    defaults: dict[str, Any] = {"in_chans": cfg.input_size[0]}
    if cfg.num_classes >= 0:
        defaults["num_classes"] = cfg.num_classes
    if cfg.fixed_input_size:
        defaults["img_size"] = tuple(cfg.input_size[-2:])
    return defaults


def _of_channels(cfg: PretrainedCfg, channels: int) -> PretrainedCfg:
    """Fits timm's record of the preprocessing to the input channels that a model was built with."""
    fitted: dict[str, Any] = {
        key: (channels, *size[1:])
        for key in ("input_size", "test_input_size", "min_input_size")
        if (size := getattr(cfg, key)) is not None
    }
    fitted |= {key: of_channels(getattr(cfg, key), channels) for key in ("mean", "std")}
    return replace(cfg, **fitted)


_CFG_KEY = {"in_chans": "input_size", "num_classes": "num_classes", "img_size": "input_size"}


def _label(model: Any, plan: _Plan, cfg: PretrainedCfg, arguments: Mapping[str, Any]) -> None:
    model.pretrained_cfg = _of_channels(cfg, arguments.get("in_chans", cfg.input_size[0])).to_dict()
    model.default_cfg = model.pretrained_cfg
    model.pretrained_model_args = dict(plan.args)
    model.registry_name = plan.card.name
    model.weights_source = None
    if getattr(model, "lam_config", None) is None:
        model.lam_config = None
    # What timm's own factory records, for timm's data configuration and export.
    kept = {key: value for key, value in arguments.items() if key not in ("device", "dtype")}
    model._model_args = {**getattr(model, "_model_args", {}), **kept}
    if not hasattr(model, "_traits"):
        _init_model_traits(model, kept, model.pretrained_cfg)
