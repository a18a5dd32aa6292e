"""Checks values before timm reads them: its ``PretrainedCfg``, and arguments of its models; needs no timm."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lamzoo.errors import ConfigError, LamzooError, RegistryError
from lamzoo.records import Limits, build

#: Largest number of classes, and of pixels times channels of an input (1 GiB as float32).
MAX_CLASSES, MAX_VALUES = 1_000_000, 2**28

_RATE, _SIDE = Limits(least=0, most=1), Limits(least=1, most=2**14)
#: Arguments that the models of timm share; all but the rates are integers, alone or in a tuple.
ARGUMENTS: dict[str, Limits] = {
    "num_classes": Limits(least=0, most=MAX_CLASSES),
    "in_chans": Limits(least=1, most=4096),
    "img_size": _SIDE,
    "patch_size": _SIDE,
    "depth": Limits(least=0, most=1000),
    "embed_dim": Limits(least=1, most=2**16),
    "num_heads": Limits(least=1, most=1024),
    **{
        f"{kind}rate": _RATE for kind in ("drop_", "attn_drop_", "proj_drop_", "pos_drop_", "patch_drop_", "drop_path_")
    },
}


@dataclass(frozen=True)
class _Values:
    """The keys of timm's ``PretrainedCfg`` that a file may set, and their types."""

    url: str | tuple[str, ...] | None = None
    file: str | None = None
    state_dict: Literal[None] = None
    hf_hub_id: str | None = None
    hf_hub_filename: str | None = None
    source: str | None = None
    architecture: str | None = None
    tag: str | None = None
    custom_load: bool | str | None = None
    input_size: tuple[int, int, int] | None = None
    test_input_size: tuple[int, int, int] | None = None
    min_input_size: tuple[int, int, int] | None = None
    fixed_input_size: bool | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] | None = None
    crop_pct: float | None = None
    test_crop_pct: float | None = None
    crop_mode: Literal["center", "squash", "border"] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    num_classes: int | None = None
    label_offset: int | None = None
    label_names: tuple[str, ...] | None = None
    label_descriptions: Mapping[str, str] | None = None
    pool_size: tuple[int, ...] | None = None
    test_pool_size: tuple[int, ...] | None = None
    first_conv: str | tuple[str, ...] | None = None
    classifier: str | tuple[str, ...] | None = None
    license: str | None = None
    description: str | None = None
    origin_url: str | None = None
    paper_name: str | None = None
    paper_ids: str | tuple[str, ...] | None = None
    notes: tuple[str, ...] | None = None


def check_label_names(names: Sequence[str], classes: int | None) -> None:
    """Raises a :class:`ConfigError` for class names that don't fit a head of ``classes`` outputs; None if unknown."""
    if isinstance(names, str):
        raise ConfigError(f"label_names is the string {names!r}; pass a list of class names.")
    if classes is not None and len(names) != classes:
        raise ConfigError(f"{len(names)} label names were given for a head of {classes} classes.")


def check_preprocessing(
    values: Any, where: str = "", *, source: str, error: type[LamzooError] = RegistryError
) -> dict[str, Any]:
    """Checks values of timm's ``PretrainedCfg`` that come from a file.

    Args:
        values: some of the keys, as JSON or TOML represent them.
        where: the keys that lead to them, for messages: ``"pretrained_cfg"``.
        source: the origin of the values, for messages: the file name with a colon.
        error: the exception to raise.

    Returns:
        The values, with lists as tuples, and without those that are None, which timm's defaults replace.

    Raises:
        LamzooError: ``error``: a key is unknown, mistyped or out of range; names it.
    """
    record = build(_Values, values, where, source=source, error=error)
    checked = {key: value for key, value in vars(record).items() if value is not None}
    channels, *_ = checked.get("input_size", (None,))
    classes = checked.get("num_classes")

    def need(key: str, fits: bool, rule: str) -> None:
        if not fits:
            place = f"{where}.{key}" if where else key
            raise error(f"{source} key {place} is {reprlib.repr(checked[key])}; it must be {rule}.")

    for key in ("input_size", "test_input_size", "min_input_size"):
        if key in checked:
            fits = min(checked[key]) > 0 and math.prod(checked[key]) <= MAX_VALUES
            need(key, fits, f"channels, height and width, with a product of 1 to {MAX_VALUES:,}")
    for key in ("crop_pct", "test_crop_pct"):
        if key in checked:
            need(key, 0.1 <= checked[key] <= 2, "from 0.1 to 2")
    for key, least in (("mean", -1e6), ("std", 1e-6)):
        if key in checked:
            need(key, len(checked[key]) in {1, 3, channels}, "one number for each input channel")
            need(key, all(least <= value <= 1e6 for value in checked[key]), f"numbers from {least:g} to 1e+06")
    for key in ("num_classes", "label_offset"):
        if key in checked:
            need(key, 0 <= checked[key] <= MAX_CLASSES, f"from 0 to {MAX_CLASSES:,}")
    if "label_names" in checked and classes:
        need("label_names", len(checked["label_names"]) == classes, f"a list of {classes} names, as num_classes says")
    return checked
