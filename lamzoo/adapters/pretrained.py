"""Loading models of Hugging Face transformers with the masks that were saved with them."""

from __future__ import annotations

from importlib.util import find_spec
from os import PathLike, fspath
from typing import Any

from torch import nn

from lamzoo.adapters.add import add_lam
from lamzoo.adapters.state import few
from lamzoo.errors import MissingExtraError, StateDictError, WeightsError
from lamzoo.lam import Lam, LamConfig


def from_pretrained(name: str | PathLike[str], *, model_class: type[nn.Module] | None = None, **kwargs: Any) -> Any:
    """Loads a model of transformers with its masks, from what the model's own ``save_pretrained`` wrote.

    ``add_lam`` notes the :class:`LamConfig` in the model's ``config``, so that ``save_pretrained`` and ``push_to_hub``
    of transformers store it in ``config.json``, and the masks in the weights. Transformers' own ``from_pretrained``
    loads the model without them.

    Args:
        name: a folder, or a repository of the Hugging Face hub.
        model_class: class of the model; by default the one that it was saved from, which the file names.
        **kwargs: of ``PreTrainedModel.from_pretrained``, such as ``revision``, ``dtype`` and ``num_labels``; only
            safetensors are read, unless ``use_safetensors`` says otherwise.

    Returns:
        The model in evaluation mode, with ``lam_config``; with ``output_loading_info=True`` also what transformers
        returns then.

    Raises:
        MissingExtraError: transformers is not installed.
        WeightsError: the model was saved without masks in its layers, or its class is unknown.
        StateDictError: masks are missing in the weights; names them.
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
            "load it with transformers and call lamzoo.add_lam."
        )
    cls: Any = model_class or saved_class(name, config)

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **kwargs)
        add_lam(self, LamConfig.from_dict(fields))

    with_info = kwargs.pop("output_loading_info", False)
    masked: Any = type(cls.__name__, (cls,), {"__module__": cls.__module__, "__init__": build})
    model, info = masked.from_pretrained(name, **{"use_safetensors": True} | kwargs, output_loading_info=True)
    model.__class__ = cls
    missing = sorted(key for key in info["missing_keys"] if ".lam." in key)
    if missing:
        raise StateDictError(
            f"The weights of {name} lack {few(missing)}: only a part of {cls.__name__} had masks; build the model, "
            "call lamzoo.add_lam on that part, and load its weights."
        )
    for lam in model.modules():
        if isinstance(lam, Lam):
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
