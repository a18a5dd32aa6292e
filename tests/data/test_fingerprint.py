"""A fingerprint tells whether data is the same, wherever it is stored, and what has changed in it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lamzoo.data import create_dataset
from lamzoo.data.captions.factory import create_caption_dataset
from lamzoo.data.fingerprint import describe_changes, read_fingerprints, write_fingerprints
from lamzoo.data.moments import create_moment_dataset
from lamzoo.data.retrieval import create_retrieval_dataset
from tests.images import CLASSES, write_folder, write_npz
from tests.training.moment_data import write_qvhighlights
from tests.training.retrieval_data import write_faces

BLUE, GREEN, _ = CLASSES


def rename_class(folder: Path) -> None:
    for split in ("train", "val"):
        (folder / split / BLUE).rename(folder / split / "zebra")


def add_image(folder: Path) -> None:
    shutil.copy(folder / "train" / BLUE / "0.jpg", folder / "train" / BLUE / "7.jpg")


def remove_class(folder: Path) -> None:
    for split in ("train", "val"):
        shutil.rmtree(folder / split / GREEN)


def add_empty_class(folder: Path) -> None:
    (folder / "val" / "absent").mkdir()


def replace_image(folder: Path) -> None:
    with (folder / "train" / BLUE / "0.jpg").open("ab") as file:
        file.write(b"\0")


def rename_image(folder: Path) -> None:
    (folder / "train" / BLUE / "0.jpg").rename(folder / "train" / BLUE / "00.jpg")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rename_class, f"class '{BLUE}' is now 'zebra'"),
        (add_image, f"1 image of class '{BLUE}' was added to train"),
        (remove_class, f"class '{GREEN}' was removed"),
        (replace_image, f"images of class '{BLUE}' in train have files of other sizes"),
        (rename_image, f"images of class '{BLUE}' in train are others"),
    ],
)
def test_a_change_of_images_is_described(tmp_path: Path, change: Callable[[Path], None], said: str) -> None:
    folder = write_folder(tmp_path / "data")

    def prints() -> dict[str, object]:
        return {split: create_dataset(str(folder), split).fingerprint() for split in ("train", "val")}

    before = prints()
    change(folder)
    assert describe_changes(before, prints()) == said


def test_a_class_without_images_counts(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data")
    before = create_dataset(str(folder), "val").fingerprint()
    add_empty_class(folder)
    assert create_dataset(str(folder), "val").fingerprint().differences(before, "val") == ["class 'absent' was added"]


def test_the_order_of_labels_counts(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", splits=())
    files = [f"{name}/{number}.jpg {name}\n" for name in CLASSES for number in range(3)]
    (tmp_path / "labels.txt").write_text("".join(files))
    data = create_dataset(f"imagelist:{folder}:{tmp_path / 'labels.txt'}", "all")
    before = data.fingerprint()
    swapped = [files[0].replace(f" {BLUE}", f" {GREEN}"), *files[1:3], files[3].replace(f" {GREEN}", f" {BLUE}")]
    (tmp_path / "labels.txt").write_text("".join(swapped + files[4:]))
    after = create_dataset(f"imagelist:{folder}:{tmp_path / 'labels.txt'}", "all").fingerprint()
    assert describe_changes({"train": before}, {"train": after})


def images(folder: Path) -> str:
    write_folder(folder)
    return f"imagefolder:{folder}"


def archive(folder: Path) -> str:
    write_npz(folder, "train")
    return f"npz:{folder}"


def videos(folder: Path) -> str:
    folder.mkdir()
    write_faces(folder, copies=1)
    return f"grid:{folder}:face"


def queries(folder: Path) -> str:
    folder.mkdir()
    write_qvhighlights(folder, clip=4, slowfast=4, text=4)
    return f"qvhighlights:{folder}"


def sentences(folder: Path) -> str:
    return videos(folder)


LAYOUTS = [
    (images, create_dataset),
    (archive, create_dataset),
    (videos, create_retrieval_dataset),
    (queries, create_moment_dataset),
    (sentences, create_caption_dataset),
]


@pytest.mark.parametrize(("write", "opener"), LAYOUTS)
def test_data_may_be_moved_and_touched(tmp_path: Path, write: Callable[[Path], str], opener: Callable) -> None:
    spec = write(tmp_path / "a")
    before = opener(spec, "train").fingerprint()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for path in (tmp_path / "b").rglob("*"):
        os.utime(path, (1, 1))
    assert opener(spec.replace(str(tmp_path / "a"), str(tmp_path / "b")), "train").fingerprint() == before
    write_fingerprints(tmp_path, {"train": before})
    assert read_fingerprints(tmp_path) == {"train": before}


def test_a_changed_caption_query_or_feature_counts(tmp_path: Path) -> None:
    spec = videos(tmp_path / "clips")
    lines = tmp_path / "clips" / "captions.jsonl"
    before = [opener(spec, "train").fingerprint() for opener in (create_retrieval_dataset, create_caption_dataset)]
    lines.write_text(lines.read_text().replace("at the left", "on the left"))
    after = [opener(spec, "train").fingerprint() for opener in (create_retrieval_dataset, create_caption_dataset)]
    found = [new.differences(old, "train") for old, new in zip(before, after, strict=True)]
    assert found == [["captions in train are others"], ["clips in train are others"]]

    spec = queries(tmp_path / "moments")
    before = [create_moment_dataset(spec, "train").fingerprint()]
    with (tmp_path / "moments" / "features" / "clip_features" / "v0.npz").open("ab") as file:
        file.write(b"\0")
    found = [create_moment_dataset(spec, "train").fingerprint().differences(before[0], "train")]
    path = tmp_path / "moments" / "highlight_train_release.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    found.append(create_moment_dataset(spec, "train").fingerprint().differences(before[0], "train"))
    assert found == [["features in train have files of other sizes"], ["1 query was removed from train"]]


def test_the_record_of_many_classes_is_small(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", each=20)
    write_fingerprints(tmp_path, {"train": create_dataset(str(folder), "train").fingerprint()})
    record = json.loads((tmp_path / "data.json").read_text())
    assert len(json.dumps(record["train"]["groups"][BLUE])) < 100
