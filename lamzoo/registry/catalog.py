"""The registered models: cards, models registered in code, plug-ins, and those of timm and open_clip on request."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import inspect
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, TypeVar, overload

from lamzoo.errors import DuplicateModelError, MissingExtraError, RegistryError, UnknownModelError
from lamzoo.lam.config import LamConfig
from lamzoo.registry.cards import (
    CFG_KEYS,
    ModelSpec,
    PretrainedWeights,
    check_cfg,
    data_dir,
    pruning_of,
    read_card,
    read_weights,
)
from lamzoo.registry.external import open_clip_models, open_clip_spec, timm_models, timm_spec
from lamzoo.registry.refs import HF_PREFIX, OPEN_CLIP_PREFIX, TIMM_PREFIX, ModelRef
from lamzoo.tasks import Task, find_task
from lamzoo.tasks.classification import CLASSIFICATION

if TYPE_CHECKING:  # torch and timm are imported only for models of timm and for records in timm's form
    from timm.models import PretrainedCfg
    from torch import nn

    from lamzoo.data.trained import TrainedData
    from lamzoo.reduction.config import PruneConfig, TokenReduction
    from lamzoo.weights.saved import SavedModel

_logger = logging.getLogger(__name__)
_Function = TypeVar("_Function", bound="Callable[..., nn.Module]")

ENTRY_POINT_GROUP = "lamzoo.models"
_SLOW_IMPORT_SECONDS = 10.0

_specs: dict[str, ModelSpec] = {}
_broken: dict[str, str] = {}  # plug-in -> what went wrong
_lock = threading.RLock()
_loaded = False


@dataclass(frozen=True)
class ModelInfo(ModelSpec):
    """A model's spec and the weights that its name refers to.

    ``lam``, ``params`` and ``gmacs`` of ``arch.tag`` are those of its weights, and of a bare name those of the card.
    For a saved model, ``lam`` and ``pretrained_cfg`` are those of its
    ``config.json``; ``params``, ``gmacs`` and ``tags`` are unknown.

    Attributes:
        tag: the tag of ``arch.tag``, or the default tag of a bare name; None if there are no tags.
        reduction: token reduction of the weights.
        fused: whether a saved model gets the fused form of :func:`lamzoo.fuse`.
    """

    tag: PretrainedWeights | None = None
    reduction: TokenReduction | None = None
    fused: bool = False

    @property
    def prune(self) -> PruneConfig | None:
        """The reduction, if it is pruning."""
        return pruning_of(self.reduction)


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
    task: str = "classification",
) -> Callable[[_Function], _Function]: ...
def register_model(
    fn: _Function | None = None,
    *,
    tags: Mapping[str, Mapping[str, Any]] | None = None,
    lam: LamConfig | Mapping[str, Any] | bool | None = None,
    pretrained_cfg: Mapping[str, Any] | None = None,
    description: str = "",
    task: str = "classification",
) -> _Function | Callable[[_Function], _Function]:
    """Registers a function that builds a model under the function's name; a decorator, with or without arguments.

    ``create_model(name, ...)`` calls the function with the model arguments given by the caller (``num_classes``,
    ``in_chans``, ``img_size``, ...; never ``None``), and with ``num_classes`` and ``in_chans`` of the tag whose weights
    are loaded. The function returns the model **without** weights: lamzoo finds, checks and loads them and adds the
    masks, so ``pretrained``, ``checkpoint_path``, ``lam`` and ``cache_dir`` are not passed on.

    Args:
        fn: the function.
        tags: weights, ``{tag: {"file": ..., "sha256": ..., "dataset": ..., ...}}``, the default first; the keys are
            those of a card's tag table, and ``file`` is relative to the folder of the function's module.
        lam: default masks, a LamConfig or a dict of its fields.
        pretrained_cfg: keys of timm's ``PretrainedCfg`` (``input_size``, ``mean``, ``classifier``, ...); they override
            the ``pretrained_cfg`` of the built model.
        description: one sentence; the first line of the function's docstring by default.
        task: name of the model's task.

    Raises:
        DuplicateModelError: the name is taken.
        RegistryError: an invalid tag or ``pretrained_cfg``.
        ConfigError: invalid masks.
    """

    def register(function: _Function) -> _Function:
        name = function.__name__
        where = f"register_model({function.__module__}.{name})"
        check_cfg(pretrained_cfg or {}, where)
        doc = (inspect.getdoc(function) or "").split("\n", 1)[0]
        path = inspect.getsourcefile(function)
        _add(
            ModelSpec(
                name=name,
                family=function.__module__.split(".", 1)[0],
                builder=function,
                task=task,
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
    """Registers the models of your own card, a TOML file like those in lamzoo's ``registry/``.

    Args:
        path: the card.
        weights_dir: folder of the tags' files; the folder of the card by default.

    Raises:
        RegistryError: the card cannot be read.
        DuplicateModelError: one of its names is taken; none of its models is registered.
    """
    specs = read_card(path, weights_dir=Path(weights_dir or Path(path).parent), source="plug-in")
    with _lock:
        for spec in specs:
            _refuse_duplicate(spec)
        for spec in specs:
            _add(spec)


def model_ref(name: str | os.PathLike[str]) -> ModelRef:
    """Parses a model name, of any form that :class:`~lamzoo.registry.refs.ModelRef` lists.

    Raises:
        UnknownModelError: an unknown prefix, or a path that doesn't exist.
    """
    return ModelRef.parse(name, is_registered=lambda arch: arch in _registered())


def find_spec(name: str | ModelRef) -> ModelSpec:
    """Returns the spec of a registered, timm or open_clip model, or an image model of transformers; ignores its tag.

    Raises:
        UnknownModelError: no such model, with the closest names; or a name of another form.
        ConfigError: a model of transformers that takes more than images.
        WeightsError: the configuration of a model of transformers is unavailable.
        MissingExtraError: a model of a library that is not installed.
    """
    ref = name if isinstance(name, ModelRef) else model_ref(name)
    specs = _registered()
    if ref.arch in specs:
        return specs[ref.arch]
    if ref.kind == "checkpoint":
        problem = (
            "a weights file does not state its architecture" if ref.path and ref.path.is_file() else "no such file"
        )
        raise UnknownModelError(
            f"There is no model {ref.text!r}: {problem}; name the architecture and pass the file as checkpoint_path= "
            "(--checkpoint)."
        )
    if ref.kind == "program":
        raise UnknownModelError(
            f"{ref.text!r} is an exported program, which can only be run: open it with lamzoo.load_exported, or name "
            "the model that it was exported from."
        )
    if ref.kind == "predictions":
        raise UnknownModelError(f"There is no model {ref.text!r}: files of predictions are for `lamzoo eval` only.")
    if ref.kind == "hf":
        from lamzoo.registry.huggingface import find_transformers_spec

        return find_transformers_spec(ref)
    if ref.is_saved:
        raise UnknownModelError(f"{ref.text!r} is a saved model, and the name of a registered one is needed.")
    spec = timm_spec(ref.arch.removeprefix(TIMM_PREFIX)) if ref.kind == "timm" else None
    if ref.kind == "open_clip":
        towers = open_clip_models()
        if not towers:
            raise MissingExtraError(f"{ref.arch} needs open_clip, which is not installed; pip install 'lamzoo[clip]'.")
        spec = open_clip_spec(ref.arch.removeprefix(OPEN_CLIP_PREFIX)) if ref.arch in towers else None
    if spec is None:
        raise _unknown(ref)
    return spec


def spec_of_saved(saved: SavedModel) -> ModelSpec:
    """Returns the spec of a saved model's architecture, with the model's masks.

    If timm has saved it, which writes no masks, they are those of the card for the tag that it was made from.

    Raises:
        UnknownModelError: the architecture is not registered; names the ``config.json``.
    """
    if saved.name.startswith(HF_PREFIX):
        from lamzoo.registry.huggingface import spec_of_name

        return spec_of_name(saved.name, saved.lam)
    own = saved.name.removeprefix(TIMM_PREFIX)
    if saved.external and own in _registered():
        spec = find_spec(own)
        return spec.of_tag(spec.tags.get(saved.cfg.tag or ""))
    try:
        return replace(find_spec(saved.name), lam=saved.lam)
    except UnknownModelError as error:
        raise UnknownModelError(f"{saved.path} is of an architecture that is not registered: {error}") from error


def find_weights(spec: ModelSpec, name: str | ModelRef) -> PretrainedWeights | None:
    """Returns the tag that a name refers to: that of ``arch.tag``, or the default one; None if there are no tags.

    Raises:
        UnknownModelError: the model has no such tag; lists its tags.
    """
    tag = (name if isinstance(name, ModelRef) else model_ref(name)).tag
    if tag is None:
        return next(iter(spec.tags.values()), None)
    if tag not in spec.tags:
        close = difflib.get_close_matches(tag, spec.tags, n=1)
        separator = ":" if spec.source == "open_clip" else "."
        hint = (
            f"did you mean {spec.name}{separator}{close[0]}?"
            if close
            else f"its tags are {', '.join(spec.tags) or 'none'}."
        )
        raise UnknownModelError(f"{spec.name} has no weights {tag!r}; {hint}")
    return spec.tags[tag]


def _unknown(ref: ModelRef) -> UnknownModelError:
    known = list(_registered())
    if ref.kind == "open_clip":
        known = open_clip_models()
    elif ref.kind == "timm":
        known += [TIMM_PREFIX + arch for arch in timm_models(every=True)]
    close = difflib.get_close_matches(ref.arch, known, n=3)
    if ref.kind == "registered" and timm_spec(ref.arch) is not None:
        close = [TIMM_PREFIX + ref.arch]
    hint = f"did you mean {' or '.join(close)}?" if close else "lamzoo.list_models() lists the names."
    broken = "".join(f" The plug-in {plugin} failed to load: {why}." for plugin, why in _broken.items())
    return UnknownModelError(f"There is no model {ref.arch!r}; {hint}{broken}")


def list_models(
    filter: str | Iterable[str] = "",
    *,
    pretrained: bool = False,
    exclude_filters: str | Iterable[str] = "",
    family: str | Iterable[str] = "",
    include_tags: bool | None = None,
) -> list[str]:
    """Lists the registered names in natural order; the arguments are those of timm's ``list_models``.

    The models of timm and open_clip are included only if a filter starts with ``timm/`` or ``open_clip/``.

    Args:
        filter: wildcard(s).
        pretrained: only names with weights, as ``arch.tag``.
        exclude_filters: wildcard(s) of names to exclude.
        family: only models of these families.
        include_tags: list ``arch.tag`` names; the value of ``pretrained`` by default.
    """
    include, exclude, families = _strings(filter), _strings(exclude_filters), _strings(family)
    tagged = pretrained if include_tags is None else include_tags
    specs = list(_registered().values())
    if any(pattern.startswith(TIMM_PREFIX) for pattern in include) or "timm" in families:
        specs += [spec for arch in timm_models() if (spec := timm_spec(arch)) is not None]
    if any(pattern.startswith(OPEN_CLIP_PREFIX) for pattern in include) or "open_clip" in families:
        specs += [open_clip_spec(arch.removeprefix(OPEN_CLIP_PREFIX)) for arch in open_clip_models()]
    names = []
    for spec in specs:
        if (families and spec.family not in families) or (pretrained and not spec.tags):
            continue
        names += [f"{spec.name}.{tag}" for tag in spec.tags] if tagged and spec.tags else [spec.name]
    if tagged:
        include = [p for pattern in include for p in ([pattern] if "." in pattern else [pattern, f"{pattern}.*"])]
        exclude = [p for pattern in exclude for p in ([pattern] if "." in pattern else [pattern, f"{pattern}.*"])]
    names = [name for name in names if not include or _matches(name, include)]
    return sorted((name for name in names if not _matches(name, exclude)), key=_natural)


def match_models(pattern: str, *, pretrained: bool = False, include_tags: bool | None = None) -> list[str]:
    """Lists the models that match a wildcard or, for a pattern without wildcards, contain it.

    Args:
        pattern: a wildcard or a part of a name; models of timm and open_clip match only with their prefix.
        pretrained: only names with weights, as ``arch.tag``.
        include_tags: list ``arch.tag`` names; the value of ``pretrained`` by default.

    Raises:
        UnknownModelError: nothing matches; lists the closest names.
    """
    wildcard = pattern
    if pattern and not set(pattern) & set("*?["):
        wildcard = f"{pattern}*" if pattern.startswith((TIMM_PREFIX, OPEN_CLIP_PREFIX)) else f"*{pattern}*"
    names = list_models(wildcard, pretrained=pretrained, include_tags=include_tags)
    if not names:
        close = difflib.get_close_matches(pattern, list_models(pretrained=pretrained), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "`lamzoo list` and `lamzoo list timm/` list all."
        raise UnknownModelError(f"no model{' with weights' if pretrained else ''} matches {pattern!r}; {hint}")
    return names


def bundled_models() -> list[str]:
    """Lists the ``arch.tag`` names whose weights came with their registration and need no network."""
    return [
        f"{spec.name}.{tag.name}"
        for spec in _registered().values()
        for tag in spec.tags.values()
        if tag.file is not None and spec.weights_dir is not None and (spec.weights_dir / tag.file).is_file()
    ]


def list_tags(name: str) -> list[str]:
    """Lists the tags of a model, the default one first; a saved model has none.

    Raises:
        UnknownModelError: no such model.
    """
    return list(model_info(name).tags)


def model_info(name: str | os.PathLike[str]) -> ModelInfo:
    """Returns the facts about a model without building it.

    Args:
        name: any name that :func:`lamzoo.create_model` takes.

    Raises:
        UnknownModelError: no such model or tag.
        WeightsError: the configuration of a saved model cannot be read.
    """
    ref = model_ref(name)
    if not ref.is_saved:
        spec = find_spec(ref)
        tag = find_weights(spec, ref)
        reduction = tag.reduction if tag is not None else None
        if ref.tag is not None:
            spec = spec.of_tag(tag)
        return ModelInfo(**vars(spec), tag=tag, reduction=reduction)
    from lamzoo.weights.saved import read_saved

    saved = read_saved(ref, with_weights=False)
    cfg = {key: value for key, value in saved.cfg.to_dict().items() if key in CFG_KEYS}
    spec = replace(spec_of_saved(saved), params=None, gmacs=None, pretrained_cfg=cfg, tags={})
    return ModelInfo(**vars(spec), reduction=saved.reduction, fused=saved.fused)


def task_of(name: str | os.PathLike[str]) -> Task:
    """Returns the task of a model from its card, without building the model.

    Args:
        name: any name that :func:`lamzoo.create_model` takes, or an exported program, which is a classifier.

    Raises:
        UnknownModelError: no such model or tag.
        WeightsError: the configuration of a saved model cannot be read.
    """
    return CLASSIFICATION if model_ref(name).kind == "program" else find_task(model_info(name).task)


def trained_data_of(name: str | os.PathLike[str]) -> TrainedData | None:
    """Returns the training data of a run, if the name is the folder of a run or of its model.

    Raises:
        DataError: a file of the run is damaged.
    """
    from lamzoo.data.trained import TrainedData

    folder = model_ref(name).path
    return None if folder is None else TrainedData.read(folder)


def get_pretrained_cfg(name: str | os.PathLike[str]) -> PretrainedCfg:
    """Returns timm's record of a set of weights: preprocessing, classes and sources.

    Args:
        name: any name that :func:`lamzoo.create_model` takes; a bare ``arch`` means its default tag.

    Raises:
        UnknownModelError: no such model or tag.
        WeightsError: the configuration of a saved model cannot be read.
    """
    ref = model_ref(name)
    if ref.is_saved:
        from lamzoo.weights.saved import read_saved

        return read_saved(ref, with_weights=False).cfg
    spec = find_spec(ref)
    return pretrained_cfg_of(spec, find_weights(spec, ref))


def pretrained_cfg_of(
    spec: ModelSpec, tag: PretrainedWeights | None, base: PretrainedCfg | None = None
) -> PretrainedCfg:
    """Merges timm's record of a tag: timm's own for the backbone (or ``base``), then the model's, then the tag's."""
    import timm
    from timm.models import PretrainedCfg

    arch = spec.backbone.get("timm")
    cfg = base or PretrainedCfg()
    if tag is not None and tag.timm is not None:
        cfg = timm.get_pretrained_cfg(tag.timm) or cfg
    elif arch is not None:
        cfg = replace(timm.get_pretrained_cfg(arch) or cfg, hf_hub_id=None, hf_hub_filename=None, license=None)
    values = spec.cfg(tag)
    values |= {"architecture": arch if spec.source == "timm" else spec.name, "tag": tag.name if tag else None}
    values |= {"url": None, "custom_load": False}  # unused: the weights come from the tag
    if tag is not None and not tag.external:
        filename = tag.hub_file or "model.safetensors"
        values |= {"file": tag.file, "hf_hub_id": tag.hub, "hf_hub_filename": filename if tag.hub else None}
    if tag is not None and tag.licence is not None:
        values["license"] = tag.licence
    return replace(cfg, **values)


def builder_of(spec: ModelSpec) -> Callable[..., nn.Module]:
    """Returns the function that builds a model.

    Raises:
        RegistryError: its module or function does not exist.
    """
    if not isinstance(spec.builder, str):
        return spec.builder
    try:
        return resolve_name(spec.builder)
    except (ImportError, AttributeError, ValueError) as error:
        raise RegistryError(f"The builder {spec.builder!r} of {spec.name} cannot be imported: {error}.") from error


def _registered() -> dict[str, ModelSpec]:
    _load()
    return _specs


def _add(spec: ModelSpec) -> None:
    with _lock:
        _refuse_duplicate(spec)
        _specs[spec.name] = spec


def _refuse_duplicate(spec: ModelSpec) -> None:
    _load_own()
    if spec.name in _specs:
        there = _specs[spec.name]
        raise DuplicateModelError(
            f"The model name {spec.name!r} of {_origin(spec)} is taken by {_origin(there)}; rename one of them."
        )


def _origin(spec: ModelSpec) -> str:
    if isinstance(spec.builder, str):
        return f"the {spec.source} {spec.family}"
    return f"{spec.builder.__module__}.{spec.builder.__name__}"


def _load_own() -> None:
    """Reads lamzoo's own cards, once."""
    with _lock:
        if any(spec.source == "card" for spec in _specs.values()):
            return
        weights_dir = data_dir("weights")
        specs = [
            s for path in sorted(data_dir("registry").glob("*.toml")) for s in read_card(path, weights_dir=weights_dir)
        ]
        own = {spec.name: spec for spec in specs}
        if len(own) != len(specs):
            names = [spec.name for spec in specs]
            twice = next(name for name in own if names.count(name) > 1)
            raise DuplicateModelError(f"Two of lamzoo's cards have a model {twice!r}; rename one of them.")
        _specs.update(own)


def _load() -> None:
    """Reads the cards and imports the plug-ins, once; a plug-in that fails is named and leaves nothing behind."""
    global _loaded
    with _lock:
        if _loaded:
            return
        _load_own()
        for plugin in entry_points(group=ENTRY_POINT_GROUP):
            before = dict(_specs)
            origin = f"{plugin.name!r} ({plugin.dist.name if plugin.dist else 'unknown package'}: {plugin.value})"
            try:
                with _announced(origin), contextlib.redirect_stdout(sys.stderr):  # stdout is the command's own
                    plugin.load()
            except DuplicateModelError as error:
                _restore(before)
                raise DuplicateModelError(f"The plug-in {origin} cannot be used: {error}") from error
            except KeyboardInterrupt:
                _restore(before)
                _logger.warning("Stopped while importing the lamzoo plug-in %s", origin)
                raise
            except BaseException as error:  # noqa: BLE001 - third-party code; lamzoo's own models must stay usable
                _restore(before)
                _broken[origin] = " ".join("".join(traceback.format_exception_only(error)).split())
                _logger.warning(
                    "The lamzoo plug-in %s failed to load, its models are missing: %s", origin, _broken[origin]
                )
        _loaded = True


@contextlib.contextmanager
def _announced(plugin: str) -> Iterator[None]:
    """Warns if the import of a plug-in takes long, as it may never end."""
    message = "Still importing the lamzoo plug-in %s; if it never ends, stop with Ctrl-C and uninstall its package"
    timer = threading.Timer(_SLOW_IMPORT_SECONDS, _logger.warning, (message, plugin))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _restore(specs: dict[str, ModelSpec]) -> None:
    _specs.clear()
    _specs.update(specs)


def _strings(value: str | Iterable[str]) -> list[str]:
    if isinstance(value, str):
        return [value] if value else []
    return list(value)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    return [
        (not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name.lower())
    ]
