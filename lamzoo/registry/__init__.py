"""The registry: model names, cards and plug-ins, creating models by name, and saving them."""

from typing import TYPE_CHECKING

from lamzoo.lazy import submodules_of

if TYPE_CHECKING:
    from lamzoo.registry.catalog import (
        ModelInfo,
        get_pretrained_cfg,
        list_models,
        list_tags,
        model_info,
        register_cards,
        register_model,
    )
    from lamzoo.registry.factory import create_model, obtain

__all__ = [
    "ModelInfo",
    "create_model",
    "get_pretrained_cfg",
    "list_models",
    "list_tags",
    "model_info",
    "obtain",
    "register_cards",
    "register_model",
]

_CATALOG, _FACTORY = "lamzoo.registry.catalog", "lamzoo.registry.factory"
_HOMES = dict.fromkeys(__all__, _CATALOG) | {"create_model": _FACTORY, "obtain": _FACTORY}

if not TYPE_CHECKING:  # a type checker would believe any name
    __getattr__ = submodules_of(__name__, _HOMES)
