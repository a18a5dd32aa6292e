"""A run's own validation split: stored, made again, and refused where its images have changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamzoo.data import create_dataset, select
from lamzoo.data.trained import MadeSplit, TrainedData, _place, open_scored
from lamzoo.errors import DataError, MissingSplitError
from tests.images import CLASSES, encoded, write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "photos", splits=(), each=8)


def stored(folder: Path, run: Path) -> tuple[list[str], list[str]]:
    """Splits the folder without its third image as a run does, and returns the file names of both parts."""
    whole = create_dataset(str(folder), "all")
    usable = select(whole, [index for index in range(len(whole)) if index != 2])
    *parts, made = MadeSplit.make(usable, 0.25, 7, [2])
    made.write(run)
    (run / "recipe.json").write_text(f'{{"data": {{"source": "{folder}"}}}}')
    train, validation = ([part.filename(index) for index in range(len(part))] for part in parts)
    return train, validation


def names(spec: str, split: str | None, run: Path) -> list[str]:
    dataset = open_scored(spec, split, TrainedData.read(run))
    return [dataset.filename(index) for index in range(len(dataset))]


def test_the_same_images_are_held_out_again(folder: Path, tmp_path: Path) -> None:
    train, validation = stored(folder, tmp_path)
    assert len(train) + len(validation) == 23
    assert names(str(folder), "val", tmp_path) == names(str(folder), None, tmp_path) == validation
    assert names(str(folder), "train", tmp_path) == train
    assert names(f"imagefolder:{folder}", "validation", tmp_path / "model") == validation  # written in another way


@pytest.mark.parametrize("spec", ["videos:clips", "imagelist:clips:names.txt", "videos:clips:0.5", "clips"])
def test_data_are_known_by_each_spelling_of_their_path(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "names.txt").touch()
    monkeypatch.chdir(tmp_path)
    others = [spec.replace("clips", place) for place in ("./clips", "clips/../clips", str(tmp_path / "clips"))]
    assert {_place(other) for other in others} == {_place(spec)}
    assert _place(spec.replace("clips", "other")) != _place(spec)


@pytest.mark.parametrize("split", ["test", "bogus"])
def test_the_parts_of_a_run_are_named_where_there_is_no_such_split(folder: Path, tmp_path: Path, split: str) -> None:
    stored(folder, tmp_path)
    way_out = f"no split '{split}': the run split it into 'train' and 'validation'; use one of these, or 'all' for both"
    with pytest.raises(MissingSplitError, match=way_out):
        names(str(folder), split, tmp_path)
    assert len(names(str(folder), "all", tmp_path)) == 24


def test_other_data_without_splits_are_scored_whole(folder: Path, tmp_path: Path) -> None:
    _, validation = stored(folder, tmp_path)
    other = write_folder(tmp_path / "other", splits=(), each=8)  # its files have the same names
    assert len(names(f"imagefolder:{other}", None, tmp_path)) == 24
    assert names(f"imagefolder:{folder}/../photos", None, tmp_path) == [
        name.replace("photos", "photos/../photos") for name in validation
    ]


def test_data_that_moved_are_known_again(folder: Path, tmp_path: Path) -> None:
    _, validation = stored(folder, tmp_path)
    moved = folder.rename(tmp_path / "moved")
    assert [Path(name).relative_to(moved) for name in names(str(moved), "val", tmp_path)] == [
        Path(name).relative_to(folder) for name in validation
    ]


def test_other_images_are_refused(folder: Path, tmp_path: Path) -> None:
    stored(folder, tmp_path)
    (folder / CLASSES[0] / "new.jpg").write_bytes(encoded(0, 99))
    with pytest.raises(DataError, match="have changed since the run split them"):
        names(str(folder), "val", tmp_path)


def test_splits_that_the_data_have_win_over_those_of_a_run_on_other_data(folder: Path, tmp_path: Path) -> None:
    stored(folder, tmp_path)
    other = write_folder(tmp_path / "other", splits=("val", "test"))
    assert len(names(str(other), "val", tmp_path)) == 9
    assert "other/test" in names(str(other), None, tmp_path)[0]


def test_a_folder_that_is_no_runs_has_no_split(tmp_path: Path) -> None:
    assert TrainedData.read(tmp_path) is None


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("recipe.json", "[]", "recipe.json is not the recipe of a run"),
        ("recipe.json", '{"data": {"source": 5}}', "source is 5"),
        ("held-out.json", '{"a": 1}', "held_out is"),
        ("held-out.json", "[1]", "held_out is 1"),
        ("split.json", "[]", "is not a record of a run's split"),
        ("split.json", '{"split": null, "fraction": "x", "seed": 0, "left_out": [], "sha256": ""}', "fraction is"),
    ],
)
def test_a_damaged_record_of_a_run_is_named(tmp_path: Path, file: str, text: str, says: str) -> None:
    (tmp_path / "recipe.json").write_text('{"data": {"source": "photos"}}')
    (tmp_path / file).write_text(text)
    with pytest.raises(DataError, match=says):
        TrainedData.read(tmp_path)
