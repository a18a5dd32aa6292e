"""What a model card says of the recipe that trained it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lamzoo
from benchmarks.publish import _kept, _looks, changes, measure
from lamzoo.training import load_recipe
from tests.speech import ALL, write_speech
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
    measured = measure(model, "lam_clip4clip_micro.faces", table, "test", {})
    assert measured.samples == "12 texts, 12 videos"
    assert measured.size == "3 frames of 32 x 32 px and one text"
    assert f"eval lam_clip4clip_micro.faces --data grid:{tmp_path}:face --split test" in measured.command
    assert set(measured.metrics) == {f"{way}_{key}" for way in ("t2v", "v2t") for key in ("R1", "R5", "R10", "MedianR")}
    assert measured.rows["text to video R@10 (%)"] == f"{measured.metrics['t2v_R10']:.2f}"


@pytest.mark.slow
def test_a_describers_card_says_what_was_measured_and_by_which_command(tmp_path: Path) -> None:
    source = f"grid:{write_speech(tmp_path)}:audio"
    model = lamzoo.create_model(
        "lam_describer_micro", features={"audio": 128}, rates={"audio": 50.0}, vocabulary=ALL, width=32, heads=2,
        context_length=5,
    )  # fmt: skip
    recipe = {"task": "captions", "data": {"source": source}}
    measured = measure(model, "lam_describer_micro.speech", recipe, "test", {})
    assert measured.samples == "8 clips"
    assert measured.size == "3 seconds of 50 tokens of audio (128 wide) a second, and one sentence"
    assert f"eval lam_describer_micro.speech --data {source} --split test" in measured.command
    assert measured.rows["word error rate (%)"] == f"{measured.metrics['WER']:.2f}"


@pytest.mark.parametrize(
    ("interval", "says"),
    [
        (1, "after each epoch to monitor the run"),
        (2, "after every 2 epochs to monitor the run"),
        (12, "once, at the end"),
    ],
)
def test_a_card_says_when_the_split_was_scored(interval: int, says: str) -> None:
    assert _looks(interval, 12) == says


@pytest.mark.parametrize(("epoch", "says"), [(3, "the last epoch"), (2, "epoch 2 of 3, chosen by that split")])
def test_a_card_says_which_epochs_weights_it_is_of(tmp_path: Path, epoch: int, says: str) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text(json.dumps({"epoch_kept": epoch}))
    assert _kept(tmp_path, 3) == f"those of {says}"
