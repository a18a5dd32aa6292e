"""Models of Hugging Face transformers by name, ``hf/OWNER/NAME``: from a hub repository to a model with masks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from lamzoo import hub
from lamzoo.adapters import add_lam, from_pretrained
from lamzoo.adapters.pretrained import saved_class
from lamzoo.errors import ConfigError, MissingExtraError, StateDictError
from lamzoo.lam import LamConfig
from lamzoo.models.transformers_images import TransformersImages, image_class, image_size_of
from lamzoo.reading import parse_json, read_text
from lamzoo.registry.cards import ModelSpec
from lamzoo.registry.preprocessing import check_preprocessing
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
    _check_installed(ref.text)
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
    model: Any
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
        loading |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
        if saved is not None and lam is not False and not fresh_masks:
            model, info = from_pretrained(folder, model_class=cls, **loading)
        else:
            model, info = cls.from_pretrained(folder, **loading)
            vars(model.config).pop("lam_config", None)
        classes = (transformers.AutoConfig.from_pretrained(folder).num_labels, config.num_labels)
        _check_sizes(ref.text, info["mismatched_keys"], classes, arguments)
    else:
        model = cls(config)
    model.lam_config = getattr(model, "lam_config", None)
    if model.lam_config is None and masks is not None and lam is not False:
        add_lam(model, masks)
    model.registry_name, model.weights_source = ref.text, ref.text if pretrained else None
    return model.train()


def _check_sizes(
    name: str, mismatched: Iterable[tuple[str, Any, Any]], classes: tuple[int, int], arguments: Mapping[str, Any]
) -> None:
    """Checks that only heads kept their fresh weights, because their number of classes is another.

    Args:
        name: of the model, for messages.
        mismatched: names of tensors, and their shapes in the weights and in the model.
        classes: their number in the weights and in the model.
        arguments: of the configuration, for messages.

    Raises:
        StateDictError: the shape of another tensor differs.
    """
    for key, stored, built in sorted(mismatched):
        if (stored[0], built[0]) != classes or stored[1:] != built[1:]:
            asked = ", ".join(f"{name}={value!r}" for name, value in arguments.items() if name != "num_classes")
            raise StateDictError(
                f"{key} has the shape {tuple(stored)} in the weights of {name} and {tuple(built)} in the model"
                f"{f' with {asked}' if asked else ''}; leave out what changes its shape, or use pretrained=False."
            )


def spec_of_name(name: str, lam: LamConfig | None = None) -> ModelSpec:
    """Returns the spec of an image model of transformers as far as its name tells; nothing is downloaded."""
    return ModelSpec(
        name=name,
        family="transformers",
        builder="lamzoo.models.transformers_images:transformers_images",
        lam=lam,
        description=f"The image model {name.removeprefix('hf/')} of Hugging Face transformers.",
        source="transformers",
    )


def find_transformers_spec(ref: ModelRef, cache_dir: str | Path | None = None) -> ModelSpec:
    """Returns the spec of an image model of transformers, with the preprocessing of its repository.

    Args:
        ref: of the kind ``"hf"``.
        cache_dir: replaces the hub's cache folder.

    Raises:
        ConfigError: the repository has another kind of model.
        WeightsError: its configuration is unavailable or damaged.
    """
    _check_installed(ref.text)
    import transformers

    path = hub.download(ref.repo, "config.json", revision=ref.revision, cache_dir=cache_dir)
    config = transformers.AutoConfig.from_pretrained(path.parent)
    cls = image_class(ref.text, config)
    images: dict[str, Any] = {}
    with contextlib.suppress(hub.HubEntryMissingError):
        file = hub.download(ref.repo, "preprocessor_config.json", revision=path.parent.name, cache_dir=cache_dir)
        images = parse_json(read_text(file))
    height, width = image_size_of(config)
    has_classes = "ForImageClassification" in cls.__name__
    cfg: dict[str, Any] = {
        "input_size": (getattr(getattr(config, "vision_config", config), "num_channels", 3), height, width),
        "fixed_input_size": True,
        "num_classes": config.num_labels if has_classes else 0,
        "classifier": "host.classifier",
        **_preprocessing(images, (height, width)),
    }
    names = [config.id2label[index] for index in sorted(config.id2label)]
    if has_classes and names != [f"LABEL_{index}" for index in range(len(names))]:
        cfg["label_names"] = names
    checked = check_preprocessing(cfg, source=f"{ref.text}:", error=ConfigError)
    saved = getattr(config, "lam_config", None)
    masks = None if saved is None else LamConfig.from_dict(saved)
    return replace(spec_of_name(ref.text, masks), pretrained_cfg=checked)


def with_timms_interface(host: Any) -> tuple[TransformersImages, dict[str, Any]]:
    """Gives an image model of transformers timm's interface; returns it and the arguments that build it again."""
    config = {key: value for key, value in parse_json(host.config.to_json_string()).items() if key != "lam_config"}
    return TransformersImages(host), {"hf_config": {**config, "architectures": [type(host).__name__]}}


def _check_installed(name: str) -> None:
    if find_spec("transformers") is None:
        raise MissingExtraError(f"{name} needs transformers; pip install 'lamzoo[transformers]'.")


_INTERPOLATION = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers


def _preprocessing(images: Mapping[str, Any], own: tuple[int, int]) -> dict[str, Any]:
    """Translates a ``preprocessor_config.json`` into keys of timm's ``PretrainedCfg``.

    Args:
        images: the file; empty without one.
        own: height and width of the model's images.
    """
    normalises = images.get("do_normalize", True)
    cfg: dict[str, Any] = {
        "mean": tuple(images.get("image_mean", (0.5,) * 3)) if normalises else (0.0,) * 3,
        "std": tuple(images.get("image_std", (0.5,) * 3)) if normalises else (1.0,) * 3,
        "interpolation": _INTERPOLATION.get(images.get("resample", 2), "bilinear"),
    }
    size = images.get("size", own[0])
    shortest = size.get("shortest_edge") if isinstance(size, dict) else None
    crops = bool(images.get("do_center_crop", shortest is not None))
    crop = images.get("crop_size", own[0])
    crop = crop["height"] if isinstance(crop, dict) else crop
    resized = shortest or (size["height"] if isinstance(size, dict) else size)
    if crops and resized:
        return cfg | {"crop_mode": "center", "crop_pct": min(1.0, crop / resized)}
    return cfg | {"crop_mode": "squash", "crop_pct": 1.0}
