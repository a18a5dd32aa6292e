"""Recipes that come with lamzoo."""

import re
from pathlib import Path

import pytest

from lamzoo.errors import RecipeError
from lamzoo.registry.cards import data_dir
from lamzoo.training.config_reader import recipe_file
from lamzoo.training.recipe import load_recipe


def test_a_recipe_is_found_by_its_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("lamzoo:msrvtt_lam_clip4clip", ["data.source=msrvtt:elsewhere"])
    assert recipe.model.name == "lam_clip4clip.openai"
    assert recipe.data.source == "msrvtt:elsewhere"


def test_an_unknown_recipe_is_answered_with_the_closest() -> None:
    with pytest.raises(RecipeError, match=r"no recipe 'flickr'; try .*lamzoo:flickr8k"):
        recipe_file("lamzoo:flickr")


def test_a_recipe_on_data_beside_the_checkout_says_what_to_set_instead() -> None:
    beside = [path for path in data_dir("recipes").glob("*.toml") if 'source = "' in path.read_text("utf-8")]
    assert beside
    for path in beside:
        text = path.read_text("utf-8")
        if re.search(r'^source = "\w+:\.\./', text, re.MULTILINE):
            assert "data.source=" in text, path.name
