"""The names that lamzoo knows: cards, models registered in code, plug-ins and timm's own; builds nothing."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import inspect
import logging
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar, overload

import timm
from timm.models import PretrainedCfg, is_model
from torch import nn

from lamzoo.errors import DuplicateModelError, MissingExtraError, RegistryError, UnknownModelError
from lamzoo.lam.config import LamConfig
from lamzoo.registry.cards import CFG_KEYS, ModelSpec, PretrainedWeights, data_dir, read_card, read_weights
from lamzoo.registry.external import (
    OPEN_CLIP_PREFIX,
    TIMM_MODULES,
    TIMM_PREFIX,
    open_clip_models,
    open_clip_spec,
    timm_spec,
)

_logger = logging.getLogger(__name__)
_Function = TypeVar("_Function", bound=Callable[..., nn.Module])

ENTRY_POINT_GROUP = "lamzoo.models"

_cards: dict[str, ModelSpec] = {}
_broken: dict[str, str] = {}  # plug-in -> what went wrong
_lock = threading.RLock()
_loaded = False


@dataclass(frozen=True)
class ModelInfo(ModelSpec):
    """What the registry knows of a model: its card, and the tag asked for.

    Attributes:
        tag: the tag of ``arch.tag``, or the first one of a bare name; None where the model has no weights.
    """

    tag: PretrainedWeights | None = None


@overload
def register_model(fn: _Function) -> _Function: ...
@overload
def register_model(
    fn: None = None,
    *,
    tags: Mapping[str, Mapping[str, Any]] | None = None,
    lam: LamConfig | Mapping[str, Any] | bool | None = None,
    pretrained_cfg: Mapping[str, Any] | None = None,
    description: str = "",
) -> Callable[[_Function], _Function]: ...
def register_model(
    fn: _Function | None = None,
    *,
    tags: Mapping[str, Mapping[str, Any]] | None = None,
    lam: LamConfig | Mapping[str, Any] | bool | None = None,
    pretrained_cfg: Mapping[str, Any] | None = None,
    description: str = "",
) -> _Function | Callable[[_Function], _Function]:
    """Registers a function that builds a model, under the function's own name; a decorator, bare or with arguments.

    ``create_model(name, ...)`` calls the function with the model arguments that its caller gave (``num_classes``,
    ``in_chans``, ``img_size``, ...; never ``None``), and with ``num_classes``, ``in_chans`` of a tag whose weights
    are to be loaded. It returns the model **without** weights: lamzoo finds, checks and loads those, and adds the
    masks, so that ``pretrained``, ``checkpoint_path``, ``lam`` and ``cache_dir`` are not passed on.

    Args:
        fn: the function.
        tags: weights, ``{tag: {"file": ..., "sha256": ..., "dataset": ..., ...}}``, the first one the default; the
            keys are those of a card's tag table and ``file`` is looked for beside the module of the function.
        lam: masks that the model has by default, also as a dict of the fields of a LamConfig.
        pretrained_cfg: keys of timm's ``PretrainedCfg`` (``input_size``, ``mean``, ``classifier``, ...), over those
            of the ``pretrained_cfg`` that the built model may have already.
        description: one sentence; the function's docstring by default.

    Raises:
        DuplicateModelError: the name is taken.
        RegistryError: a tag or ``pretrained_cfg`` that means nothing.
        ConfigError: masks that mean nothing.
    """

    def register(function: _Function) -> _Function:
        name = function.__name__
        where = f"register_model({function.__module__}.{name})"
        for key in pretrained_cfg or {}:
            if key not in CFG_KEYS:
                raise RegistryError(
                    f"{where}: unknown pretrained_cfg key {key!r}; known are {', '.join(sorted(CFG_KEYS))}."
                )
        doc = (inspect.getdoc(function) or "").split("\n", 1)[0]
        path = inspect.getsourcefile(function)
        _add(
            ModelSpec(
                name=name,
                family=function.__module__.split(".", 1)[0],
                builder=function,
                lam=None if lam is None or lam is False else LamConfig.of(lam),
                description=description or doc,
                pretrained_cfg=dict(pretrained_cfg or {}),
                tags={tag: read_weights(tag, table, f"{where}: tag {tag}") for tag, table in (tags or {}).items()},
                weights_dir=Path(path).parent if path else None,
                source="plug-in",
            )
        )
        return function

    return register if fn is None else register(fn)


def register_cards(path: str | Path, weights_dir: str | Path | None = None) -> None:
    """Registers the models of a card of one's own, a TOML file as those in lamzoo's ``registry/``.

    Args:
        path: the card.
        weights_dir: folder of its tags' files; that of the card by default.

    Raises:
        RegistryError: the card cannot be read.
        DuplicateModelError: one of its names is taken; none of them is registered.
    """
    cards = read_card(path, weights_dir=Path(weights_dir or Path(path).parent), source="plug-in")
    with _lock:
        for card in cards:
            _refuse_duplicate(card)
        for card in cards:
            _add(card)


def split_name(name: str) -> tuple[str, str | None]:
    """Splits ``arch.tag``, or ``open_clip/arch:tag``, into its parts; the tag of a bare name is None."""
    if name.startswith(OPEN_CLIP_PREFIX):
        name = name.replace(":", ".", 1)
    arch, _, tag = name.partition(".")
    return arch, tag or None


def find_spec(name: str) -> ModelSpec:
    """Returns the card of a name, its tag ignored; plug-ins are loaded first.

    Raises:
        UnknownModelError: no such model; the closest names are listed.
        MissingExtraError: a model of open_clip, which is not installed.
    """
    _load()
    arch, _ = split_name(name)
    if arch in _cards:
        return _cards[arch]
    if arch.startswith(TIMM_PREFIX) and is_model(arch.removeprefix(TIMM_PREFIX)):
        return timm_spec(arch.removeprefix(TIMM_PREFIX))
    towers = open_clip_models() if arch.startswith(OPEN_CLIP_PREFIX) else []
    if arch.startswith(OPEN_CLIP_PREFIX) and not towers:
        raise MissingExtraError(f"{arch} needs open_clip, which is not installed; pip install 'lamzoo[clip]'.")
    if arch in towers:
        return open_clip_spec(arch.removeprefix(OPEN_CLIP_PREFIX))
    known = list(_cards)
    if arch.startswith(OPEN_CLIP_PREFIX):
        known = towers
    elif "/" in arch:
        known += [TIMM_PREFIX + model for model in timm.list_models()]
    close = difflib.get_close_matches(arch, known, n=3)
    if is_model(arch):
        close = [TIMM_PREFIX + arch]
    hint = f"did you mean {' or '.join(close)}?" if close else "lamzoo.list_models() lists the names."
    broken = "".join(f" The plug-in {plugin} failed to load: {why}." for plugin, why in _broken.items())
    raise UnknownModelError(f"There is no model {arch!r}; {hint}{broken}")


def find_weights(card: ModelSpec, name: str) -> PretrainedWeights | None:
    """Returns the tag that a name asks for: that of ``arch.tag``, else the card's first; None where it has none.

    Raises:
        UnknownModelError: the card has no such tag; its tags are listed.
    """
    _, tag = split_name(name)
    if tag is None:
        return next(iter(card.tags.values()), None)
    if tag not in card.tags:
        close = difflib.get_close_matches(tag, card.tags, n=1)
        hint = f"did you mean {card.name}.{close[0]}?" if close else f"its tags are {', '.join(card.tags) or 'none'}."
        raise UnknownModelError(f"{card.name} has no weights {tag!r}; {hint}")
    return card.tags[tag]


def list_models(
    filter: str | Iterable[str] = "",
    *,
    pretrained: bool = False,
    exclude_filters: str | Iterable[str] = "",
    family: str | Iterable[str] = "",
    include_tags: bool | None = None,
) -> list[str]:
    """Lists the registered names, sorted naturally; the arguments are those of timm's ``list_models``.

    timm's own names (``timm/...``) and open_clip's (``open_clip/...``) are many, and listed where a filter begins so.

    Args:
        filter: wildcard(s).
        pretrained: only names with weights, as ``arch.tag``.
        exclude_filters: wildcard(s) of names to leave out.
        family: only models of these families.
        include_tags: ``arch.tag`` names; the value of ``pretrained`` by default.
    """
    _load()
    include, exclude, families = _strings(filter), _strings(exclude_filters), _strings(family)
    tagged = pretrained if include_tags is None else include_tags
    cards = list(_cards.values())
    if any(pattern.startswith(TIMM_PREFIX) for pattern in include) or "timm" in families:
        cards += [timm_spec(arch) for arch in timm.list_models(module=TIMM_MODULES)]
    if any(pattern.startswith(OPEN_CLIP_PREFIX) for pattern in include) or "open_clip" in families:
        cards += [open_clip_spec(arch.removeprefix(OPEN_CLIP_PREFIX)) for arch in open_clip_models()]
    names = []
    for card in cards:
        if (families and card.family not in families) or (pretrained and not card.tags):
            continue
        names += [f"{card.name}.{tag}" for tag in card.tags] if tagged and card.tags else [card.name]
    if tagged:
        include = [p for pattern in include for p in ([pattern] if "." in pattern else [pattern, f"{pattern}.*"])]
        exclude = [p for pattern in exclude for p in ([pattern] if "." in pattern else [pattern, f"{pattern}.*"])]
    names = [name for name in names if not include or _matches(name, include)]
    return sorted((name for name in names if not _matches(name, exclude)), key=_natural)


def bundled_models() -> list[str]:
    """Lists the ``arch.tag`` names whose weights came with their registration, in its order; they need no network."""
    _load()
    return [
        f"{card.name}.{tag.name}"
        for card in _cards.values()
        for tag in card.tags.values()
        if tag.file is not None and card.weights_dir is not None and (card.weights_dir / tag.file).is_file()
    ]


def list_tags(name: str) -> list[str]:
    """Lists the tags of a model, the default one first.

    Raises:
        UnknownModelError: no such model.
    """
    return list(find_spec(name).tags)


def model_info(name: str) -> ModelInfo:
    """Returns what the registry knows of ``arch`` or ``arch.tag``.

    Raises:
        UnknownModelError: no such model or tag.
    """
    card = find_spec(name)
    return ModelInfo(**vars(card), tag=find_weights(card, name))


def get_pretrained_cfg(name: str) -> PretrainedCfg:
    """Returns timm's record of ``arch.tag`` (or of a bare name's default tag): preprocessing, classes, sources.

    Raises:
        UnknownModelError: no such model or tag.
    """
    card = find_spec(name)
    return pretrained_cfg_of(card, find_weights(card, name))


def pretrained_cfg_of(
    card: ModelSpec, tag: PretrainedWeights | None, base: PretrainedCfg | None = None
) -> PretrainedCfg:
    """Puts a tag's ``PretrainedCfg`` together: timm's for the backbone (or ``base``), the card's, then the tag's."""
    arch = card.backbone.get("timm")
    cfg = base or PretrainedCfg()
    if tag is not None and tag.timm is not None:
        cfg = timm.get_pretrained_cfg(tag.timm) or cfg
    elif arch is not None:
        cfg = replace(timm.get_pretrained_cfg(arch) or cfg, hf_hub_id=None, hf_hub_filename=None, license=None)
    values: dict[str, Any] = {**card.pretrained_cfg, **(tag.pretrained_cfg if tag else {})}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    values |= {"architecture": arch if card.source == "timm" else card.name, "tag": tag.name if tag else None}
    values |= {"url": None, "custom_load": False}  # neither is ever read here: weights come from lamzoo.registry.saving
    if tag is not None and tag.timm is None:
        values |= {"file": tag.file, "hf_hub_id": tag.hub, "hf_hub_filename": tag.hub_file if tag.hub else None}
    if tag is not None and tag.licence is not None:
        values["license"] = tag.licence
    return replace(cfg, **values)


def builder_of(card: ModelSpec) -> Callable[..., nn.Module]:
    """Returns the function that a card names.

    Raises:
        RegistryError: its module or function does not exist.
    """
    if not isinstance(card.builder, str):
        return card.builder
    module, _, function = card.builder.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise RegistryError(f"The builder {card.builder!r} of {card.name} cannot be imported: {error}.") from error


def _add(card: ModelSpec) -> None:
    with _lock:
        _refuse_duplicate(card)
        _cards[card.name] = card


def _refuse_duplicate(card: ModelSpec) -> None:
    _load_own()
    if card.name in _cards:
        there = _cards[card.name]
        raise DuplicateModelError(
            f"The model name {card.name!r} of {_origin(card)} is taken by {_origin(there)}; rename one of them."
        )


def _origin(card: ModelSpec) -> str:
    if isinstance(card.builder, str):
        return f"the {card.source} {card.family}"
    return f"{card.builder.__module__}.{card.builder.__name__}"


def _load_own() -> None:
    """Reads lamzoo's own cards, once."""
    with _lock:
        if any(card.source == "card" for card in _cards.values()):
            return
        weights_dir = data_dir("weights")
        cards = [
            c for path in sorted(data_dir("registry").glob("*.toml")) for c in read_card(path, weights_dir=weights_dir)
        ]
        own = {card.name: card for card in cards}
        if len(own) != len(cards):
            names = [card.name for card in cards]
            twice = next(name for name in own if names.count(name) > 1)
            raise DuplicateModelError(f"Two of lamzoo's cards have a model {twice!r}; rename one of them.")
        _cards.update(own)


def _load() -> None:
    """Reads the cards and imports the plug-ins, once; a plug-in that fails is named and leaves nothing behind."""
    global _loaded
    with _lock:
        if _loaded:
            return
        _load_own()
        for plugin in entry_points(group=ENTRY_POINT_GROUP):
            before = dict(_cards)
            origin = f"{plugin.name!r} ({plugin.dist.name if plugin.dist else 'unknown package'}: {plugin.value})"
            try:
                plugin.load()
            except DuplicateModelError as error:
                _restore(before)
                raise DuplicateModelError(f"The plug-in {origin} cannot be used: {error}") from error
            except Exception as error:  # noqa: BLE001 - code of strangers; lamzoo's own models must stay usable
                _restore(before)
                _broken[origin] = f"{type(error).__name__}: {error}"
                _logger.warning("The lamzoo plug-in %s failed to load, its models are missing: %r", origin, error)
        _loaded = True


def _restore(cards: dict[str, ModelSpec]) -> None:
    _cards.clear()
    _cards.update(cards)


def _strings(value: str | Iterable[str]) -> list[str]:
    if isinstance(value, str):
        return [value] if value else []
    return list(value)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name.lower())]
