"""Splits are made where they are missing, and what can't be read is found before the first epoch."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from lamzoo.data.trained import MadeSplit
from lamzoo.errors import DataError, MissingSplitError, RecipeError
from lamzoo.training import Progress, parse_recipe, train
from lamzoo.training.recipe import DataSection
from lamzoo.training.splits import Splits, open_splits, prepare_splits
from tests.images import CLASSES, write_folder


def prepared(source: Path, seed: int = 0, **data: Any) -> Splits:
    section = DataSection(f"imagefolder:{source}", **data)
    return prepare_splits(section, open_splits(section), seed, Accelerator(cpu=True))


def names(dataset: Any) -> list[str]:
    return [dataset.filename(index) for index in range(len(dataset))]


def test_a_folder_without_splits_is_split_by_class(tmp_path: Path) -> None:
    splits = prepared(write_folder(tmp_path / "data", splits=(), each=10), val_fraction=0.2)
    assert splits.made is not None
    assert sorted(splits.evaluation.labels()) == sorted([0, 1, 2] * 2)
    assert len(splits.train) == 24
    assert not set(names(splits.train)) & set(names(splits.evaluation))


def test_the_split_depends_on_the_seed_alone(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", splits=("train", "test"), each=10)
    first, again, other = (prepared(folder, seed, val_fraction=0.2) for seed in (0, 0, 1))
    assert names(first.evaluation) == names(again.evaluation) != names(other.evaluation)


def test_a_validation_split_that_is_there_is_taken(tmp_path: Path) -> None:
    splits = prepared(write_folder(tmp_path / "data", splits=("train", "val")), val_fraction=0.5)
    assert splits.made is None
    assert splits.evaluation.split == "val"
    assert len(splits.train) == 9


def test_without_a_fraction_a_missing_split_is_an_error(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", splits=("train", "test"))
    with pytest.raises(MissingSplitError, match="no split 'validation'"):
        open_splits(DataSection(str(folder)))
    with pytest.raises(RecipeError, match="use the same images for training and scoring .* or set data.val_fraction"):
        open_splits(DataSection(str(write_folder(tmp_path / "flat", splits=()))))


def test_testing_on_the_training_images_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", splits=())
    with pytest.raises(RecipeError, match="use the same images for training and scoring"):
        open_splits(DataSection(str(folder), val_fraction=0.2, test_split="all"))
    with pytest.raises(MissingSplitError, match="no split 'test'"):
        open_splits(DataSection(str(folder), val_fraction=0.2, test_split="test"))


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A folder in which a training and a validation image can't be read."""
    folder = write_folder(tmp_path / "data ü", each=8)
    for name in ("train/red/1.jpg", "val/blue/0.jpg"):
        (folder / name.replace("red", CLASSES[0]).replace("blue", CLASSES[1])).write_bytes(b"")
    return folder


def table(recipe_table: dict[str, Any], source: Path, **data: Any) -> dict[str, Any]:
    recipe_table["schedule"]["epochs"] = 1
    return {**recipe_table, "data": {"source": f"imagefolder:{source}", **data}}


def test_bad_images_stop_the_run_before_it_leaves_anything(
    recipe_table: dict[str, Any], broken: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"1 of the 24 images .* cannot be used: .*1\.jpg .*--on-bad-input skip"):
        train(parse_recipe(table(recipe_table, broken)))
    assert not (tmp_path / "run").exists()


def test_bad_images_are_left_out_and_listed(recipe_table: dict[str, Any], broken: Path) -> None:
    seen = []
    recipe = parse_recipe(table(recipe_table, broken, on_bad_input="skip"))
    result = train(recipe, scanning=lambda split, done, total: seen.append((split, done, total)))
    assert result.left_out == 2
    assert len(result.scores["val"].labels) == 23
    rows = list(csv.DictReader((result.output / "bad-inputs.csv").open(encoding="utf-8")))
    assert [(row["split"], Path(row["file"]).name) for row in rows] == [("train", "1.jpg"), ("val", "0.jpg")]
    assert all(row["reason"] for row in rows)
    assert ("train", 24, 24) in seen and ("validation", 24, 24) in seen


def test_without_a_scan_nothing_is_read_beforehand(recipe_table: dict[str, Any], broken: Path) -> None:
    seen: list[Any] = []
    with pytest.raises(DataError, match=r"\.jpg"):  # from the loader, in the middle of the epoch
        train(parse_recipe(table(recipe_table, broken, scan=False)), scanning=lambda *args: seen.append(args))
    assert not seen


@pytest.mark.parametrize("scan", [True, False])
def test_missing_images_are_found_with_and_without_a_scan(tmp_path: Path, scan: bool) -> None:
    folder = write_folder(tmp_path / "data", splits=("train", "val"))
    missing = folder / "train" / "red" / "0.jpg"
    missing.unlink()
    missing.symlink_to("/nowhere")
    with pytest.raises(DataError, match=r"1 of the 9 images .*red/0\.jpg \(it is a link that leads nowhere\); replace"):
        prepared(folder, scan=scan)
    splits = prepared(folder, scan=scan, on_bad_input="skip")
    assert str(missing) not in names(splits.train)
    assert [(role, image.filename) for role, image in splits.bad] == [("train", str(missing))]


def test_a_run_that_left_no_checkpoint_does_not_hold_its_folder(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    def kill(progress: Progress) -> None:
        raise KeyboardInterrupt

    recipe_table = table(recipe_table, write_folder(tmp_path / "data", splits=(), each=8), val_fraction=0.25)
    with pytest.raises(KeyboardInterrupt):
        train(parse_recipe(recipe_table), progress=kill)
    recipe_table["run"]["seed"] = 1
    result = train(parse_recipe(recipe_table))
    made = MadeSplit.read(result.output)
    assert made is not None and made.seed == 1


@pytest.mark.slow
def test_two_processes_leave_out_and_split_off_the_same(
    recipe_table: dict[str, Any], broken: Path, tmp_path: Path
) -> None:
    recipe_table = table(recipe_table, broken / "train", on_bad_input="skip", val_fraction=0.25)
    recipe_table["run"] |= {"batch_size": 4, "report": True}
    one = train(parse_recipe(recipe_table))
    recipe_table["run"]["output"] = str(tmp_path / "two")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe_table))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, "-m", "lamzoo", "train", str(tmp_path / "recipe.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the model is") == 1
    two = tmp_path / "two"
    assert (two / "bad-inputs.csv").read_text() == (one.output / "bad-inputs.csv").read_text()
    reports = [json.loads((folder / "report" / "report.json").read_text()) for folder in (one.output, two)]
    (first,), (second,) = (report["scores"].values() for report in reports)
    assert first["confusion"] == second["confusion"]
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)
