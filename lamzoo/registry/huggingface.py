"""Models of Hugging Face transformers by name, ``hf/OWNER/NAME``: from a hub repository to a model with masks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from PIL import Image
from timm.layers import to_2tuple
from torch import nn

from lamzoo import hub
from lamzoo.adapters import add_lam, from_pretrained
from lamzoo.adapters.pretrained import saved_class
from lamzoo.data.images.decode import MODES, of_channels
from lamzoo.errors import ConfigError, MissingExtraError, StateDictError
from lamzoo.lam import LamConfig
from lamzoo.models.transformers_images import (
    TransformersImages,
    image_class,
    image_size_of,
    resized_model,
    set_image_size,
)
from lamzoo.reading import parse_json
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
        arguments: of the model's configuration; ``num_classes`` is its ``num_labels``, ``img_size`` the ``image_size``
            of its vision tower, to which position embeddings are interpolated.
        cache_dir: replaces the hub's cache folder.
        allow_pickle: also read pickles.
    """
    _check_installed(ref.text)
    import transformers

    folder = hub.download(ref.repo, "config.json", revision=ref.revision, cache_dir=cache_dir).parent
    settings = {"num_labels" if key == "num_classes" else key: value for key, value in arguments.items()}
    size = settings.pop("img_size", None)
    config, unknown = transformers.AutoConfig.from_pretrained(folder, return_unused_kwargs=True, **settings)
    if size is not None and image_size_of(config) is None:
        unknown = {"img_size": size}
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
        if size is not None and to_2tuple(size) != image_size_of(config):
            model = resized_model(model, to_2tuple(size))
    else:
        if size is not None:
            set_image_size(config, to_2tuple(size))
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
            way_out = ", name another image size as img_size=" if "image_size" in arguments else ""
            raise StateDictError(
                f"{key} has the shape {tuple(stored)} in the weights of {name} and {tuple(built)} in the model"
                f"{f' with {asked}' if asked else ''}; leave out what changes its shape{way_out}, or use "
                "pretrained=False."
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
    try:
        hub.download(ref.repo, "preprocessor_config.json", revision=path.parent.name, cache_dir=cache_dir)
        processor = transformers.AutoImageProcessor.from_pretrained(path.parent)
    except (hub.HubEntryMissingError, ValueError, OSError) as error:
        raise ConfigError(
            f"{ref.text} has no preprocessor_config.json that transformers can read, and the size and normalisation of "
            "its images are unknown; build it with lamzoo.create_model in Python."
        ) from error
    channels = getattr(getattr(config, "vision_config", config), "num_channels", 3)
    images = _preprocessing(ref.text, processor, channels)
    with torch.device("meta"):
        model = TransformersImages(cls(config))
    size = images["input_size"][1:]
    if not model.takes(size):
        raise ConfigError(
            f"{ref.text} takes images of {model.image_size}, and its preprocessor_config.json makes images of {size}; "
            "build it with lamzoo.create_model in Python."
        )
    has_classes = "ForImageClassification" in cls.__name__
    names = model.classifier_names
    cfg: dict[str, Any] = {
        "fixed_input_size": True,
        "num_classes": config.num_labels if has_classes else 0,
        **({"classifier": names if len(names) > 1 else names[0]} if names else {}),
        **images,
    }
    labels = [config.id2label[index] for index in sorted(config.id2label)]
    if has_classes and labels != [f"LABEL_{index}" for index in range(len(labels))]:
        cfg["label_names"] = labels
    checked = check_preprocessing(cfg, source=f"{ref.text}:", error=ConfigError)
    saved = getattr(config, "lam_config", None)
    masks = None if saved is None else LamConfig.from_dict(saved)
    return replace(spec_of_name(ref.text, masks), pretrained_cfg=checked)


def with_timms_interface(host: Any, size: tuple[int, int]) -> tuple[TransformersImages, dict[str, Any]]:
    """Gives an image model of transformers timm's interface; returns it and the arguments that build it again.

    Args:
        host: the model.
        size: height and width of its images.
    """
    config = {key: value for key, value in parse_json(host.config.to_json_string()).items() if key != "lam_config"}
    return TransformersImages(host, size), {"hf_config": {**config, "architectures": [type(host).__name__]}}


def _check_installed(name: str) -> None:
    if find_spec("transformers") is None:
        raise MissingExtraError(f"{name} needs transformers; pip install 'lamzoo[transformers]'.")


_INTERPOLATION = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers


def _preprocessing(name: str, processor: Any, channels: int) -> dict[str, Any]:
    """Translates an image processor of transformers into keys of timm's ``PretrainedCfg``.

    Args:
        name: of the model, for messages.
        processor: of the repository.
        channels: of the images.

    Raises:
        ConfigError: timm's preprocessing makes other images.
    """
    normalises = processor.do_normalize
    cfg: dict[str, Any] = {
        "mean": tuple(processor.image_mean) if normalises else (0.0,) * channels,
        "std": tuple(processor.image_std) if normalises else (1.0,) * channels,
        "interpolation": _INTERPOLATION.get(int(processor.resample or 0), "bilinear"),
    }
    size, crop = processor.size or {}, processor.crop_size if processor.do_center_crop else None
    resized = (size.get("height"), size.get("width"))
    shortest, share = size.get("shortest_edge"), getattr(processor, "crop_pct", None)
    if share is not None and shortest:  # of ConvNeXT, whose large images are squashed
        crop, shortest = {"height": shortest, "width": shortest}, int(shortest / share) if shortest < 384 else None
        resized = (crop["height"], crop["width"])
    height, width = (crop["height"], crop["width"]) if crop else resized
    if height and width and (shortest or resized[0]):
        pct = height / (shortest or resized[0])
        if math.floor(height / pct) < (shortest or resized[0]):  # timm rounds down
            pct = math.nextafter(pct, 0)
        cfg |= {"input_size": (channels, height, width), "crop_mode": "center" if shortest else "squash"}
        cfg["crop_pct"] = pct
        if _makes_same_images(processor, cfg):
            return cfg
    raise ConfigError(
        f"{name} has the preprocessing {type(processor).__name__} with settings that timm's preprocessing has not; "
        "build it with lamzoo.create_model in Python, and give it the images of that processor."
    )


def _makes_same_images(processor: Any, cfg: Mapping[str, Any]) -> bool:
    """Compares the processor with timm's preprocessing on a picture that is neither square, grey nor symmetric."""
    channels, height, width = cfg["input_size"]
    rows = max(height, width) + 64  # twice as wide, so that odd margins, which the two round apart, are rare
    y, x = np.linspace(0, 1, rows)[:, None], np.linspace(0, 1, 2 * rows)[None]
    values = np.stack([x + 0 * y, y * y + 0 * x, 0.3 + 0.3 * np.sin(9 * x + 5 * y)], axis=-1)
    if channels not in MODES:
        return False
    picture = Image.fromarray((255 * values).astype(np.uint8)).convert(MODES[channels])
    try:
        with torch.device("cpu"):  # models may be built on others, to describe them
            expected = processor(picture, return_tensors="pt")["pixel_values"][0]
    except (ValueError, RuntimeError, TypeError, KeyError):  # whatever a processor raises for its own settings
        return False
    fitted = {key: of_channels(cfg[key], channels) for key in ("mean", "std")}
    with torch.device("cpu"):
        transform: Any = timm.data.create_transform(**{**cfg, **fitted}, is_training=False)
        found = transform(picture)
    return expected.shape == found.shape and bool((expected - found).abs().mean() < 0.05 * expected.std())
