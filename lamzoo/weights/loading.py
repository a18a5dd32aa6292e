"""Strict loading of a state dict: adapts what the caller's arguments changed and refuses everything else."""

from __future__ import annotations

import functools
import logging
import math
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from timm.models import adapt_input_conv, model_entrypoint
from torch import Tensor, nn

from lamzoo.adapters.state import check_lam_config, few, has_masks
from lamzoo.adapters.wrappers import check_model
from lamzoo.errors import StateDictError
from lamzoo.lam.config import LamConfig
from lamzoo.lam.layer import carried_configs
from lamzoo.lam.masks import PositionTable, drop_dead_biases

_logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]
Converter = Callable[[StateDict, nn.Module], StateDict]

# Arguments of timm's constructors that change the number of tokens, and with it the tables over positions.
_PREFIX_ARGS = frozenset({"class_token", "reg_tokens", "no_embed_class"})
_SIZE_ARGS = _PREFIX_ARGS | {"img_size", "patch_size", "dynamic_img_size"}
# Modules that depend on `global_pool`.
_POOL_PREFIXES = ("norm.", "fc_norm.", "attn_pool.", "head.norm.")
_RADIO_ALIGN_CORNERS = ("base_patch16_radio_v3", "huge_patch16_radio_v3")
_FRESH = "start with new masks by lam_weights='fresh' (in a recipe, model.kwargs.lam_weights)"


def load_into(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    *,
    source: str,
    given: Collection[str] = (),
    arch: str | None = None,
    external: bool = False,
    lam: LamConfig | None = None,
    fresh_lam: str = "",
) -> list[str]:
    """Loads weights into a model, strictly, and returns the adaptations.

    The model is changed only after every key has been checked. The following may differ:

    - ``num_classes`` in ``given``: a head of another width, or one that the file lacks, stays fresh;
    - ``in_chans``: the input convolution's channels are summed or repeated, as in timm;
    - ``img_size`` and other sizes: position embeddings and mask tables are resized;
    - ``global_pool``: the norm or pooling module that it adds or removes;
    - ``lam``: the masks' keys, if the caller removed the masks;
    - non-persistent buffers;
    - the masks' keys, if the file is of a plain backbone without any, or with ``fresh_lam``: the masks stay fresh.

    Args:
        model: a model with timm's ``pretrained_cfg`` (``classifier``, ``first_conv``, ``label_offset``) of the file.
        state_dict: parameter name to tensor.
        source: name of the weights in messages.
        given: names of the model arguments that the caller passed.
        arch: timm's name of the architecture, which selects its converter; by default that of the model's module.
        external: the file may be in its authors' own format: timm's converter may rename and drop keys.
        lam: configuration of the file's masks, if ``state_dict`` carries no ``LamConfig``; without either, masks are
            loaded with a warning.
        fresh_lam: reason to ignore the file's masks, for the log; empty to load them.

    Returns:
        One line for each adaptation, as logged.

    Raises:
        StateDictError: masks of another ``LamConfig``, or any other missing or unexpected key or wrong shape; the
            model is unchanged.
        UnsupportedHostError: the model is not a ``torch.nn.Module``.
    """
    check_model(model)
    notes: list[str] = []
    weights = _without_buffers(model, state_dict, notes)
    if fresh_lam:
        weights = _without_lam(weights, fresh_lam, notes)
    elif any(".lam." in key for key in state_dict) and has_masks(model):
        carried = next(iter(carried_configs(state_dict).values()), lam)
        known = lam is not None and carried is not None and not carried.differences(lam)  # by the card or the folder
        own = "omit lam=" if known else "pass lam={config}"
        check_lam_config(model, state_dict, source, lam, f"{own}, or {_FRESH}")
    weights = _convert(model, weights, source, given, arch, external, notes)
    _adapt_lam(model, weights, source, given, notes)
    _adapt_input(model, weights, given, notes)
    _adapt_head(model, weights, given, notes)
    may_miss = _adapt_pool(model, weights, given, notes)
    _check(model, weights, source, given, may_miss | _fresh(model, weights, bool(fresh_lam), notes))
    _warn_of_nonfinite({key: weights[key] for key, _ in model.named_parameters() if key in weights}, source)
    model.load_state_dict(weights, strict=False)
    _logger.info("Loaded %s into %s%s", source, type(model).__name__, "".join(f"; {note}" for note in notes) + ".")
    return notes


def with_rank_of(lam: LamConfig, state_dict: Mapping[str, Tensor], source: str) -> LamConfig:
    """Returns a configuration of masks with the rank of the masks in a state dict; unchanged if this is unknown.

    The rank is read from the ``LamConfig`` that the state dict carries, unless this differs in more than the rank, or
    from the shapes of the tensors.

    Args:
        lam: masks of the model.
        state_dict: parameter name to tensor.
        source: name of the weights, for the log.
    """
    carried = next(iter(carried_configs(state_dict).values()), None)
    if carried is not None:
        rank = carried.rank if lam.differences(carried) == ["rank"] else lam.rank
    else:
        rank = _rank_of(lam, state_dict) or lam.rank
    if rank != lam.rank:
        _logger.info("%s has masks of rank %d, with which the model is built, instead of %d", source, rank, lam.rank)
    return replace(lam, rank=rank)


def _rank_of(lam: LamConfig, state_dict: Mapping[str, Tensor]) -> int | None:
    """Returns the rank of the masks by their shapes; None without masks of this kind."""
    last = 2 * len(lam.hidden)
    query, key, table = (
        next((value for name, value in state_dict.items() if name.endswith(f".lam.network.{end}")), None)
        for end in (f"query.{last}.weight", f"key.{last}.weight", "table.weight")
    )
    if lam.has_positions:
        return table.shape[-1] if table is not None and table.ndim == 3 and table.shape[-1] else None
    if query is None or key is None:
        return None
    heads = len(key) - len(query)  # the key's factor has one more column for each
    return len(query) // heads if heads > 0 and len(query) % heads == 0 and len(query) else None


def timm_converter(arch: str) -> Converter | None:
    """Returns the function with which timm converts checkpoints of an architecture; None if there is none.

    timm's entry points bind options to the ``checkpoint_filter_fn`` of their module and don't publish them, so the
    options are repeated here; a test compares them with timm's.
    """
    module = model_entrypoint(arch).__module__
    convert: Converter | None = getattr(sys.modules[module], "checkpoint_filter_fn", None)
    options: dict[str, Any] = {}
    if module == "timm.models.deit":
        options = {"adapt_layer_scale": True}
    elif module == "timm.models.vision_transformer" and ("flexi" in arch or "radio" in arch):
        options = {"interpolation": "bilinear", "antialias": False}
        if "radio" in arch and "flexi" not in arch:
            options["align_corners"] = any(name in arch for name in _RADIO_ALIGN_CORNERS)
    return functools.partial(convert, **options) if convert is not None and options else convert


def _without_buffers(model: nn.Module, state_dict: Mapping[str, Tensor], notes: list[str]) -> StateDict:
    """Copies a state dict without buffers that older versions of the model saved and this one computes."""
    computed = dict(model.named_buffers()).keys() - model.state_dict().keys()
    found = sorted(computed & state_dict.keys())
    if found:
        notes.append(f"{few(found)} ignored: the model computes these buffers")
    return {key: value for key, value in state_dict.items() if key not in computed}


def _convert(
    model: nn.Module,
    weights: StateDict,
    source: str,
    given: Collection[str],
    arch: str | None,
    external: bool,
    notes: list[str],
) -> StateDict:
    convert = (
        timm_converter(arch) if arch else getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    )
    if convert is None:
        return weights
    before = {key: tuple(value.shape) for key, value in weights.items()}
    try:
        converted = convert(weights, model)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if "pos_embed" in weights and (prefix := sorted(_PREFIX_ARGS & set(given))):
            raise StateDictError(
                f"{source} does not fit {_name(model)}: its 'pos_embed' of shape {before['pos_embed']} is for another "
                f"number of prefix tokens; {' and '.join(f'{name}=' for name in prefix)} must be what the weights were "
                "trained with."
            ) from error
        raise StateDictError(
            f"timm cannot read {source} as weights of {arch or type(model).__name__} ({type(error).__name__}: {error})."
        ) from error
    after = {key: tuple(value.shape) for key, value in converted.items()}
    if before.keys() != after.keys():
        lost, new = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
        ours = arch is None and type(model).__module__.startswith("lamzoo.")  # our own converters drop no key
        if not external and not ours:
            raise StateDictError(
                f"{source} does not fit {_name(model)}: its keys {few(lost)} are of another format or unexpected."
            )
        whose = "the" if ours else "timm's"
        notes.append(f"{whose} converter replaced the keys {few(lost)} by {few(new) if new else 'nothing'}")
    for key in before.keys() & after.keys():
        if before[key] != after[key]:
            if not external and not _SIZE_ARGS & set(given):
                raise StateDictError(
                    f"{source} does not fit {_name(model)}: {key!r} has shape {before[key]} and the model's is "
                    f"{after[key]}; pass img_size= to resize it, or omit img_size= to use the file's."
                )
            notes.append(f"{key} resized from {before[key]} to {after[key]}")
    return converted


def _without_lam(state_dict: Mapping[str, Tensor], why: str, notes: list[str]) -> StateDict:
    kept = {key: value for key, value in state_dict.items() if ".lam." not in key}
    if len(kept) < len(state_dict):
        notes.append(f"{len(state_dict) - len(kept)} mask tensors ignored, because {why}")
    return kept


def _adapt_lam(model: nn.Module, weights: StateDict, source: str, given: Collection[str], notes: list[str]) -> None:
    has_lam = any(".lam." in key for key in model.state_dict())
    in_file = [key for key in weights if ".lam." in key]
    if in_file and not has_lam and "lam" in given:
        for key in in_file:
            del weights[key]
        notes.append(f"{len(in_file)} mask tensors ignored, because of lam=False")
    if dead := drop_dead_biases(model, weights):
        notes.append(f"key-side biases ignored, which have no effect in additive masks: {few(dead)}")
    for name, module in model.named_modules():
        weight, bias = f"{name}.weight", f"{name}.bias"
        if not isinstance(module, PositionTable) or not {weight, bias} <= weights.keys():
            continue
        old, new = weights[weight].shape[1], module.weight.shape[1]
        if old == new:
            continue
        misfit = f"{source} does not fit {_name(model)}: {weight!r} is for {old} tokens and the model has {new}"
        if module.grid is None and (argument := _sizing_argument(model, weight)):
            raise StateDictError(
                f"{misfit}; {argument}= (or LamConfig.max_length, where it is set) must be what the weights were "
                "trained with."
            )
        if not _SIZE_ARGS & set(given):
            raise StateDictError(f"{misfit}; pass img_size= to resize it, or omit img_size= to use the file's.")
        grid = _old_grid(model, old - module.num_prefix_tokens) if module.grid else None
        if module.grid and grid is None:
            raise StateDictError(
                f"{misfit}, and the file's patch grid is unknown: its patches form no square; omit img_size= and use "
                "the size that the weights were trained with."
            )
        weights[weight], weights[bias] = module.adapt(weights[weight], weights[bias], grid)
        notes.append(f"{name} resized from {old} to {new} tokens")


def _adapt_input(model: nn.Module, weights: StateDict, given: Collection[str], notes: list[str]) -> None:
    if "in_chans" not in given:
        return
    for name in _names(model, "first_conv"):
        key = f"{name}.weight"
        target = model.state_dict().get(key)
        if key not in weights or target is None or weights[key].shape == target.shape or target.ndim != 4:
            continue
        old, new = weights[key].shape[1], target.shape[1]
        try:
            weights[key] = adapt_input_conv(new, weights[key], base_chans=old)
            notes.append(f"{key} adapted from {old} to {new} input channels")
        except NotImplementedError:
            weights[key] = target
            notes.append(f"{key} stays fresh: {old} input channels cannot be adapted to {new}")


def _adapt_head(model: nn.Module, weights: StateDict, given: Collection[str], notes: list[str]) -> None:
    target = model.state_dict()
    offset = _cfg(model).get("label_offset") or 0
    for name in _names(model, "classifier"):
        keys = (f"{name}.weight", f"{name}.bias")
        if "num_classes" in given and not weights.keys() & set(keys):  # as of a backbone trained without labels
            if fresh := {key: target[key] for key in keys if key in target}:
                weights.update(fresh)
                notes.append(f"{name} stays fresh: the file has no classifier")
            continue
        for key in keys:
            if key not in weights:
                continue
            if offset and key in target and weights[key].shape[0] == target[key].shape[0] + offset:
                weights[key] = weights[key][offset:]
                notes.append(f"{key} without its first {offset} background classes")
            elif "num_classes" in given and (key not in target or weights[key].shape != target[key].shape):
                old = weights.pop(key).shape[0]
                if key in target:
                    weights[key] = target[key]
                    notes.append(f"{key} stays fresh: {old} classes in the file, {target[key].shape[0]} requested")
                else:
                    notes.append(f"{key} ignored, because of num_classes=0")


def _adapt_pool(model: nn.Module, weights: StateDict, given: Collection[str], notes: list[str]) -> set[str]:
    if "global_pool" not in given:
        return set()
    target = model.state_dict().keys()
    extra = [key for key in weights if key not in target and key.startswith(_POOL_PREFIXES)]
    fresh = {key for key in target if key not in weights and key.startswith(_POOL_PREFIXES)}
    for key in extra:
        del weights[key]
    if extra:
        notes.append(f"{few(extra)} ignored, because another global_pool was requested")
    if fresh:
        notes.append(f"{few(sorted(fresh))} fresh, because another global_pool was requested")
    return fresh


def _fresh(model: nn.Module, weights: StateDict, left_out: bool, notes: list[str]) -> set[str]:
    if any(".lam." in key for key in weights):
        return set()
    fresh = {key for key in model.state_dict() if ".lam." in key}
    if fresh:
        why = "" if left_out else ", because the file is of a plain backbone"
        notes.append(f"{len(fresh)} mask tensors stay fresh{why}")
    return fresh


def _check(model: nn.Module, weights: StateDict, source: str, given: Collection[str], may_miss: set[str]) -> None:
    target = model.state_dict()
    missing = [key for key in target if key not in weights and key not in may_miss]
    unexpected = [key for key in weights if key not in target]
    misshapen = [key for key in target if key in weights and weights[key].shape != target[key].shape]
    shapes = [
        f"{key} ({tuple(weights[key].shape)} in the file, {tuple(target[key].shape)} in the model)" for key in misshapen
    ]
    types = [
        f"{key} ({weights[key].dtype} in the file, {target[key].dtype} in the model)"
        for key in target
        if key in weights and _kind(weights[key]) != _kind(target[key])
    ]
    faults = [
        f"{what} {few(keys)}"
        for what, keys in (
            ("missing keys", missing),
            ("unexpected keys", unexpected),
            ("wrong shapes", shapes),
            ("wrong types", types),
        )
        if keys
    ]
    if not faults:
        return
    hint = ""
    if types:
        hint = "; save the weights as floats again"
    elif unexpected and all(".lam." in key for key in unexpected):
        hint = "; the file has masks that the model lacks: omit lam=, or pass the file's own LamConfig"
    elif all(".lam." in key for key in missing + misshapen) and not unexpected and not types:
        hint = f"; the masks differ: omit lam=, pass the file's own LamConfig, or {_FRESH}"
    elif misshapen and not missing and not unexpected and not types:
        hint = f"; {_advice(model, misshapen, given)}"
    raise StateDictError(f"{source} does not fit {_name(model)}: {'; '.join(faults)}{hint}.")


def _kind(tensor: Tensor) -> str:
    """Returns the kind of numbers of a tensor; one kind cannot hold another's."""
    if tensor.is_floating_point():
        return "float" if tensor.dtype.itemsize > 1 else str(tensor.dtype)  # these go with scales, which are not known
    return "complex" if tensor.is_complex() else "whole"


def _warn_of_nonfinite(weights: Mapping[str, Tensor], source: str) -> None:
    def finite(tensor: Tensor) -> bool:  # aminmax propagates NaN, and needs no copy of the tensor
        return tensor.numel() == 0 or all(bool(end.isfinite()) for end in tensor.aminmax())

    odd = [key for key, value in weights.items() if _kind(value) == "float" and not finite(value)]
    if odd:
        _logger.warning("%s has values that are not finite (%s); outputs may be NaN.", source, few(odd))


def _advice(model: nn.Module, misshapen: Collection[str], given: Collection[str]) -> str:
    """Suggests the arguments that explain the shapes that differ."""
    names = {_sizing_argument(model, key) for key in misshapen}
    known = sorted(name for name in names if name is not None)
    if len(known) < len(names):  # such as a width, which sizes tensors everywhere
        known = sorted(set(given) - {"lam"})
    if not known:
        return "the weights are of a model with other arguments: pass those that it was trained with"
    adapted = [name for name in known if name in ("num_classes", "in_chans") and name not in given]
    if adapted == known:
        return f"for another head or input, pass {' and '.join(f'{name}=' for name in adapted)}"
    return f"{' and '.join(f'{name}=' for name in known)} must be what the weights were trained with"


def _sizing_argument(model: nn.Module, key: str) -> str | None:
    """Returns the argument of ``create_model`` that sizes a tensor, if the model or its record states it."""
    patterns: dict[str, str] = {**getattr(model, "sized_by", {}), "pos_embed": "img_size"}
    for end, argument in (("classifier", "num_classes"), ("first_conv", "in_chans")):
        patterns |= {f"{name}.*": argument for name in _names(model, end)}
    return next((argument for pattern, argument in patterns.items() if fnmatchcase(key, pattern)), None)


def _old_grid(model: nn.Module, patches: int) -> tuple[int, int] | None:
    """Returns the patch grid of the file: that of its image size, or a square; None if neither has so many patches."""
    embed: Any = getattr(model, "patch_embed", None)  # models of transformers have none
    args: Mapping[str, Any] = getattr(model, "pretrained_model_args", {})
    size = args.get("img_size") or _cfg(model).get("input_size", (3, 0, 0))[-2:]
    size = (size, size) if isinstance(size, int) else size
    if embed is not None:
        grid = tuple(old * count // now for old, count, now in zip(size, embed.grid_size, embed.img_size, strict=True))
        if grid[0] * grid[1] == patches:
            return grid[0], grid[1]
    side = math.isqrt(patches)
    return (side, side) if side * side == patches else None


def _cfg(model: nn.Module) -> Mapping[str, Any]:
    return getattr(model, "pretrained_cfg", None) or {}


def _names(model: nn.Module, key: str) -> tuple[str, ...]:
    names = _cfg(model).get(key) or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _name(model: nn.Module) -> str:
    return _cfg(model).get("architecture") or type(model).__name__
