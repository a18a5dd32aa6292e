"""``import lamzoo.timm``: registers the image models of lamzoo with timm, for ``timm.create_model`` and timm's scripts.

A plug-in's models are included; those that are registered in code must be registered before the import.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

if __name__ == "timm":
    raise ImportError(
        f"Python found {__file__} in place of timm, because the folder of lamzoo's source is on its search path; start "
        "Python in another folder, and the command line as python -m lamzoo."
    )

import timm
from timm.models import PretrainedCfg, generate_default_cfgs, register_model
from timm.models._registry import _deprecated_models
from torch import nn

from lamzoo.errors import ConfigError, UnknownModelError
from lamzoo.registry.cards import ModelSpec
from lamzoo.registry.catalog import find_spec, get_pretrained_cfg, list_models, pretrained_cfg_of
from lamzoo.registry.factory import create_model
from lamzoo.registry.refs import join_name
from lamzoo.tasks.classification import CLASSIFICATION
from lamzoo.weights.saved import ARCHITECTURE_PREFIX

_logger = logging.getLogger(__name__)

#: Architecture to its tags, which timm's ``register_model`` reads.
default_cfgs: dict[str, Any] = {}

_SAVED = ARCHITECTURE_PREFIX.partition(".")[0]


def _register(spec: ModelSpec) -> None:
    if timm.is_model(spec.name):
        _logger.warning("%s is not registered with timm, which has a model of that name.", spec.name)
        return
    tags: dict[str, Any] = {f"{spec.name}.{tag.name}": pretrained_cfg_of(spec, tag) for tag in spec.tags.values()}
    default_cfgs.update(generate_default_cfgs(tags or {spec.name: pretrained_cfg_of(spec, None)}))
    register_model(_entry_point(spec.name, spec.description))


def _entry_point(name: str, description: str) -> Callable[..., nn.Module]:
    def build(
        pretrained: bool = False,
        pretrained_cfg: str | Mapping[str, Any] | PretrainedCfg | None = None,
        pretrained_cfg_overlay: Mapping[str, Any] | None = None,
        pretrained_model_args: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> nn.Module:
        record = _record(pretrained_cfg)
        if record.get("source") in ("local-dir", "hf-hub"):
            if pretrained_cfg_overlay:
                raise ConfigError("A saved model takes no pretrained_cfg_overlay; pass checkpoint_path= for weights.")
            saved = pretrained_model_args or {}
            changed = {key: value for key, value in arguments.items() if key not in saved or saved[key] != value}
            place = record["file" if record["source"] == "local-dir" else "hf_hub_id"]
            return create_model(f"{record['source']}:{place}", pretrained, **changed)
        if name == _SAVED:
            raise UnknownModelError(
                f"{name} is the architecture of saved models; name one, as local-dir:FOLDER or hf-hub:OWNER/NAME."
            )
        return _create(name, pretrained, record | dict(pretrained_cfg_overlay or {}), arguments)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = description
    return build


def _create(name: str, pretrained: bool, record: Mapping[str, Any], arguments: Mapping[str, Any]) -> nn.Module:
    """Creates a registered model with the weights of timm's record: those of its tag, or of its ``file``."""
    stated = record.get("tag")
    known = get_pretrained_cfg(join_name(name, stated)).to_dict()
    # As in timm, a bare name is that of its default tag, whose masks the model has without its weights too. With them,
    # lamzoo may have to take those of another tag.
    tag = stated if pretrained else known.get("tag")
    full = join_name(name, tag)
    changed = {key: value for key, value in record.items() if value != known.get(key)}
    file = changed.pop("file", None)
    changed.pop("custom_load", None)
    if changed:
        raise ConfigError(
            f"The pretrained_cfg of {full} can't have another {', '.join(sorted(changed))}; pass arguments for the "
            "model, checkpoint_path= for weights, and set preprocessing in the created model's pretrained_cfg."
        )
    if file is not None:
        return create_model(full, checkpoint_path=file if pretrained else None, **arguments)
    return create_model(full, pretrained, **arguments)


def _record(cfg: str | Mapping[str, Any] | PretrainedCfg | None) -> dict[str, Any]:
    """Returns a tag, or timm's record of weights, as the keys of that record."""
    if isinstance(cfg, PretrainedCfg):
        return cfg.to_dict()
    return {"tag": cfg} if isinstance(cfg, str) else dict(cfg or {})


for _spec in map(find_spec, list_models()):
    if _spec.task == CLASSIFICATION.name:
        _register(_spec)
# In place of an architecture that timm doesn't have, a saved model states lamzoo.timm.NAME, which timm reads as the
# entry point lamzoo with a tag. It can't be created by itself, so it isn't listed.
register_model(_entry_point(_SAVED, "A saved model of lamzoo."))
_deprecated_models[_SAVED] = None
__all__: list[str] = []  # timm has added the names of models, which are no attributes
