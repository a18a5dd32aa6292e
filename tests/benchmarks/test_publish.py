"""What a model card says of the recipe that trained it."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.publish import changes
from lamzoo.training import load_recipe

RECIPE = Path(__file__).resolve().parents[2] / "benchmarks" / "recipes" / "micro.cifar10.toml"


def test_a_cards_overrides_give_the_recipe_back() -> None:
    overrides = ["model.name=vit_micro", "run.seed=3", "augment.scale=[0.5, 1.0]", "model.kwargs.drop_path_rate=0.1"]
    changed = load_recipe(RECIPE, overrides).to_dict()
    found = changes(load_recipe(RECIPE).to_dict(), json.loads(json.dumps(changed)))
    assert sorted(found) == sorted(overrides)
    assert load_recipe(RECIPE, found).to_dict() == changed


def test_the_recipe_itself_needs_no_override() -> None:
    recipe = load_recipe(RECIPE).to_dict()
    assert changes(recipe, json.loads(json.dumps(recipe))) == []
