"""Recipes are refused, with the culprit named, before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lamzoo.errors import ConfigError, LamzooError, RecipeError
from lamzoo.lam import LamConfig
from lamzoo.reduction import PruneConfig, TokenReduction
from lamzoo.training import load_recipe, parse_recipe
from lamzoo.training.build import build_model

RECIPES = sorted((Path(__file__).parents[2] / "benchmarks" / "recipes").glob("*.toml"))
MICRO = next(path for path in RECIPES if path.name == "micro.cifar10.toml")


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("run", "batchsize", 8, "run.batchsize is unknown; did you mean run.batch_size"),
        ("run", "batch_size", 0, "run.batch_size is 0; it must be at least 1"),
        ("run", "batch_size", "8", 'run.batch_size is "8"; it must be an int'),
        ("run", "batch_size", True, "run.batch_size is true; it must be an int"),
        ("run", "accumulation", 3, "not a multiple of run.accumulation"),
        ("run", "precision", "int8", "it must be one of 'no', 'bf16', 'fp16'"),
        ("run", "ema_decay", 1.5, "run.ema_decay is 1.5; it must lie between 0 and 1"),
        ("optimizer", "name", "adamv", "optimizer.name is 'adamv', which is unknown; did you mean adam"),
        ("optimizer", "lr", 0, "optimizer.lr is 0.0; it must be positive"),
        ("schedule", "name", "cosin", "did you mean cosine"),
        ("augment", "scale", [0.5], "augment.scale is [0.5]; it must be 2 numbers"),
        ("model", "lam", {"rnak": 4}, "no field 'rnak'; did you mean 'rank'"),
        ("model", "name", "lam_vit_mikro", "lam_vit_micro"),
        ("run", "precision", "fp16", "'fp16', which needs a GPU"),
        ("data", "workers", -1, "data.workers is -1; it must lie between 0 and 1024"),
        ("run", "seed", -1, "run.seed is -1; it must lie between 0 and 4294967295"),
        ("run", "seed", 2**32, "run.seed is 4294967296; it must lie between 0 and 4294967295"),
        ("run", "batch_size", 2**70, "run.batch_size is 1180591620717411303424; it must be below 2**63"),
        ("optimizer", "lr", float("nan"), "optimizer.lr is nan; it must be a finite number"),
        ("optimizer", "lr", 10**400, "; it must be below 2**63"),
        ("optimizer", "weight_decay", float("inf"), "optimizer.weight_decay is inf; it must be a finite number"),
        ("optimizer", "lr", 1e300, "optimizer.lr is 1e+300; it must be at most 1e+30"),
        (
            "optimizer",
            "kwargs",
            {"eps": 2**70},
            "optimizer.kwargs.eps is 1180591620717411303424; it must be below 2**63",
        ),
        ("optimizer", "kwargs", {"betas": [0.9, float("nan")]}, "optimizer.kwargs.betas is nan; it must be a finite"),
        ("augment", "scale", [0.0, 1.0], "augment.scale is 0.0; it must be positive"),
        ("augment", "scale", [0.9, 0.1], "augment.scale is (0.9, 0.1); it must be increasing"),
        ("augment", "mixup_prob", 2, "augment.mixup_prob is 2.0; it must lie between 0 and 1"),
        ("data", "source", "", "data.source is empty"),
        ("augment", "cutmix", 1e-320, "augment.cutmix is 1e-320; it must be 0 or at least 0.001"),
        ("augment", "interpolation", "x", "augment.interpolation is 'x'; it must be one of 'nearest', 'bilinear'"),
        ("augment", "auto_augment", "nonsense", "augment.auto_augment is 'nonsense' (Unknown AA policy nonsense)"),
        ("augment", "auto_augment", "rand-n999999", "(a number in it is above 999); write '' for none, or one of"),
        ("augment", "auto_augment", "rand-mstd0.5.5", "(could not convert string to float: '0.5.5')"),
        ("augment", "auto_augment", "augmix-m3-a0", "(its a must be at least 0.001)"),
        ("data", "source", "a\0b", "must not contain a NUL character"),
        ("schedule", "cooldown_epochs", -1, "schedule.cooldown_epochs is -1; it must not be negative"),
    ],
)
def test_bad_entry_is_named(recipe_table: dict[str, Any], section: str, key: str, value: Any, message: str) -> None:
    recipe_table[section][key] = value
    with pytest.raises(LamzooError, match=re.escape(message)):
        parse_recipe(recipe_table)


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"kept": 0.5}, "prune.kept is unknown; did you mean prune.keep"),
        ({"training": "soft"}, "prune.training is 'soft'; it must be one of 'straight-through', 'top-k'"),
        ({"loss_weight": -1}, "prune.loss_weight is -1.0; it must not be negative"),
    ],
)
def test_bad_pruning_is_named(recipe_table: dict[str, Any], prune: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        parse_recipe(recipe_table | {"prune": prune})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"reduction": {}}, "needs one of keep, target_gmacs and r for merging, and has none of them"),
        ({"reduction": {"keep": 0.5, "r": 2}}, "and has keep and r"),
        ({"reduction": {"keep": 0}}, "[reduction]: keep=0.0"),
        ({"reduction": {"target_gmacs": 0}}, "reduction.target_gmacs is 0.0; it must be positive"),
        ({"reduction": {"r": -1}}, "reduction.r is -1; it must not be negative"),
        ({"reduction": {"keep": 0.5, "at": [1, 1]}}, "[reduction]: at=(1, 1): name at least one layer"),
        (
            {"reduction": {"keep": 0.5, "rest": "drop", "score": "attention"}},
            "score='attention' is a setting of pruning",
        ),
        ({"reduction": {"keep": 0.5, "loss_weight": 1}}, "reduction.loss_weight is 1.0, a setting of pruning"),
        ({"reduction": {"method": "prune", "r": 2}}, "reduction.r is 2, a setting of merging"),
        ({"reduction": {"keep": 0.5, "frames": 0}}, "[reduction]: frames=0.0: the share of frames to keep must be"),
        (
            {"reduction": {"method": "prune", "keep": 0.5, "frames": 0.5}},
            "frames=0.5 is a setting of merging; leave it out, or set method='merge'",
        ),
        ({"reduction": {"keep": 0.5}, "prune": {"keep": 0.5}}, "[prune] and [reduction] exclude each other"),
    ],
)
def test_bad_reduction_is_named(recipe_table: dict[str, Any], sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        parse_recipe(recipe_table | sections)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"r": 1}, TokenReduction(0.75)),
        ({"method": "prune", "keep": 0.5, "at": [0]}, PruneConfig(0.5, (0,))),
        ({"target_gmacs": 1}, TokenReduction(1.0)),
    ],
)
def test_a_recipe_merges_or_prunes(
    recipe_table: dict[str, Any], section: dict[str, Any], expected: TokenReduction
) -> None:
    recipe = parse_recipe(recipe_table | {"reduction": section})
    assert parse_recipe(recipe.to_dict()) == recipe
    assert build_model(recipe, ["a", "b"]).token_reduction == expected


def test_frames_of_a_model_without_frames_are_refused(recipe_table: dict[str, Any]) -> None:
    recipe = parse_recipe(recipe_table | {"reduction": {"keep": 1, "frames": 0.5}})
    with pytest.raises(ConfigError, match=r"frames=0\.5: .*VisionTransformer has no frames that could merge"):
        build_model(recipe, ["a", "b"])


def test_a_cooldown_of_a_schedule_that_never_falls_is_refused(recipe_table: dict[str, Any]) -> None:
    recipe_table["schedule"] |= {"name": "constant", "cooldown_epochs": 2}
    with pytest.raises(RecipeError, match="leave it out and raise schedule.epochs"):
        parse_recipe(recipe_table)


@pytest.mark.parametrize(("lam", "expected"), [({"rank": 2}, LamConfig(rank=2)), (True, LamConfig()), (False, None)])
def test_masks_are_given_as_fields_or_as_yes_and_no(recipe_table: dict[str, Any], lam: Any, expected: Any) -> None:
    recipe_table["model"]["lam"] = lam
    recipe = parse_recipe(recipe_table)
    assert parse_recipe(recipe.to_dict()) == recipe
    assert build_model(recipe, ["a", "b"]).lam_config == expected


def test_missing_section_is_named(recipe_table: dict[str, Any]) -> None:
    del recipe_table["data"]
    with pytest.raises(RecipeError, match="data is missing"):
        parse_recipe(recipe_table)


def test_section_that_is_no_table_is_named(recipe_table: dict[str, Any]) -> None:
    recipe_table["run"] = 3
    with pytest.raises(RecipeError, match=re.escape("[run] must be a table")):
        parse_recipe(recipe_table)


@pytest.mark.parametrize(
    ("content", "message"), [("[model", "not valid TOML"), (b"\xff\xfe\x00", "not valid TOML"), (None, "can't be read")]
)
def test_unreadable_file_is_named(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_is_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert parse_recipe(recipe.to_dict()) == recipe


def test_overrides_reach_every_depth() -> None:
    overrides = [
        "run.batch_size=64",
        "model.name=vit_micro",
        "model.kwargs.drop_path_rate=0.1",
        "augment.scale=[0.2, 1]",
    ]
    recipe = load_recipe(MICRO, overrides)
    assert (recipe.run.batch_size, recipe.model.name) == (64, "vit_micro")
    assert recipe.model.kwargs == {"drop_path_rate": 0.1}
    assert recipe.augment.scale == (0.2, 1.0)


@pytest.mark.parametrize("override", ["batch_size=3", "run.batch_size", "run.seed.x=1"])
def test_malformed_override_is_named(override: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(override)):
        load_recipe(MICRO, [override])
