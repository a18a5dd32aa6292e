"""Folders whose entries can't all be read, or lead back to themselves: nothing is lost or counted twice unsaid."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lamzoo.data import create_dataset, find_images, paths, set_aside_invalid
from lamzoo.data.paths import expand_wildcards, file_exists, list_files, visible
from lamzoo.errors import DataError
from tests.images import encoded

JPEG = frozenset({".jpg"})


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root reads every folder, so the effective user becomes another one meanwhile."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def root() -> Iterator[Path]:
    """A folder that other users may enter; those of tmp_path are private."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    for place, folders, _ in os.walk(folder):
        for name in folders:
            if not Path(place, name).is_symlink():
                Path(place, name).chmod(0o777)
    shutil.rmtree(folder)


def photos(*paths: Path) -> None:
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(0, number))


def test_a_class_folder_that_cannot_be_listed_stops_or_is_left_out(root: Path) -> None:
    photos(root / "cat" / "a.jpg", root / "dog" / "a.jpg", root / "dog" / "b.jpg")
    (root / "cat").chmod(0)
    with without_privileges():
        dataset = create_dataset(f"imagefolder:{root}", "all")
        assert (dataset.classes, dataset.labels()) == (["cat", "dog"], [0, 1, 1])
        with pytest.raises(DataError, match=rf"1 of the 3 images .*: {root}/cat \(its files cannot be listed \(Perm"):
            set_aside_invalid(dataset, "stop", every_class=False)
        kept, bad = set_aside_invalid(dataset, "skip", every_class=False)
        with pytest.raises(DataError, match=rf"cannot read the image {root}/cat: its files cannot be listed"):
            dataset[0]
    assert (kept.labels(), [image.filename for image in bad]) == ([1, 1], [str(root / "cat")])


def test_a_folder_of_classes_that_cannot_be_listed_is_refused(root: Path) -> None:
    photos(root / "train" / "cat" / "a.jpg", root / "val" / "dog" / "a.jpg")
    (root / "train").chmod(0)
    with without_privileges(), pytest.raises(DataError, match=rf"cannot read the folder {root}/train"):
        create_dataset(f"imagefolder:{root}", "val")


def test_a_folder_below_one_that_cannot_be_entered_is_not_called_missing(root: Path) -> None:
    photos(root / "closed" / "photos" / "a.jpg")
    (root / "closed").chmod(0)
    with without_privileges():
        for call in (lambda path: find_images([path]), lambda path: create_dataset(str(path), "all"), file_exists):
            with pytest.raises(DataError, match=rf"cannot access {root}/closed/photos: Permission denied"):
                call(root / "closed" / "photos")
        with pytest.raises(DataError, match=rf"cannot read the folder {root}/closed"):
            visible(root / "closed")
        with pytest.raises(DataError, match="cannot read the folder"):
            expand_wildcards(f"{root}/*/*.tar")


def test_links_that_lead_back_count_no_photo_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    photos(tmp_path / "train" / "cat" / "a.jpg", tmp_path / "train" / "dog" / "b.jpg")
    (tmp_path / "train" / "cat" / "loop").symlink_to(tmp_path / "train" / "cat")
    (tmp_path / "train" / "dog" / "up").symlink_to("..")
    with caplog.at_level(logging.WARNING):
        dataset = create_dataset(f"imagefolder:{tmp_path}", "train")
    assert (len(dataset), dataset.labels()) == (2, [0, 1])
    assert ("loop" in caplog.text, "up" in caplog.text) == (True, True)


def test_a_folder_counts_once_in_each_class_that_links_to_it(tmp_path: Path) -> None:
    photos(tmp_path / "shared" / "a.jpg", tmp_path / "data" / "cat" / "b.jpg")
    (tmp_path / "data" / "dog").mkdir()
    for link in ("cat/one", "cat/two", "dog/one"):
        (tmp_path / "data" / link).symlink_to(tmp_path / "shared")
    dataset = create_dataset(f"imagefolder:{tmp_path / 'data'}", "all")
    assert dataset.labels() == [0, 0, 1]


def test_a_folder_is_listed_under_its_own_path_rather_than_that_of_a_link(tmp_path: Path) -> None:
    photos(tmp_path / "b" / "c" / "a.jpg")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    assert list_files(tmp_path, JPEG).files == [tmp_path / "b" / "c" / "a.jpg"]


def test_many_links_to_folders_are_followed_in_natural_order_and_sorted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    for number in range(40):
        outside = tmp_path / f"outside{number}"
        outside.mkdir()
        (outside / "a.jpg").write_bytes(b"")
        (tmp_path / "data" / f"link{number}").symlink_to(outside)
        (tmp_path / "data" / f"more{number}").symlink_to(outside)
    keys: list[str] = []
    natural_key = paths.natural_key
    monkeypatch.setattr(paths, "natural_key", lambda text: keys.append(text) or natural_key(text))
    assert list_files(tmp_path / "data", {".jpg"}).files == [
        tmp_path / "data" / f"link{number}" / "a.jpg" for number in range(40)
    ]
    assert len(keys) == 80 + 40


def test_broken_links_pipes_and_circles_are_named_and_opened_by_nobody(tmp_path: Path) -> None:
    photos(tmp_path / "a.jpg")
    (tmp_path / "gone").symlink_to("/nowhere")  # a drive that is not mounted
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pipe.jpg")
    os.mkfifo(tmp_path / "pipe.txt")
    files, lost = list_files(tmp_path, JPEG)
    assert [path.name for path in files] == ["a.jpg", "circle", "gone", "pipe.jpg"]
    assert {path.name: reason for path, reason in lost.items()} == {
        "gone": "it is a link that leads nowhere",
        "circle": "Too many levels of symbolic links",
        "pipe.jpg": "it is a pipe, socket or device, not a regular file",
    }


def test_a_broken_link_that_may_be_a_class_is_refused(tmp_path: Path) -> None:
    photos(tmp_path / "dog" / "a.jpg")
    (tmp_path / "cat").symlink_to("/nowhere")  # without it, the labels would shift
    with pytest.raises(DataError, match=f"{tmp_path}/cat is a link that leads nowhere"):
        create_dataset(f"imagefolder:{tmp_path}", "all")


def test_listed_images_without_a_file_stop_or_are_left_out(tmp_path: Path) -> None:
    photos(tmp_path / "photos" / "a.jpg", tmp_path / "photos" / "b.jpg", tmp_path / "outside.jpg")
    (tmp_path / "list.csv").write_text("file,label\na.jpg,cat\n../outside.jpg,dog\nb.jpg,dog\nc/d.jpg,owl\n")
    dataset = create_dataset(f"imagelist:{tmp_path / 'photos'}:{tmp_path / 'list.csv'}", "all")
    assert (dataset.labels(), dataset.classes) == ([0, 1, 1, 2], ["cat", "dog", "owl"])
    with pytest.raises(DataError, match=r"2 of the 4 images .*outside.jpg \(there is no .*d.jpg \(there is no such"):
        set_aside_invalid(dataset, "stop")
    kept, bad = set_aside_invalid(dataset, "skip", every_class=False)
    assert (kept.labels(), [image.index for image in bad]) == ([0, 1], [2, 3])


def test_missing_images_of_imagenet_are_named_by_their_number(tmp_path: Path) -> None:
    photos(tmp_path / "val" / "ILSVRC2012_val_00000002.JPEG")
    (tmp_path / "labels.txt").write_text("n01\nn02\nn03\n")
    dataset = create_dataset(f"imagelist:{tmp_path / 'val'}:{tmp_path / 'labels.txt'}", "all")
    assert [Path(image.filename).name for image in dataset.lost] == [
        "ILSVRC2012_val_00000001.JPEG",
        "ILSVRC2012_val_00000003.JPEG",
    ]
