"""What a user leaves open is chosen by the data, and what is said stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lamzoo
from lamzoo.errors import LamzooError, UnknownModelError
from lamzoo.tasks import find_task
from lamzoo.training import complete_recipe, parse_recipe, splits, train
from lamzoo.training.recipe import DataSection
from lamzoo.training.splits import open_roles
from tests.images import write_folder
from tests.speech import write_speech


@pytest.fixture
def start(tmp_path: Path) -> str:
    model = lamzoo.create_model("lam_vit_micro", embed_dim=16, depth=1, num_classes=2)
    lamzoo.save_pretrained(model, tmp_path / "mine" / "model")
    return f"local-dir:{tmp_path / 'mine' / 'model'}"


def complete(name: str, source: Path, **sections: Any) -> Any:
    model = {"name": name, **sections.pop("model", {})}
    data = {"source": f"imagefolder:{source}", **sections.pop("data", {})}
    return complete_recipe({"model": model, "data": data, **sections})


def test_a_model_and_a_folder_are_enough(start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_folder(tmp_path / "my photos", splits=(), each=10)
    recipe = complete(start, folder, model={"pretrained": True}, schedule={"epochs": 1}, run={"report": False})
    result = train(recipe)
    assert result.output == Path("runs", "mine-my-photos")
    assert len(result.scores["validation"].labels) == 3
    assert lamzoo.create_model(f"local-dir:{result.model}", pretrained=True).pretrained_cfg["num_classes"] == 3


def test_small_data_get_small_batches_and_more_epochs(tmp_path: Path) -> None:
    few = complete("lam_vit_micro", write_folder(tmp_path / "few", splits=(), each=2), model={"pretrained": True})
    many = complete("lam_vit_micro", write_folder(tmp_path / "many", splits=(), each=300), model={"pretrained": True})
    assert few.run.batch_size == 2  # three images are left, one of each class being set aside
    assert many.run.batch_size == 16
    assert few.schedule.epochs > many.schedule.epochs
    assert few.optimizer.lr < many.optimizer.lr


@pytest.mark.parametrize("each", [1, 2, 5, 8, 13])
@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (1, 3), (2, 1), (3, 2)])
def test_chosen_batches_divide_into_pairs_on_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, each: int, processes: int, accumulation: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    folder = write_folder(tmp_path / "few", splits=("train", "val"), each=each)
    recipe = complete("lam_vit_micro", folder, run={"accumulation": accumulation})
    assert recipe.augment.mixup and recipe.augment.cutmix
    images, share = 3 * each, processes * accumulation
    assert recipe.run.batch_size % share == 0
    if images >= 2 * share:
        assert recipe.run.batch_size % (2 * share) == 0
        assert recipe.run.batch_size <= images


def test_a_test_split_is_scored_and_never_watched(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", splits=("train", "test"))
    data = complete("lam_vit_micro", folder, model={"pretrained": True}).data
    assert (data.eval_split, data.test_split, data.val_fraction) == ("validation", "test", 0.1)
    flat = complete("lam_vit_micro", write_folder(tmp_path / "flat", splits=()), model={"pretrained": True}).data
    assert flat.test_split is None
    watched = complete("lam_vit_micro", folder, model={"pretrained": True}, data={"eval_split": "testing"}).data
    assert watched.test_split is None


def test_defaults_open_the_training_split_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[DataSection] = []
    open_train = splits._open_train
    monkeypatch.setattr(splits, "_open_train", lambda data: [opened.append(data), open_train(data)][1])
    folder = write_folder(tmp_path / "data", splits=("train", "test"))
    assert complete("lam_vit_micro", folder, model={"pretrained": True}).data.test_split == "test"
    assert len(opened) == 1


def test_what_is_said_stays(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", splits=())
    said = {
        "optimizer": {"lr": 0.123, "name": "sgd"},
        "schedule": {"epochs": 3, "warmup_epochs": 2},
        "augment": {"label_smoothing": 0.0},
        "run": {"output": "here", "batch_size": 2, "seed": 5, "ema_decay": 0.5},
    }
    recipe = complete("lam_vit_micro", folder, model={"pretrained": True, "tune": "head"}, **said).to_dict()
    for section, entries in said.items():
        assert entries.items() <= recipe[section].items()


def test_the_choice_is_a_recipe_that_can_be_read_back(tmp_path: Path) -> None:
    recipe = complete("lam_vit_micro", write_folder(tmp_path / "data", splits=()))
    assert parse_recipe(recipe.to_dict()) == recipe
    assert complete_recipe(recipe.to_dict()) == recipe


def test_training_from_scratch_takes_longer_than_fine_tuning(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", splits=(), each=20)
    scratch, tuned = (complete("lam_vit_micro", folder, model={"pretrained": value}) for value in (False, True))
    assert scratch.schedule.epochs > tuned.schedule.epochs
    assert scratch.optimizer.layer_decay is None


def test_the_task_and_its_settings_are_those_of_the_model(tmp_path: Path) -> None:
    speech = write_speech(tmp_path, copies=1)
    captions = complete_recipe({"model": {"name": "lam_describer_micro"}, "data": {"source": f"grid:{speech}:audio"}})
    assert (captions.task, captions.data.eval_split, captions.data.test_split) == ("captions", "validation", "test")
    assert parse_recipe(captions.to_dict()) == captions
    table = {"model": {"name": "lam_qd_detr_micro"}, "data": {"source": f"grid:{speech}:audio:2-4"}}
    scratch = complete_recipe(table)
    tuned = complete_recipe({**table, "model": {"name": "lam_qd_detr_micro", "pretrained": True}})
    assert (scratch.task, scratch.optimizer.weight_decay, scratch.data.test_split) == ("moments", 1e-4, "test")
    assert scratch.schedule.epochs > tuned.schedule.epochs
    assert scratch.optimizer.lr > tuned.optimizer.lr


def test_clips_of_a_folder_without_splits_are_held_out_by_video(tmp_path: Path) -> None:
    (tmp_path / "features" / "audio").mkdir(parents=True)
    rows = ["video,start,end,caption"]
    for number in range(10):
        (tmp_path / f"v{number}.mp4").touch()
        np.save(tmp_path / "features" / "audio" / f"v{number}.npy", np.ones((10, 4), np.float32))
        rows += [f"v{number},{start},{start + 1},word" for start in (0, 1)]
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    model = {"name": "lam_describer_micro"}
    recipe = complete_recipe({"model": model, "data": {"source": f"videos:{tmp_path}:5", "val_fraction": 0.3}})
    splits, held_out = open_roles(find_task(recipe.task), recipe.data, recipe.run.seed)
    train, validation = (splits[role].video_names() for role in ("train", "validation"))
    assert (len(splits["train"]), len(splits["validation"])) == (14, 6)
    assert validation == held_out and not train & validation
    assert splits["validation"].read(0)["audio"].features.shape == (5, 4)
    again, _ = open_roles(find_task(recipe.task), recipe.data, recipe.run.seed)
    assert again["validation"].video_names() == held_out


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"model": {"name": "lam_vit_micro"}}, "data.source is missing"),
        ({"data": {"source": "here"}}, "model.name is missing"),
        ({"model": 3, "data": {"source": "here"}}, "model.name is missing"),
        ({"model": {"name": "lam_vit_micro"}, "data": {"source": "here"}, "run": 3}, "must be a table"),
        ({"model": {"name": "lam_vit_micro"}, "data": {"source": "nowhere"}}, "neither a data set nor"),
        ({"model": {"name": "lam_vit_micro"}, "data": {"source": "videos:here"}}, "is data for text-video retrieval"),
        (
            {"model": {"name": "lam_vit_micro"}, "data": {"source": "x", "val_fraction": 0.0}},
            "between 0 and 1.*eval_split",
        ),
    ],
)
def test_what_is_wrong_is_named(table: dict[str, Any], message: str) -> None:
    with pytest.raises(LamzooError, match=message):
        complete_recipe(table)


def test_an_unknown_model_is_named_before_the_data_is_opened() -> None:
    with pytest.raises(UnknownModelError, match="did you mean lam_vit_micro"):
        complete_recipe({"model": {"name": "lam_vit_mikro"}, "data": {"source": "nowhere"}})
