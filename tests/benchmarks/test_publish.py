"""What a model card says of the recipe that trained it."""

from __future__ import annotations

import json
from pathlib import Path

import lamzoo
from benchmarks.publish import changes, measure_retrieval
from lamzoo.training import load_recipe
from tests.training.retrieval_data import retrieval_table, write_faces

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


def test_a_retrieval_models_card_says_what_was_measured_and_by_which_command(tmp_path: Path) -> None:
    table = retrieval_table(write_faces(tmp_path, copies=1), tmp_path / "out")
    model = lamzoo.create_model("lam_clip4clip_micro", **table["model"]["kwargs"], max_frames=3, fps=0)
    measured = measure_retrieval(model, "lam_clip4clip_micro.faces", table, "test", {})
    assert measured.samples == "12 texts and 12 videos"
    assert measured.size == "3 frames of 32 x 32 px and one text"
    assert f"--task retrieval --data grid:{tmp_path}:face --split test" in measured.command
    assert set(measured.metrics) == {f"{way}_{key}" for way in ("t2v", "v2t") for key in ("R1", "R5", "R10", "MedianR")}
    assert f"R@10 {measured.metrics['t2v_R10']:.1f} %" in measured.rows["text to video"]
