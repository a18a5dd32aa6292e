"""Models of Hugging Face transformers by name, ``hf/OWNER/NAME``: from a hub repository to a model with masks."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from lamzoo import hub
from lamzoo.adapters import add_lam, from_pretrained
from lamzoo.adapters.pretrained import saved_class
from lamzoo.errors import ConfigError, MissingExtraError, StateDictError
from lamzoo.lam import LamConfig
from lamzoo.registry.refs import ModelRef
from lamzoo.weights.sources import resolve_repo


def create_transformers_model(
    ref: ModelRef,
    *,
    pretrained: bool,
    lam: LamConfig | bool | None,
    fresh_masks: bool,
    arguments: Mapping[str, Any],
    cache_dir: str | Path | None = None,
    allow_pickle: bool = False,
) -> nn.Module:
    """Creates a model of transformers; arguments and errors as those of :func:`lamzoo.create_model`.

    Args:
        ref: of the kind ``"hf"``.
        pretrained: load the weights of the repository.
        lam: the masks; None and True take those that the repository was saved with, and True the default ones if there
            are none.
        fresh_masks: ignore the weights of masks.
        arguments: of the model's configuration; ``num_classes`` is its ``num_labels``.
        cache_dir: replaces the hub's cache folder.
        allow_pickle: also read pickles.
    """
    if find_spec("transformers") is None:
        raise MissingExtraError(f"{ref.text} needs transformers; pip install 'lamzoo[transformers]'.")
    import transformers

    folder = hub.download(ref.repo, "config.json", revision=ref.revision, cache_dir=cache_dir).parent
    settings = {"num_labels" if key == "num_classes" else key: value for key, value in arguments.items()}
    config, unknown = transformers.AutoConfig.from_pretrained(folder, return_unused_kwargs=True, **settings)
    if unknown:
        raise ConfigError(
            f"{ref.text} takes no argument {next(iter(unknown))!r}; beside num_classes, its arguments are the fields "
            f"of {type(config).__name__}."
        )
    saved = None if getattr(config, "lam_config", None) is None else LamConfig.from_dict(vars(config).pop("lam_config"))
    masks = lam if isinstance(lam, LamConfig) else saved or (LamConfig() if lam is True else None)
    cls: Any = saved_class(ref.text, config)
    if pretrained:
        if saved is not None and masks is not None and masks.differences(saved) and lam and not fresh_masks:
            raise StateDictError(
                f"{ref.text} was saved with masks of {saved}, and lam asks for others; leave lam out, or pass "
                "lam_weights='fresh'."
            )
        resolve_repo(ref.repo, revision=folder.name, cache_dir=cache_dir, allow_pickle=allow_pickle)
        with contextlib.suppress(hub.HubEntryMissingError):  # decoders alone have it
            hub.download(ref.repo, "generation_config.json", revision=folder.name, cache_dir=cache_dir)
        loading = settings | {"use_safetensors": None if allow_pickle else True}
        loading["ignore_mismatched_sizes"] = "num_labels" in settings  # of the head, which stays fresh
        if saved is not None and lam is not False and not fresh_masks:
            model: Any = from_pretrained(folder, model_class=cls, **loading)
        else:
            model = cls.from_pretrained(folder, **loading)
            vars(model.config).pop("lam_config", None)
    else:
        model = cls(config)
    model.lam_config = getattr(model, "lam_config", None)
    if model.lam_config is None and masks is not None and lam is not False:
        add_lam(model, masks)
    model.registry_name, model.weights_source = ref.text, ref.text if pretrained else None
    return model.train()
