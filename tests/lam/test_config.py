"""LamConfig: every field is checked, and every configuration survives TOML, JSON and dict."""

import pickle
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamzoo.errors import ConfigError
from lamzoo.lam import LamConfig
from lamzoo.lam.config import Keys
from lamzoo.lam.ops import Op

widths = st.integers(1, 10**6)


@st.composite
def configs(draw: st.DrawFn) -> LamConfig:
    keys: Keys = draw(st.sampled_from(["content", "position"]))
    op: Op = draw(st.sampled_from(["mul", "add"]))
    return LamConfig(
        layers=draw(st.sampled_from(["multi", "single"])),
        keys=keys,
        op=op,
        rank=draw(widths),
        hidden=tuple(draw(st.lists(widths, max_size=3))),
        heads=draw(st.sampled_from(["shared", "per-head"])),
        sign=draw(st.sampled_from(["free", "positive"])) if op == "mul" else "free",
        init=draw(st.sampled_from(["identity", "paper"])),
        max_length=draw(st.none() | widths) if keys == "position" else None,
    )


@settings(derandomize=True)
@given(config=configs())
def test_round_trips_through_dict_toml_and_json(config: LamConfig) -> None:
    assert LamConfig.from_dict(config.to_dict()) == config
    assert LamConfig.from_toml(config.to_toml()) == config
    assert LamConfig.from_json(config.to_json()) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert isinstance(hash(config), int)


def test_missing_fields_keep_their_defaults() -> None:
    assert LamConfig.from_dict({}) == LamConfig.from_toml("") == LamConfig.from_json("{}") == LamConfig()
    assert LamConfig.from_dict({"rank": 3}) == LamConfig(rank=3)


def test_hidden_list_becomes_a_tuple() -> None:
    assert LamConfig(hidden=[4, 5]) == LamConfig(hidden=(4, 5))  # type: ignore[arg-type]


CHOICES = ("layers", "keys", "op", "heads", "sign", "init")


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("value", ["other", "", None, True, 1, ["multi"], b"mul"])
def test_choice_fields_refuse_other_values(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"LamConfig\.{name} is .*must be one of '"):
        LamConfig(**{name: value})


@pytest.mark.parametrize("name", ["rank", "max_length"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "8", True, [8], float("nan")])
def test_widths_refuse_what_is_not_a_positive_int(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"LamConfig\.{name} has "):
        LamConfig(keys="position", **{name: value})


def test_rank_is_required() -> None:
    with pytest.raises(ConfigError, match=r"LamConfig\.rank has None"):
        LamConfig(rank=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [8, None, "64", {64}, {"a": 1}])
def test_hidden_refuses_what_is_no_sequence(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"LamConfig\.hidden is .*\(64,\)"):
        LamConfig(hidden=value)


@pytest.mark.parametrize("width", [0, -3, True, 1.5, "4", None])
def test_hidden_refuses_wrong_widths(width: Any) -> None:
    with pytest.raises(ConfigError, match=r"LamConfig\.hidden has "):
        LamConfig(hidden=(8, width))


def test_fields_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_length .* keys='content'"):
        LamConfig(keys="content", max_length=4)
    with pytest.raises(ConfigError, match=r"sign='positive' .* op='add'"):
        LamConfig(sign="positive", op="add")


@settings(derandomize=True)
@given(config=configs())
def test_a_mapping_of_fields_is_taken_for_the_configuration(config: LamConfig) -> None:
    assert LamConfig.of(config) is config
    assert LamConfig.of(config.to_dict()) == config


def test_true_is_the_default_configuration() -> None:
    assert LamConfig.of(True) == LamConfig()


@pytest.mark.parametrize("value", [False, None, 1, "rank=8", ["rank"]])
def test_what_is_no_configuration_is_refused_with_what_is(value: Any) -> None:
    with pytest.raises(ConfigError, match="is not a LamConfig; pass one, a dict of its fields, or True"):
        LamConfig.of(value)


def test_unknown_field_is_named_with_the_closest_one() -> None:
    with pytest.raises(ConfigError, match=r"no field 'ranks'; did you mean 'rank'\?"):
        LamConfig.from_dict({"ranks": 8})
    with pytest.raises(ConfigError, match=r"no field 'zzz'; the fields are layers, keys, op, "):
        LamConfig.from_toml("zzz = 1")
    with pytest.raises(ConfigError, match=r"no field 7"):
        LamConfig.from_dict({7: 8})  # type: ignore[dict-item]


@pytest.mark.parametrize("text", ["", "{", "[1", "rank: 8"])
def test_text_that_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not JSON"):
        LamConfig.from_json(text)


@pytest.mark.parametrize(("text", "kind"), [("[1]", "list"), ("null", "NoneType"), ('"rank"', "str"), ("8", "int")])
def test_json_that_is_no_object_is_refused(text: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"mapping of its fields, not a {kind}"):
        LamConfig.from_json(text)


@pytest.mark.parametrize("text", ["rank =", "rank = 8\nrank = 9", "{"])
def test_text_that_is_not_toml_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not TOML"):
        LamConfig.from_toml(text)


def test_only_position_keys_without_a_length_are_given_one() -> None:
    positions = LamConfig(keys="position")
    assert positions.has_positions and positions.with_length(7) == LamConfig(keys="position", max_length=7)
    for config in (LamConfig(), LamConfig(keys="position", max_length=3)):
        assert config.with_length(7) is config


def test_configurations_are_read_without_torch() -> None:
    code = """
import sys
from lamzoo.lam import LamConfig
from lamzoo.reduction import PruneConfig
assert LamConfig().mask_op.identity == 0 and PruneConfig(0.5, (1,)).at == (1,)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
