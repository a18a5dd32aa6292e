"""The configuration of a folder of masks, ``lam_config.json``, and where such folders are; needs no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lamzoo.errors import ConfigError, WeightsError, WeightsNotFoundError
from lamzoo.files import is_sha256
from lamzoo.lam.config import LamConfig
from lamzoo.reading import parse_json, read_text, reason
from lamzoo.records import build
from lamzoo.registry.cards import data_dir
from lamzoo.registry.refs import ModelRef
from lamzoo.weights.sources import way_out

ADAPTERS = "adapters"  # folder of the bundled masks beside the bundled weights
CONFIG_NAME = "lam_config.json"
MASKS_NAME = "lam_model.safetensors"


class MasksOnlyError(WeightsNotFoundError):
    """A folder or repository that has masks without their model.

    Args:
        place: its path or name.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        super().__init__(
            f"{place} has masks without their model; create their base, which `lamzoo info` names, and call "
            f"lamzoo.load_lam(model, {place!r})."
        )

    def __reduce__(self) -> tuple[type[MasksOnlyError], tuple[str]]:
        return type(self), (self.place,)


@dataclass(frozen=True)
class BaseModel:
    """The model that masks were trained on.

    Attributes:
        model_class: library and name of its class, such as ``"timm.VisionTransformer"``.
        name: for :func:`lamzoo.create_model`; None if unknown.
        revision: commit of its hub repository; None if unknown.
        attention_sha256: hash of the weights of the attention layers that have masks, in bfloat16.
    """

    model_class: str
    name: str | None = None
    revision: str | None = None
    attention_sha256: str | None = None

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return self.model_class if self.name is None else f"{self.name}{at} ({self.model_class})"


@dataclass(frozen=True)
class _Own:
    """The keys of a ``lam_config.json`` under ``lamzoo``."""

    version: str = ""
    sha256: str | None = None


@dataclass(frozen=True)
class MaskFolder:
    """The keys of a ``lam_config.json``.

    Attributes:
        lam_config: fields of the masks' :class:`~lamzoo.LamConfig`.
        base_model: the model that they were trained on.
        layers: paths of the attention layers that have masks.
        parts: the parts of the model that have masks, as of :func:`lamzoo.adapters.add_lam_to`; None for all of it.
        also: keys of the further parameters that are stored, such as those of the classifier.
        label_names: class names of that classifier.
        lamzoo: the version that wrote the folder, and the sha256 of ``lam_model.safetensors``.
    """

    lam_config: Mapping[str, Any]
    base_model: BaseModel
    layers: tuple[str, ...]
    parts: Mapping[str, int | None] | None = None
    also: tuple[str, ...] = ()
    label_names: tuple[str, ...] | None = None
    lamzoo: _Own = field(default_factory=_Own)

    @property
    def config(self) -> LamConfig:
        """The configuration of the masks."""
        return LamConfig.from_dict(self.lam_config)


def bundled_masks() -> list[str]:
    """Returns the names of the masks that come with lamzoo, for :func:`lamzoo.load_lam`."""
    return sorted(path.parent.name for path in (data_dir("weights") / ADAPTERS).glob(f"*/{CONFIG_NAME}"))


def find_mask_folder(source: str | os.PathLike[str], cache_dir: str | Path | None = None) -> Path:
    """Returns the local folder of masks, of which a hub repository is downloaded.

    Args:
        source: a folder, ``hf-hub:OWNER/NAME[@revision]``, or a name of :func:`bundled_masks`.
        cache_dir: replaces the hub's cache folder.

    Raises:
        WeightsNotFoundError: the folder, repository or one of its two files does not exist.
        WeightsError: the download failed otherwise.
    """
    text = os.fspath(source)
    if text.startswith("hf-hub:"):
        from lamzoo import hub  # imports a downloader, which folders don't need

        ref = ModelRef.parse(text)
        folder = hub.download(ref.repo, CONFIG_NAME, revision=ref.revision, cache_dir=cache_dir).parent
        hub.download(ref.repo, MASKS_NAME, revision=folder.name, cache_dir=cache_dir)  # of the same commit
        return folder
    folder = Path(os.path.expanduser(text.removeprefix("local-dir:")))
    if not os.path.isfile(folder / CONFIG_NAME) and text in bundled_masks():
        folder = data_dir("weights") / ADAPTERS / text
    for name in (CONFIG_NAME, MASKS_NAME):
        if not os.path.isfile(folder / name):
            why = f"it has no {name}" if os.path.isdir(folder) else "no such folder"
            raise WeightsNotFoundError(
                f"There are no masks in {folder}: {why}; lamzoo.save_lam writes such folders. Bundled masks: "
                f"{', '.join(bundled_masks()) or 'none'}."
            )
    return folder


def has_masks_only(folder: Path) -> bool:
    """Returns whether a folder holds masks without their model."""
    return os.path.isfile(folder / CONFIG_NAME) and not os.path.isfile(folder / "config.json")


def read_mask_folder(folder: Path) -> MaskFolder:
    """Reads the configuration in a folder of masks.

    Raises:
        WeightsError: it is damaged; names file, key and value.
    """
    path = folder / CONFIG_NAME
    try:
        raw = parse_json(read_text(path))
        if not isinstance(raw, dict):
            raise ConfigError("it must be a table")
        for key, cls in (("base_model", BaseModel), ("lamzoo", _Own)):
            if isinstance(raw.get(key), dict):
                raw[key] = _known(raw[key], cls)
        found = build(MaskFolder, _known(raw, MaskFolder), source="its", error=ConfigError)
        LamConfig.from_dict(found.lam_config)
        if found.lamzoo.sha256 is not None and not is_sha256(found.lamzoo.sha256):
            raise ConfigError(f"its key lamzoo.sha256 is {found.lamzoo.sha256!r:.60}, which is no sha256")
    except (OSError, ValueError) as error:
        why = reason(error).rstrip(".")
        raise WeightsError(f"{path} is not the configuration of masks: {why}; {way_out(path)}.") from error
    return found


def _known(table: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """Returns the keys of a table that are fields; later versions may add others."""
    names = {entry.name for entry in fields(cls)}
    return {key: value for key, value in table.items() if key in names and value is not None}
