import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lamzoo.data import create_dataset, find_invalid_images, plain_worker_errors
from lamzoo.errors import DataError, MissingSplitError
from tests.images import CLASSES, COLOURS, encoded, image, write_folder, write_npz
from tests.shards import write_shard


def assert_colours(dataset, classes=CLASSES) -> None:
    """Each image has the colour that its label says."""
    assert dataset.classes == classes
    for picture, label in (dataset[index] for index in range(len(dataset))):
        assert isinstance(picture, Image.Image)
        assert picture.mode == "RGB"
        mean = np.asarray(picture).mean(axis=(0, 1))
        assert np.abs(mean - COLOURS[classes[label]]).max() < 25


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "pictures")


def test_image_folder_gives_each_class_its_label(folder: Path) -> None:
    dataset = create_dataset(f"imagefolder:{folder}", "train")
    assert_colours(dataset)
    assert len(dataset) == 9
    assert dataset.split == "train"
    assert dataset.filename(0) == str(folder / "train" / "blue" / "0.jpg")


def test_image_folder_labels_are_timms(folder: Path) -> None:
    from timm.data import create_dataset as timms

    for name in ("class2", "class10", "Class1"):
        (folder / "train" / name).mkdir()
        (folder / "train" / name / "a.png").write_bytes(encoded(0, 0, "PNG"))
    ours = create_dataset(str(folder), "train")
    theirs = timms("", root=str(folder / "train"), search_split=False)
    assert {name: label for label, name in enumerate(ours.classes)} == theirs.reader.class_to_idx
    assert [ours[i][1] for i in range(len(ours))] == [theirs[i][1] for i in range(len(theirs))]


def test_a_class_without_test_images_shifts_no_label(folder: Path) -> None:
    for path in (folder / "val" / "blue").iterdir():
        path.unlink()
    (folder / "val" / "blue").rmdir()
    dataset = create_dataset(f"imagefolder:{folder}", "val")
    assert_colours(dataset)
    assert {label for _, label in dataset} == {1, 2}


def test_a_class_without_training_images_is_named(folder: Path) -> None:
    for name in ("yellow", "violet"):
        (folder / "val" / name).mkdir()
        (folder / "val" / name / "a.jpg").write_bytes(encoded(0, 0))
    (folder / "train" / "violet").mkdir()
    with pytest.raises(DataError, match="no training image of the class 'violet', 'yellow'"):
        create_dataset(str(folder), "train")
    assert len(create_dataset(str(folder), "val").classes) == 5


def test_names_with_blanks_and_beyond_ascii_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "Größe und Maß" / "été d'août"
    folder.mkdir(parents=True)
    (folder / "写真 1 (copy).jpg").write_bytes(encoded(0, 0))
    dataset = create_dataset(f"imagefolder:{tmp_path / 'Größe und Maß'}", "all")
    assert dataset.classes == ["été d'août"]
    assert dataset[0][1] == 0
    assert dataset.filename(0).endswith("写真 1 (copy).jpg")


def test_image_folder_without_splits_is_taken_whole(tmp_path: Path) -> None:
    dataset = create_dataset(str(write_folder(tmp_path / "p", splits=())), "all")
    assert_colours(dataset)
    assert dataset.split is None


def tar(root: Path) -> str:
    with tarfile.open(root / "val-0.tar", "w") as archive:
        for name, content in (("x.jpg", encoded(0, 0)), ("x.cls", b"0")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return f"wds:{root}/val-*.tar"


def listed(root: Path) -> str:
    (root / "val").mkdir()
    (root / "val" / "a.jpg").write_bytes(encoded(0, 0))
    (root / "labels.txt").write_text("a.jpg 0\n")
    return f"imagelist:{root / 'val'}:{root / 'labels.txt'}"


@pytest.mark.parametrize("write", [lambda root: str(write_folder(root, splits=())), tar, listed])
@pytest.mark.parametrize("split", ["val", "train", "test"])
def test_a_split_of_data_without_splits_is_an_error(tmp_path: Path, write: Callable[[Path], str], split: str) -> None:
    spec = write(tmp_path)
    with pytest.raises(MissingSplitError, match=f"no split '{split}', since it has no splits; use the split 'all'"):
        create_dataset(spec, split)
    assert create_dataset(spec, "all").split is None


def test_npz_reads_the_layout_and_a_bare_folder_is_recognised(tmp_path: Path) -> None:
    root = write_npz(tmp_path / "packed")
    for spec in (f"npz:{root}", str(root)):
        dataset = create_dataset(spec, "test")
        assert_colours(dataset)
        assert dataset.filename(4) == f"{root / 'test.npz'}[4]"


def test_npz_classes_may_be_pairs_or_absent(tmp_path: Path) -> None:
    root = write_npz(tmp_path / "packed")
    (root / "classes.json").write_text(json.dumps([[f"n{i}", name] for i, name in enumerate(CLASSES)]))
    assert create_dataset(f"npz:{root}", "test").classes == CLASSES
    (root / "classes.json").unlink()
    assert create_dataset(f"npz:{root}", "test").classes is None


@pytest.mark.parametrize("pattern", ["val-*.tar", "val-{00..01}.tar", "{split}-{00,01}.tar"])
def test_webdataset_shards_as_webdataset_writes_them(tmp_path: Path, pattern: str) -> None:
    webdataset = pytest.importorskip("webdataset")
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"val-{shard:02}.tar")) as writer:
            for label in range(3):
                key = f"sample{shard}.{label}".replace(".", "_")
                writer.write({"__key__": key, "png": image(label, shard), "cls": label})
    (tmp_path / "classnames.txt").write_text("\n".join(CLASSES))
    dataset = create_dataset(f"wds:{tmp_path}/{pattern}", "validation" if "{split}" in pattern else "all")
    assert len(dataset) == 6
    assert dataset.labels() == [0, 1, 2] * 2
    assert_colours(dataset)
    assert_colours(pickle.loads(pickle.dumps(dataset)))  # as for workers that are spawned


def write_mnist(root: Path) -> Path:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 4), ("t10k", 2)):
        pixels = np.full((count, 28, 28), 200, np.uint8)
        header = b"\0\0\x08\x03" + np.array(pixels.shape, ">i4").tobytes()
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = np.arange(count, dtype=np.uint8)
        header = b"\0\0\x08\x01" + np.array(labels.shape, ">i4").tobytes()
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return root


def test_torchvision_data_set_on_disk(tmp_path: Path) -> None:
    root = write_mnist(tmp_path)
    dataset = create_dataset(f"torchvision:MNIST:{root}", "test")
    assert dataset.labels() == [0, 1]
    picture, label = dataset[1]
    assert (picture.mode, picture.size, label) == ("RGB", (28, 28), 1)
    assert len(dataset.classes) == 10
    assert len(create_dataset(f"torchvision:mnist:{root}", "training")) == 4


def test_torchvision_data_set_with_named_splits(tmp_path: Path) -> None:
    for split in ("train", "val"):
        path = tmp_path / "imagenette2" / split / "n01440764" / "a.jpeg"
        path.parent.mkdir(parents=True)
        path.write_bytes(encoded(0, 0))
    dataset = create_dataset(f"torchvision:Imagenette:{tmp_path}", "validation")
    assert dataset.split == "val"
    assert dataset.labels() == [0]
    assert dataset.classes[dataset[0][1]].startswith("tench")
    with pytest.raises(DataError, match="no split 'test'"):
        create_dataset(f"torchvision:Imagenette:{tmp_path}", "test")


def test_hugging_face_data_set_from_disk_and_from_a_folder(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    rows = {"img": [image(label, 0) for label in range(3)], "label": [0, 1, 2]}
    whole = datasets.DatasetDict({"test": datasets.Dataset.from_dict(rows, features=features)})
    whole.save_to_disk(tmp_path / "saved")
    assert_colours(create_dataset(f"hfds:{tmp_path / 'saved'}", "test"))
    assert create_dataset(f"hfds:{tmp_path / 'saved'}", "test").labels() == [0, 1, 2]
    with pytest.raises(DataError, match="no split 'train'; it has 'test'"):
        create_dataset(f"hfds:{tmp_path / 'saved'}", "train")
    state = tmp_path / "saved" / "test" / "state.json"
    state.write_text(state.read_text().replace('"data-', '"../test/data-'))
    with pytest.raises(DataError, match="state.json has no list _data_files of names inside its folder"):
        create_dataset(f"hfds:{tmp_path / 'saved'}", "test")
    dataset = create_dataset(f"hfds:{folder}", "val")
    assert dataset.split == "validation"
    assert_colours(dataset)
    (folder / "val" / "lost").symlink_to("nowhere")  # which load_dataset would leave out
    with pytest.raises(DataError, match=r"cannot read .*lost of hfds:.*: it is a link that leads nowhere"):
        create_dataset(f"hfds:{folder}", "val")


def test_a_hugging_face_row_without_an_image_is_invalid(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    rows = {"image": [image(0, 0), None, {"bytes": b"", "path": ""}], "label": [0, 1, 2]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    dataset = create_dataset(f"hfds:{tmp_path / 'saved'}", "all")
    with pytest.raises(DataError, match=r"\[1\] has neither image bytes nor a file: there is no image in this row"):
        dataset[1]
    invalid = find_invalid_images(dataset)
    assert [(image.index, image.reason) for image in invalid] == [
        (1, "there is no image in this row"),
        (2, "there is no image in this row"),
    ]


def test_splits_go_by_their_synonyms_but_validation_is_not_test(folder: Path) -> None:
    assert create_dataset(str(folder), "validation").split == "val"
    assert create_dataset(str(folder), "training").split == "train"
    with pytest.raises(DataError, match="no split 'test'; it has 'train', 'val'"):
        create_dataset(str(folder), "test")


def test_transforms_are_applied(folder: Path) -> None:
    dataset = create_dataset(str(folder), "train")
    dataset.transform = lambda picture: torch.tensor(picture.size)
    dataset.target_transform = lambda label: -label
    assert dataset[8][0].tolist() == [32, 32]
    assert dataset[8][1] == -2


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:500]), "(?i)truncated"),
        (lambda path: path.write_text("I am a text"), "not an image in a format"),
        (lambda path: path.write_bytes(b""), "not an image in a format"),
        (lambda path: path.unlink(), "No such file"),
    ],
    ids=["truncated", "text", "empty", "gone"],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_and_never_replaced(folder: Path, damage, reason: str, workers: int) -> None:
    dataset = create_dataset(str(folder), "val")
    path = folder / "val" / "green" / "1.jpg"
    damage(path)
    dataset.transform = lambda picture: 0
    with pytest.raises(DataError, match=reason) as caught, plain_worker_errors():
        list(DataLoader(dataset, 4, num_workers=workers))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_message_with_a_line_end_in_a_name_stays_whole() -> None:
    with pytest.raises(DataError, match=r"^a/x\ny\.jpg: it is no image$"), plain_worker_errors():
        raise DataError("a/x\ny.jpg: it is no image")


def test_a_truncated_image_in_an_npz_is_named_by_its_index(tmp_path: Path) -> None:
    first, second = encoded(0, 0), encoded(1, 0)[:400]
    root = write_npz(
        tmp_path / "packed",
        jpeg=np.frombuffer(first + second, np.uint8),
        offsets=np.array([0, len(first), len(first) + 400]),
        labels=np.array([0, 1]),
    )
    dataset = create_dataset(str(root), "test")
    assert dataset[0][1] == 0
    with pytest.raises(DataError, match=r"test\.npz\[1\]"):
        dataset[1]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": None}, "no array 'labels'; it has 'jpeg', 'offsets'"),
        ({"labels": np.array([0, 1, 7] * 3)}, "label 7 of image 2 is out of range, but classes.json has 3 classes"),
        ({"labels": np.array([-1] * 9)}, "label -1 of image 0"),
        ({"labels": np.arange(4)}, "offsets must rise"),
        ({"labels": np.array([0.5] * 9)}, "labels is float64"),
        ({"jpeg": np.zeros(10, np.uint8)}, "offsets must rise"),
        ({"labels": np.array([{}] * 9)}, "not a complete npz archive of plain arrays"),
    ],
    ids=["missing", "too-high", "negative", "too-few", "floats", "too-short", "objects"],
)
def test_a_wrong_npz_is_refused_at_once(tmp_path: Path, arrays: dict, message: str) -> None:
    root = write_npz(tmp_path / "packed", **arrays)
    with pytest.raises(DataError, match=message):
        create_dataset(str(root), "test")


def test_a_cut_npz_is_refused(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "packed") / "test.npz"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match="not a complete npz"):
        create_dataset(str(path.parent), "test")


def test_wrong_shards_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a-0.tar", "w") as archive:
        entry = tarfile.TarInfo("x.jpg")
        entry.size = len(encoded(0, 0))
        archive.addfile(entry, io.BytesIO(encoded(0, 0)))
    with pytest.raises(DataError, match=r"'x' has no \.cls label"):
        create_dataset(f"wds:{tmp_path}/a-0.tar", "test")
    with pytest.raises(DataError, match=r"a-1\.tar is missing"):
        create_dataset(f"wds:{tmp_path}/a-{{0..1}}.tar", "test")
    (tmp_path / "b.tar").write_bytes(b"no tar")
    with pytest.raises(DataError, match=r"b\.tar is not a complete"):
        create_dataset(f"wds:{tmp_path}/b.tar", "test")
    with pytest.raises(DataError, match="not local"):
        create_dataset("wds:pipe:rm -rf x", "test")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", "neither a data set nor an existing folder"),
        ("coco:DIR", "neither a data set nor an existing folder"),
        ("imagefolder:", "has nothing after imagefolder:"),
        ("imagefolder:nowhere", "no such folder: nowhere"),
        ("npz:nowhere", "no such folder: nowhere"),
        ("torchvision:CIFAR10", "has no folder; it must be torchvision:CIFAR10:ROOT"),
        ("torchvision:CIFAR10:nowhere", r"download it with torchvision\.datasets\.CIFAR10"),
        ("torchvision:CIFAR10:.", "not complete"),
        ("torchvision:Nothing:.", "no data set 'Nothing'"),
        ("torchvision:lsun:.", "torchvision.s LSUN reads a pickle"),
        ("torchvision:imagefolder:EMPTY", "a link that leads back without end; use imagefolder:EMPTY"),
        ("wds:nowhere-*.tar", "no shard"),
        ("imagelist:nowhere", "has no label file; it must be imagelist:nowhere:FILE"),
        ("imagelist:nowhere:labels.txt", "no such folder: nowhere"),
        ("imagelist:EMPTY:labels.txt", "EMPTY has no images"),
        ("imagefolder:EMPTY", "no class folders"),
        ("imagefolder:HOLLOW", "have no images"),
    ],
)
def test_a_wrong_specification_names_the_culprit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "HOLLOW" / "class").mkdir(parents=True)
    with pytest.raises(DataError, match=message) as caught:
        create_dataset(spec, "test")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("label", ["-1", "1.0", "1_000", "١٢", "9" * 20, "9" * 300])
def test_a_label_that_is_no_class_number_is_refused(tmp_path: Path, label: str) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "a.txt").write_text(f"a.jpg 0\nb.jpg {label}\n")
    (tmp_path / "a.csv").write_text(f"filename,label\na.jpg,0\nb.jpg,{label}\n")
    write_shard(tmp_path / "a.tar", {"a.jpg": b"", "a.cls": b"0", "b.jpg": b"", "b.cls": label.encode()})
    specs = [f"imagelist:{tmp_path}:{tmp_path / name}" for name in ("a.txt", "a.csv")]
    for spec in (*specs, f"wds:{tmp_path / 'a.tar'}"):
        with pytest.raises(DataError, match="label of .*not a class number|has the label .*must be whole numbers"):
            create_dataset(spec, "all").labels()


def test_offsets_without_sign_may_not_fall(tmp_path: Path) -> None:
    offsets = np.array([0, 9, 3, 12], np.uint32)
    write_npz(tmp_path, jpeg=np.zeros(12, np.uint8), offsets=offsets, labels=np.zeros(3, np.int64))
    with pytest.raises(DataError, match="the offsets must rise from 0 to the 12 bytes"):
        create_dataset(f"npz:{tmp_path}", "test")
