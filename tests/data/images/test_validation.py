from pathlib import Path

import pytest
import torch

from lamzoo.data import BadInput, create_dataset, find_invalid_images, set_aside_invalid
from lamzoo.errors import ConfigError, DataError
from tests.images import CLASSES, write_folder, write_npz


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two of nine images are broken: blue's first and red's second."""
    root = write_folder(tmp_path / "pictures", splits=())
    (root / "blue" / "0.jpg").write_bytes(b"")
    whole = (root / "red" / "1.jpg").read_bytes()
    (root / "red" / "1.jpg").write_bytes(whole[: len(whole) // 2])
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_a_scan_names_each_bad_image_and_why(folder: Path, workers: int) -> None:
    dataset = create_dataset(str(folder), "all")
    dataset.transform = lambda picture: 1 / 0  # a scan does not use it
    seen: list[tuple[int, int]] = []
    bad = find_invalid_images(dataset, workers=workers, progress=lambda done, total: seen.append((done, total)))
    assert [(image.index, image.filename) for image in bad] == [
        (0, str(folder / "blue" / "0.jpg")),
        (7, str(folder / "red" / "1.jpg")),
    ]
    assert bad[0].reason == "it is not an image in a format that Pillow supports"
    assert "truncated" in bad[1].reason.lower()
    assert seen[-1] == (9, 9)


def test_a_scan_finds_files_that_went_away_and_labels_that_are_none(folder: Path) -> None:
    dataset = create_dataset(str(folder), "all")
    dataset.classes = CLASSES[:2]
    (folder / "green" / "2.jpg").unlink()
    reasons = {image.index: image.reason for image in find_invalid_images(dataset)}
    assert reasons[5] == "No such file or directory"
    assert "is 2, which is not one of the 2 classes" in reasons[6]
    assert set(reasons) == {0, 5, 6, 7, 8}


def test_a_scan_leaves_the_random_state_alone(folder: Path) -> None:
    before = torch.random.get_rng_state()
    find_invalid_images(create_dataset(str(folder), "all"), workers=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_stop_names_the_first_files_and_how_many(folder: Path) -> None:
    with pytest.raises(DataError, match=r"2 of the 9 images of .* cannot be used: ") as caught:
        set_aside_invalid(create_dataset(str(folder), "all"), "stop")
    assert str(folder / "blue" / "0.jpg") in str(caught.value)
    assert "--on-bad-input skip" in str(caught.value)
    for path in folder.rglob("*.jpg"):
        path.write_text("nothing")
    with pytest.raises(DataError, match="and 6 more"):
        set_aside_invalid(create_dataset(str(folder), "all"), "stop")


def test_skip_goes_on_with_the_rest(folder: Path) -> None:
    kept, bad = set_aside_invalid(create_dataset(str(folder), "all"), "skip")
    assert (len(kept), len(bad)) == (7, 2)
    assert kept.labels() == [0, 0, 1, 1, 1, 2, 2]
    assert find_invalid_images(kept) == []


def test_whole_data_are_returned_as_they_are(tmp_path: Path) -> None:
    dataset = create_dataset(str(write_npz(tmp_path / "packed")), "test")
    assert set_aside_invalid(dataset, "stop") == (dataset, [])


def test_a_class_that_would_lose_its_last_image_is_named(folder: Path) -> None:
    for path in (folder / "red").iterdir():
        path.write_text("nothing")
    dataset = create_dataset(str(folder), "all")
    with pytest.raises(DataError, match="no valid image is left of the class 'red'"):
        set_aside_invalid(dataset, "skip")
    kept, bad = set_aside_invalid(dataset, "skip", every_class=False)
    assert kept.labels() == [0, 0, 1, 1, 1]
    assert isinstance(bad[0], BadInput)


def test_nothing_left_is_an_error(folder: Path) -> None:
    for path in folder.rglob("*.jpg"):
        path.write_text("nothing")
    with pytest.raises(DataError, match="none of the 9 images"):
        set_aside_invalid(create_dataset(str(folder), "all"), "skip", every_class=False)


def test_impossible_arguments_are_named(folder: Path) -> None:
    dataset = create_dataset(str(folder), "all")
    with pytest.raises(ConfigError, match="on_bad is 'ignore'"):
        set_aside_invalid(dataset, "ignore")
    with pytest.raises(ConfigError, match="workers is -1"):
        find_invalid_images(dataset, workers=-1)
