from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lamzoo.data import create_dataset, select, split_off
from lamzoo.errors import ConfigError, DataError
from tests.images import CLASSES, encoded, write_folder, write_npz


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "pictures", splits=(), each=10)


def test_labels_are_those_of_the_items_and_no_image_is_decoded(folder: Path, tmp_path: Path) -> None:
    packed = write_npz(tmp_path / "packed")
    for dataset in (create_dataset(str(folder), "all"), create_dataset(str(packed), "test")):
        assert dataset.labels() == [label for _, label in dataset]
    dataset = create_dataset(str(folder), "all")
    for path in folder.rglob("*.jpg"):
        path.write_text("no image any more")
    assert dataset.labels() == [0] * 10 + [1] * 10 + [2] * 10


def test_labels_outside_the_classes_are_named(folder: Path) -> None:
    dataset = create_dataset(str(folder), "all")
    dataset.classes = CLASSES[:2]
    with pytest.raises(DataError, match=r"red/0\.jpg is 2, which is not one of the 2 classes"):
        dataset.labels()


def test_a_selection_keeps_names_classes_and_transforms(folder: Path) -> None:
    dataset = create_dataset(str(folder), "all")
    dataset.transform = lambda picture: picture.size
    part = select(select(dataset, [29, 3, 12]), [2, 0])
    assert [part.filename(index) for index in range(2)] == [dataset.filename(12), dataset.filename(29)]
    assert [part[0], part[1]] == [((32, 32), 1), ((32, 32), 2)]
    assert (part.classes, part.spec, part.labels()) == (CLASSES, dataset.spec, [1, 2])
    with pytest.raises(DataError, match="no image 30; it has 30"):
        select(dataset, [30])
    with pytest.raises(DataError, match="has no image"):
        select(dataset, [])


def test_a_split_takes_the_same_share_of_every_class_and_leaves_the_rest(folder: Path) -> None:
    dataset = create_dataset(str(folder), "all")
    train, validation = split_off(dataset, 0.2, seed=1)
    assert (train.split, validation.split) == ("train", "validation")
    assert validation.labels() == [0, 0, 1, 1, 2, 2]
    names = [part.filename(index) for part in (train, validation) for index in range(len(part))]
    assert sorted(names) == sorted(dataset.filename(index) for index in range(30))


def test_a_split_depends_on_its_seed_alone(folder: Path) -> None:
    def held_out(seed: int) -> list[str]:
        _, part = split_off(create_dataset(str(folder), "all"), 0.3, seed)
        return [part.filename(index) for index in range(len(part))]

    assert held_out(5) == held_out(5)
    assert held_out(5) != held_out(6)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_a_split_holds_out_the_images_that_a_search_for_each_class_finds(folder: Path, fraction: float) -> None:
    shuffled = np.random.default_rng(7).permutation(30).tolist()
    dataset = select(create_dataset(str(folder), "all"), [index for index in shuffled if not 1 <= index < 10])
    labels = np.asarray(dataset.labels())  # one image of the first class, ten of the others
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels)[1:]:  # as of 0.1.0
        members = np.flatnonzero(labels == label)
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held_out[np.random.default_rng((3, label)).permutation(members)[:count]] = True
    train, validation = split_off(dataset, fraction, 3)
    for part, chosen in ((train, ~held_out), (validation, held_out)):
        names = [part.filename(index) for index in range(len(part))]
        assert names == [dataset.filename(index) for index in np.flatnonzero(chosen)]


def test_small_classes_give_one_image_and_a_single_image_stays_in_training(tmp_path: Path) -> None:
    for name, count in (("one", 1), ("three", 3), ("two", 2)):
        (tmp_path / name).mkdir()
        for number in range(count):
            (tmp_path / name / f"{number}.jpg").write_bytes(encoded(0, number))
    train, validation = split_off(create_dataset(str(tmp_path), "all"), 0.1)
    assert train.labels() == [0, 1, 1, 2]
    assert validation.labels() == [1, 2]
    _, most = split_off(create_dataset(str(tmp_path), "all"), 0.99)
    assert most.labels() == [1, 1, 2]


def test_a_split_that_cannot_be_made_is_refused(tmp_path: Path, folder: Path) -> None:
    dataset = create_dataset(str(folder), "all")
    with pytest.raises(ConfigError, match=r"is 1\.0; it must be between 0 and 1"):
        split_off(dataset, 1.0)
    with pytest.raises(ConfigError, match="seed is -1"):
        split_off(dataset, 0.1, -1)
    with pytest.raises(DataError, match="no class of .* has two images"):
        split_off(select(dataset, [0, 10, 20]), 0.5)


def test_selected_images_are_read_as_stored(folder: Path) -> None:
    picture, label = select(create_dataset(str(folder), "all"), [0]).decode(0)
    assert isinstance(picture, Image.Image)
    assert label == 0
