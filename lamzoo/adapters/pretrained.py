"""Loading models of Hugging Face transformers with the masks that were saved with them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from os import PathLike, fspath
from typing import Any

import torch
from torch import nn

from lamzoo.adapters.add import add_lam
from lamzoo.adapters.state import few, masks_of
from lamzoo.errors import ConfigError, MissingExtraError, StateDictError, WeightsError
from lamzoo.lam import LamConfig


def from_pretrained(name: str | PathLike[str], *, model_class: type | None = None, **kwargs: Any) -> Any:
    """Loads a model of transformers with its masks, from what the model's own ``save_pretrained`` wrote.

    ``add_lam`` notes the :class:`LamConfig` in the model's ``config``, so that ``save_pretrained`` and ``push_to_hub``
    of transformers store it in ``config.json``, and the masks in the weights. Transformers' own ``from_pretrained``
    loads the model without them.

    Args:
        name: a folder, or a repository of the Hugging Face hub.
        model_class: class of the model, or an Auto class such as ``AutoModelForCausalLM``; by default the class that it
            was saved from, which the file names.
        **kwargs: of ``PreTrainedModel.from_pretrained``, such as ``revision``, ``dtype`` and ``num_labels``; only
            safetensors are read, unless ``use_safetensors`` says otherwise.

    Returns:
        The model in evaluation mode, with ``lam_config``; with ``output_loading_info=True`` also what transformers
        returns then.

    Raises:
        MissingExtraError: transformers is not installed.
        WeightsError: the model was saved without masks in its layers, or its class is unknown.
        ConfigError: ``model_class`` is none of transformers, or an Auto class that has none for this model.
        StateDictError: masks are missing in the weights, or are of another kind than the ``LamConfig`` of the file;
            names them.
        UnsupportedHostError: as for :func:`lamzoo.add_lam`.
    """
    if find_spec("transformers") is None:
        raise MissingExtraError("from_pretrained needs transformers; pip install 'lamzoo[transformers]'.")
    import transformers

    name = fspath(name)
    config = transformers.AutoConfig.from_pretrained(name, **{key: kwargs[key] for key in _OF_HUB if key in kwargs})
    fields = getattr(config, "lam_config", None)
    if fields is None:
        raise WeightsError(
            f"{name} has no lam_config in its config.json, where add_lam notes the masks of a model of transformers; "
            "load it with transformers and call lamzoo.add_lam, or lamzoo.load_lam for masks of a part."
        )
    cls: Any = saved_class(name, config) if model_class is None else _given_class(model_class, name, config)

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **kwargs)
        add_lam(self, LamConfig.from_dict(fields))

    with_info = kwargs.pop("output_loading_info", False)
    masked: Any = type(cls.__name__, (cls,), {"__module__": cls.__module__, "__init__": build})
    model, info = masked.from_pretrained(name, **{"use_safetensors": True} | kwargs, output_loading_info=True)
    model.__class__ = cls
    _check_masks(model, info, name)
    for lam in masks_of(model).values():
        lam.is_fresh = False
    return (model, info) if with_info else model


_OF_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def saved_class(name: str, config: Any) -> type[nn.Module]:
    """Returns the class of transformers that a configuration was saved from; raises as :func:`from_pretrained`."""
    import transformers

    names = getattr(config, "architectures", None) or [None]
    cls = getattr(transformers, str(names[0]), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise WeightsError(f"The class {names[0]} of {name} is none of transformers; pass it as model_class.")
    return cls


def _given_class(cls: Any, name: str, config: Any) -> type[nn.Module]:
    """Returns the class that a caller gave; of an Auto class the one for this configuration."""
    import transformers

    if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
        return cls
    if not hasattr(cls, "from_config"):
        raise ConfigError(
            f"model_class={cls!r} is no class of transformers' models; leave it out, or pass one such as "
            "AutoModelForCausalLM."
        )
    try:
        with torch.device("meta"):
            return type(cls.from_config(config))
    except ValueError:
        raise ConfigError(
            f"{cls.__name__} has no class for {name}, whose configuration is {type(config).__name__}; leave "
            "model_class out."
        ) from None


def _check_masks(model: nn.Module, info: Mapping[str, Any], name: str) -> None:
    """Raises a :class:`StateDictError` if the weights of a file don't have the masks of its ``lam_config``.

    Args:
        model: the model that was loaded.
        info: what transformers returned about it.
        name: of the file, for messages.
    """
    masks = masks_of(model)
    # Those of layers that the model lacks are dropped with the layers, as by transformers.
    others = sorted(key for key in info["unexpected_keys"] if f"{key.partition('.lam.')[0]}.lam" in masks)
    if others:
        raise StateDictError(
            f"The weights of {name} have {few(others)}, which masks of its lam_config lack; write the LamConfig that "
            "they were trained with into config.json."
        )
    missing = sorted(key for key in info["missing_keys"] if ".lam." in key)
    if len(missing) == sum(".lam." in key for key in model.state_dict()):
        raise StateDictError(
            f"The config.json of {name} names masks (lam_config), and the weights have none, as after a model was "
            "loaded with transformers alone and saved; load the folder that has the masks, or load this one with "
            "transformers and del model.config.lam_config."
        )
    if missing:
        raise StateDictError(
            f"The weights of {name} lack {few(missing)}: only a part of {type(model).__name__} had masks; build the "
            "model, call lamzoo.add_lam on that part, and load its weights."
        )
