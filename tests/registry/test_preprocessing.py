"""The check of timm's preprocessing values from files: what timm has passes, anything else is named."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import timm
from timm.models import PretrainedCfg

from lamzoo.errors import WeightsError
from lamzoo.registry.preprocessing import _Values, check_preprocessing

GOOD = {
    "input_size": [3, 32, 48],
    "mean": [0.5, 0.5, 0.5],
    "std": [1, 1, 1],
    "num_classes": 2,
    "label_names": ["a", "b"],
}


def test_every_key_of_timms_record_is_known() -> None:
    assert {field.name for field in dataclasses.fields(_Values)} >= {f.name for f in dataclasses.fields(PretrainedCfg)}


def test_records_of_timm_pass_unchanged() -> None:
    for name in timm.list_pretrained()[::15]:
        cfg = timm.get_pretrained_cfg(name)
        assert cfg is not None
        written = {key: value for key, value in cfg.to_dict().items() if value is not None}
        checked = check_preprocessing(json.loads(json.dumps(written)), source=name)
        assert json.dumps(checked, sort_keys=True) == json.dumps(written, sort_keys=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("input_size", [3, 0, 32]),
        ("input_size", [3, 10**9, 32]),
        ("input_size", [3, 32]),
        ("input_size", ["3", "32", "32"]),
        ("mean", [0.5, 0.5]),
        ("mean", 0.5),
        ("mean", [0.5, 0.5, math.nan]),
        ("std", [1, 0, 1]),
        ("std", [1, 1, 10**400]),
        ("crop_pct", -1),
        ("crop_pct", math.nan),
        ("crop_pct", 1e-9),
        ("interpolation", "x"),
        ("interpolation", ["bicubic"]),
        ("crop_mode", "x"),
        ("num_classes", -5),
        ("num_classes", 10**12),
        ("num_classes", True),
        ("label_names", ["a"]),
        ("label_names", ["a", 2]),
        ("label_names", "ab"),
        ("classifier", 3),
        ("state_dict", {}),
        ("colour", 1),
    ],
)
def test_another_value_is_refused_by_file_and_key(key: str, value: Any) -> None:
    with pytest.raises(WeightsError, match=rf"^config\.json: key pretrained_cfg\.{key} is .*;"):
        check_preprocessing(GOOD | {key: value}, "pretrained_cfg", source="config.json:", error=WeightsError)


def test_nulls_leave_timms_defaults_and_lists_become_tuples() -> None:
    checked = check_preprocessing(GOOD | {"mean": None, "classifier": ["head", "fc"]}, source="config.json:")
    assert "mean" not in checked
    assert checked["classifier"] == ("head", "fc")
    assert checked["input_size"] == (3, 32, 48)
