"""Construction of CLIP4Clip's two towers: open_clip's own, vision models of timm, text models of transformers."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import open_clip
import timm.data
import timm.models
import torch
from open_clip.hf_configs import arch_dict
from open_clip.model import CLIP, CustomTextCLIP

from lamzoo.errors import ConfigError, MissingExtraError
from lamzoo.quiet import quietly
from lamzoo.reading import parse_json, read_text, reason, to_json

_logger = logging.getLogger(__name__)

_CONFIG, _WEIGHTS, _TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
_NOT_SIZES = ("_name_or_path", "auto_map", "dtype", "torch_dtype")  # fields of a configuration that are not kept


@dataclass(frozen=True)
class TowerFile:
    """The pretrained weights of a tower, in a file of its own.

    Attributes:
        file: a safetensors file.
        timm: timm's name of the architecture; None for a model of transformers.
    """

    file: Path
    timm: str | None = None


@dataclass(frozen=True)
class Towers:
    """Two towers, and what a model needs to know about their origin.

    Attributes:
        clip: the towers, a model of open_clip without pretrained weights.
        files: weights of towers, by the path of the tower in ``clip``; not loaded yet.
        args: arguments that build the same towers without these files; None if the given ones do.
        tokenizer: folder or repository with the tokenizer of a text tower of transformers; None without one.
        preprocessing: keys of timm's ``PretrainedCfg`` for the images of the vision tower; empty if it states none.
        fresh: prefixes, in ``clip``, of the layers that no pretrained weights exist for.
    """

    clip: Any
    files: Mapping[str, TowerFile] = field(default_factory=dict)
    args: Mapping[str, Any] | None = None
    tokenizer: str | None = None
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    fresh: tuple[str, ...] = ()


def named_towers(
    name: str, img_size: int | tuple[int, int] | None, context_length: int | None, quick_gelu: bool
) -> Towers:
    """Builds the towers of a model of open_clip.

    Args:
        name: the model.
        img_size: size of the images; the model's own by default.
        context_length: maximum tokens of a text; the model's own by default.
        quick_gelu: use OpenAI's activation.

    Raises:
        ConfigError: open_clip has no such model.
    """
    if name not in open_clip.list_models():
        raise ConfigError(f"open_clip has no model {name!r}; open_clip.list_models() lists its names.")
    with quietly():  # about missing weights, which are loaded later
        clip = open_clip.create_model(
            name,
            load_weights=False,
            device=torch.get_default_device(),
            pretrained_text=False,
            force_quick_gelu=quick_gelu,
            force_image_size=img_size,
            force_context_length=context_length,
        )
    return Towers(clip)


def custom_towers(
    clip: Mapping[str, Any], img_size: int | tuple[int, int] | None, context_length: int | None, quick_gelu: bool
) -> Towers:
    """Builds towers from arguments of ``open_clip.CLIP``, or ``open_clip.CustomTextCLIP`` for other libraries' towers.

    Args:
        clip: ``embed_dim``, ``vision_cfg`` and ``text_cfg``. A ``timm_model_name`` in ``vision_cfg`` makes the vision
            tower a model of timm, an ``hf_model_name`` in ``text_cfg`` the text tower a model of transformers: the
            folder of one or, with its configuration as ``hf_config``, any name. ``timm_model_pretrained`` and
            ``hf_model_pretrained`` are safetensors files of these towers; True is the ``model.safetensors`` of the
            folder, which is the default there. Other keys are open_clip's.
        img_size: size of the images.
        context_length: maximum tokens of a text.
        quick_gelu: use OpenAI's activation, in open_clip's own towers.

    Raises:
        ConfigError: an argument is invalid, a file is missing, or weights would have to be downloaded.
        MissingExtraError: transformers is not installed.
    """
    given = {key: dict(value) if isinstance(value, Mapping) else value for key, value in clip.items()}
    vision, text = given["vision_cfg"], given["text_cfg"]
    if img_size is not None:
        vision["image_size"] = img_size
    if context_length is not None:
        if text.get("context_length", context_length) != context_length:
            _logger.warning(
                "context_length=%d replaces the %s of clip.text_cfg; it is that of the card unless you give it.",
                context_length, text["context_length"],
            )  # fmt: skip
        text["context_length"] = context_length
    if not vision.get("timm_model_name") and not text.get("hf_model_name"):
        return Towers(CLIP(**given, quick_gelu=quick_gelu))
    files: dict[str, TowerFile] = {}
    preprocessing: dict[str, Any] = {}
    fresh: list[str] = []
    if name := vision.get("timm_model_name"):
        file = _timm_weights(name, vision.pop("timm_model_pretrained", False))
        if file is not None:
            files["visual.trunk"] = TowerFile(file, name)
        fresh.append("visual.head.")
    tokenizer, built = None, given
    if text.get("hf_model_name"):
        file, tokenizer = _hf_tower(text)
        if file is not None:
            files["text.transformer"] = TowerFile(file)
        fresh.append("text.proj.")
    with tempfile.TemporaryDirectory(prefix="lamzoo-") as folder:
        if "hf_config" in text:
            # open_clip reads the configuration of a tower from a folder, and only there builds no layer in vain.
            (Path(folder) / _CONFIG).write_text(to_json(text["hf_config"]), encoding="utf-8")
            built = {**given, "text_cfg": {**_without(text, "hf_config"), "hf_model_name": folder}}
        model: Any = CustomTextCLIP(**built, quick_gelu=quick_gelu)
    if name:
        model.visual.set_input_size(vision.get("image_size", 224))
        preprocessing = _preprocessing(model.visual.trunk)
    if "hf_config" in text:
        longest = model.text.context_length  # 0 where positions are relative
        model.context_length = min(text.get("context_length", 77), longest or 77)
    return Towers(model, files, given if files or "hf_config" in text else None, tokenizer, preprocessing, tuple(fresh))


def _timm_weights(name: str, pretrained: Any) -> Path | None:
    """Returns the weights file of a vision tower of timm; None for fresh weights."""
    if not timm.models.is_model(name.partition(".")[0]):
        raise ConfigError(
            f"vision_cfg.timm_model_name is {name!r}, and timm has no such model; timm.list_models() lists its names."
        )
    return _local_file("vision_cfg.timm_model_pretrained", pretrained, "a vision model of timm")


def _hf_tower(text: dict[str, Any]) -> tuple[Path | None, str | None]:
    """Completes the configuration of a text tower of transformers, in place; returns its weights and its tokenizer."""
    if find_spec("transformers") is None:
        raise MissingExtraError("A text tower of transformers needs it; pip install 'lamzoo[transformers]'.")
    name = os.fspath(text["hf_model_name"])
    folder = Path(os.path.expanduser(name))
    config = text.get("hf_config")
    pretrained = text.pop("hf_model_pretrained", config is None)
    tokenizer = text.get("hf_tokenizer_name")
    if config is None:
        if not (folder / _CONFIG).is_file():
            raise ConfigError(
                f"text_cfg.hf_model_name is {name!r}, which is no folder with a {_CONFIG}; models are not downloaded "
                "here, so name the folder that transformers' save_pretrained wrote, or give hf_config."
            )
        try:
            config = parse_json(read_text(folder / _CONFIG))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder / _CONFIG} is not a configuration ({reason(error)}); replace it.") from error
        if tokenizer is None and (folder / _TOKENIZER).is_file():
            tokenizer = str(folder)
    if not isinstance(config, Mapping) or config.get("model_type") not in arch_dict:
        kind = config.get("model_type") if isinstance(config, Mapping) else config
        raise ConfigError(
            f"The text tower {name!r} is of the type {kind!r}; open_clip takes {', '.join(sorted(arch_dict))}."
        )
    if not isinstance(config.get("pad_token_id", 0), int):
        raise ConfigError(f"The text tower {name!r} has no pad_token_id, which tells the end of a text; set it.")
    if pretrained is True and folder.is_dir():
        if not (folder / _WEIGHTS).is_file():
            raise ConfigError(
                f"{folder} has no {_WEIGHTS}; set text_cfg.hf_model_pretrained to a safetensors file, or to false for "
                "fresh weights."
            )
        pretrained = folder / _WEIGHTS
    file = _local_file("text_cfg.hf_model_pretrained", pretrained, "a text model of transformers")
    if file is not None and tokenizer is None:
        raise ConfigError(
            f"The text tower {name!r} is pretrained, and its tokenizer is unknown; set text_cfg.hf_tokenizer_name to a "
            f"folder with its {_TOKENIZER}."
        )
    text["hf_config"] = {key: value for key, value in config.items() if key not in _NOT_SIZES}
    text["hf_model_name"], text["hf_model_pretrained"] = config["model_type"], False
    if tokenizer is not None:
        local = Path(os.path.expanduser(tokenizer))
        text["hf_tokenizer_name"] = tokenizer = os.fspath(local.absolute() if local.is_dir() else tokenizer)
    return file, tokenizer


def _local_file(key: str, value: Any, what: str) -> Path | None:
    if value is False or value is None:
        return None
    if not isinstance(value, (str, os.PathLike)):
        raise ConfigError(
            f"{key} is {value!r}, and the weights of {what} are not downloaded; set it to the path of a safetensors "
            "file, or to false for fresh weights."
        )
    path = Path(os.path.expanduser(value))
    if not path.is_file():
        raise ConfigError(f"{key} is {str(value)!r}, and there is no such file; set it to a safetensors file.")
    return path


def _preprocessing(trunk: Any) -> dict[str, Any]:
    config = timm.data.resolve_data_config(pretrained_cfg=trunk.pretrained_cfg)
    return {key: config[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}


def _without(table: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name != key}
