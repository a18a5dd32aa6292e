import json
from pathlib import Path

import pytest
import timm.data

from lamzoo.data import create_dataset, leave_out_invalid, read_class_map, relabel
from lamzoo.errors import DataError
from tests.images import CLASSES, encoded, write_folder, write_npz

WNIDS = ["n01440764", "n01443537", "n01484850"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("imagenet_synsets.txt", "\n".join(WNIDS)),
        ("LOC_synset_mapping.txt", "\n".join(f"{wnid} tench, Tinca tinca" for wnid in WNIDS)),
        ("imagenet_class_index.json", json.dumps({str(i): [wnid, "tench"] for i, wnid in enumerate(WNIDS)})),
        ("class_to_idx.json", json.dumps({wnid: i for i, wnid in reversed(list(enumerate(WNIDS)))})),
        ("list.json", json.dumps(WNIDS)),
        ("pairs.json", json.dumps([[wnid, "tench"] for wnid in WNIDS])),
    ],
)
def test_every_form_of_class_map_says_the_same(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text + "\n", encoding="utf-8-sig")
    assert read_class_map(tmp_path / name) == WNIDS


def test_timms_lists_go_by_their_names() -> None:
    names = read_class_map("imagenet-1k")
    assert names[:3] == WNIDS
    assert names == sorted(names) == list(timm.data.ImageNetInfo().label_names())
    assert len(read_class_map("imagenet-12k")) == 11821


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "it is empty"),
        ("a.txt", "x\ny\nx\n", "the class 'x' twice"),
        ("a.json", "{", "not a readable class map"),
        ("a.json", '{"0": ["a", "b"], "2": ["c", "d"]}', "none with number 1"),
        ("a.json", '{"cat": 0, "dog": 0, "fish": 1}', "it has 3 classes, but none with number 2"),
        ("a.json", "[1, 2]", "must contain class names"),
        ("a.json", "[]", "must contain class names"),
        ("b.txt", None, "neither a file nor one of timm's"),
    ],
)
def test_what_is_no_class_map_is_refused(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_class_map(tmp_path / name)


def test_a_part_of_the_classes_gets_the_whole_lists_numbers(tmp_path: Path) -> None:
    names = ["violet", "red", "yellow", "blue", "green"]
    part = relabel(create_dataset(str(write_folder(tmp_path / "p", splits=())), "all"), names)
    assert part.classes == names
    assert part.labels() == [label for _, label in part] == [3, 3, 3, 4, 4, 4, 1, 1, 1]
    assert part.filename(0).endswith("blue/0.jpg")


def test_identifiers_are_looked_up_where_names_are_not_in_the_list(tmp_path: Path) -> None:
    root = write_npz(tmp_path / "packed", each=1)
    pairs = [[wnid, name] for wnid, name in zip(WNIDS, CLASSES, strict=True)]
    (root / "classes.json").write_text(json.dumps(pairs))
    assert relabel(create_dataset(str(root), "test"), WNIDS[::-1]).labels() == [2, 1, 0]


def test_classes_that_the_list_has_not_are_named(tmp_path: Path) -> None:
    dataset = create_dataset(str(write_npz(tmp_path / "packed")), "test")
    with pytest.raises(DataError, match=r"3 of the 3 classes .* not in imagenet-1k, such as 'blue'; .* 'n01440764'"):
        relabel(dataset, read_class_map("imagenet-1k"), "imagenet-1k")
    dataset.classes = None
    with pytest.raises(DataError, match="has no class names to look up"):
        relabel(dataset, CLASSES)


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Three images as ImageNet's validation split is handed out."""
    (tmp_path / "val").mkdir()
    for number in range(1, 4):
        (tmp_path / "val" / f"ILSVRC2012_val_{number:08}.JPEG").write_bytes(encoded(0, number))
    return tmp_path


def labels_of(flat: Path, name: str, text: str) -> tuple[list[int], list[str] | None]:
    (flat / name).write_text(text)
    dataset = create_dataset(f"imagelist:{flat / 'val'}:{flat / name}", "all")
    assert dataset[0][0].mode == "RGB"
    assert dataset.split is None
    there = leave_out_invalid(dataset, dataset.lost, "skip", every_class=False)
    return there.labels(), dataset.classes


def test_kaggles_list_of_labels_and_boxes(flat: Path) -> None:
    rows = [(3, "n03", "1 2 3 4 n03 5 6 7 8"), (1, "n10", "1 2 3 4"), (2, "n03", "1 2 3 4"), (9, "n02", "1 2 3 4")]
    text = "\n".join(f"ILSVRC2012_val_{number:08},{wnid} {boxes} " for number, wnid, boxes in rows)
    found = labels_of(flat, "LOC_val_solution.csv", f"ImageId,PredictionString\n{text}\n")
    assert found == ([2, 1, 1], ["n02", "n03", "n10"])


def test_an_image_that_is_not_listed_gets_no_label_of_another_folder(tmp_path: Path) -> None:
    for folder in ("cats", "dogs"):
        (tmp_path / "all" / folder).mkdir(parents=True)
        (tmp_path / "all" / folder / "1.jpg").touch()
    (tmp_path / "list.csv").write_text("cats/1.jpg,cat\nbirds/2.jpg,bird\n")
    with pytest.raises(DataError, match=r"has no label or several for .*dogs"):
        create_dataset(f"imagelist:{tmp_path / 'all'}:{tmp_path / 'list.csv'}", "all")


def test_caffes_list_of_names_and_numbers(flat: Path) -> None:
    text = "\n".join(f"ILSVRC2012_val_{number:08}.JPEG {60 + number}" for number in (1, 2, 3, 4))
    assert labels_of(flat, "val.txt", text) == ([61, 62, 63], None)


def test_tensorflows_list_of_classes_in_the_images_order(flat: Path) -> None:
    assert labels_of(flat, "labels.txt", "n05\nn04\nn05\n") == ([1, 0, 1], ["n04", "n05"])
    (flat / "val" / "ILSVRC2012_val_00000002.JPEG").unlink()  # the names say which lines count
    assert labels_of(flat, "labels.txt", "n05\nn04\nn06\n") == ([1, 2], ["n04", "n05", "n06"])


def test_the_development_kits_numbers_are_translated(flat: Path) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    synsets = [(1, "n02119789"), (2, "n02100735"), (3, "n01440764")]
    import numpy as np

    savemat(flat / "meta.mat", {"synsets": np.array(synsets, [("ILSVRC2012_ID", "O"), ("WNID", "O")])})
    found = labels_of(flat, "ILSVRC2012_validation_ground_truth.txt", "3\n1\n3\n")
    assert found == ([0, 1, 0], ["n01440764", "n02119789"])
    (flat / "meta.mat").unlink()
    with pytest.raises(DataError, match=r"numbers of unknown classes.*by meta\.mat"):
        labels_of(flat, "ILSVRC2012_validation_ground_truth.txt", "3\n1\n3\n")


def test_a_heading_is_no_image_and_folders_tell_equal_names_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / "val" / folder).mkdir(parents=True)
        (tmp_path / "val" / folder / "my photo.jpg").write_bytes(encoded(0, 0))
    text = "filename,label\na/my photo.jpg,golden retriever\nb/my photo.jpg,cat\n"
    assert labels_of(tmp_path, "list.csv", text) == ([1, 0], ["cat", "golden retriever"])
    with pytest.raises(DataError, match="gives my photo.jpg two labels, 'cat' and 'dog'"):
        labels_of(tmp_path, "list.csv", "my photo.jpg,cat\n./my photo.jpg,dog\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("ILSVRC2012_val_00000001.JPEG,n01\n", r"no label or several for .*00000002\.JPEG"),
        ("a.jpg n01\nb.jpg\n", "line 2 .* has another form than the first"),
        ("n01\nn02\n", "2 labels without names and the folder 3 images"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(flat: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        labels_of(flat, "list.txt", text)


def test_a_flat_folder_without_a_list_is_told_how(flat: Path) -> None:
    with pytest.raises(DataError, match="with a label file, use imagelist:"):
        create_dataset(f"imagefolder:{flat / 'val'}", "test")
