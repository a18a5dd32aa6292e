"""Tables that people write: unquoted commas, repeated headings, and names spelled in two ways."""

import csv
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamzoo.data import create_dataset, read_class_map, relabel
from lamzoo.data.captions import create_caption_dataset
from lamzoo.data.captions.feature_files import FeatureFiles
from lamzoo.data.csv_tables import open_table
from lamzoo.data.moments.feature_folder import FeatureFolder
from lamzoo.data.moments.qvhighlights import charades
from lamzoo.data.retrieval import create_retrieval_dataset
from lamzoo.data.retrieval.msrvtt import read_test_pairs
from lamzoo.errors import DataError
from lamzoo.report.compare.timm_results import read_timm
from tests.images import encoded

NFC, NFD = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@given(rows=st.lists(st.lists(texts, min_size=3, max_size=3)))
def test_what_a_csv_writer_quotes_is_read_as_it_was(tmp_path_factory: pytest.TempPathFactory, rows) -> None:
    path = tmp_path_factory.mktemp("tables") / "table.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["a", "b", "c"], *rows])
    assert [cells for _, cells in open_table(path).rows] == [[cell.strip() for cell in row] for row in rows]


def retrieval(folder: Path, text: str) -> None:
    (folder / "captions.csv").write_text(text)
    create_retrieval_dataset(f"videos:{folder}", "train")


def captions(folder: Path, text: str) -> None:
    (folder / "captions.csv").write_text(text)
    create_caption_dataset(f"videos:{folder}", "train")


def msrvtt(folder: Path, text: str) -> None:
    (folder / "test.csv").write_text(text)
    read_test_pairs(folder / "test.csv")


def mad(folder: Path, text: str) -> None:
    (folder / "mad-v2-ad-named.csv").write_text(text)
    create_caption_dataset(f"mad:{folder}", "train-named")


def durations(folder: Path, text: str) -> None:
    (folder / "charades_sta_test.txt").write_text("a 0.0 1.0##a cat\n")
    (folder / "Charades_v1_test.csv").write_text(text)
    charades(folder, "test")


def timms(folder: Path, text: str) -> None:
    (folder / "results-imagenet.csv").write_text(text)
    read_timm(folder)


READERS = [
    (retrieval, "video,caption,split", "cat.mp4,a cat, asleep,train"),
    (captions, "video,start,end,caption,split", "cat.mp4,0,1,a cat, asleep,train"),
    (msrvtt, "key,vid_key,video_id,sentence", "ret0,msr9,video9,a cat, asleep"),
    (mad, "movie,start,end,text", "m,0,1,A cat, asleep."),
    (durations, "id,script,length", "a,a cat, asleep,30.5"),
    (timms, "model,img_size,top1,param_count", "vit,224,80.0,1,013.01"),
]


@pytest.mark.parametrize(("read", "headings", "line"), READERS)
def test_more_cells_than_headings_are_an_error_with_their_line(tmp_path: Path, read, headings: str, line: str) -> None:
    (tmp_path / "cat.mp4").touch()
    with pytest.raises(DataError, match=f"line 3 of {tmp_path}.*csv has .* cells, and the first line has .* headings"):
        read(tmp_path, f"{headings}\n\n{line}\n")
    with pytest.raises(DataError, match=f"line 2 of {tmp_path}.*csv"):
        read(tmp_path, f"{headings},,\n{line}\n")  # as a spreadsheet pads it


@pytest.mark.parametrize(("read", "headings"), [reader[:2] for reader in READERS])
def test_a_repeated_heading_is_an_error(tmp_path: Path, read, headings: str) -> None:
    last = headings.split(",")[-1]
    with pytest.raises(DataError, match=f"has the heading '{last}' twice"):
        read(tmp_path, f"{headings}, {last} \n")


def test_columns_without_a_name_may_be_empty_or_an_index(tmp_path: Path) -> None:
    (tmp_path / "cat.mp4").touch()
    (tmp_path / "captions.csv").write_text(",video,caption,,\n0,cat,a cat,,\n1,cat,a kitten\n")
    assert create_retrieval_dataset(f"videos:{tmp_path}", "all").texts == ["a cat", "a kitten"]


@pytest.mark.parametrize(("stored", "written"), [(NFD, NFC), (NFC, NFD)])
def test_videos_and_features_are_found_in_either_spelling(tmp_path: Path, stored: str, written: str) -> None:
    (tmp_path / stored).mkdir()
    (tmp_path / stored / f"{stored}.mp4").touch()
    (tmp_path / "captions.csv").write_text(f"video,caption\n{written}/{written},a\n{written}/{written}.mp4,b\n")
    (tmp_path / "features" / "video").mkdir(parents=True)
    np.save(tmp_path / "features" / "video" / f"{stored}.npy", np.ones((3, 4), np.float32))
    assert create_retrieval_dataset(f"videos:{tmp_path}", "all").texts_of(0) == [0, 1]
    assert create_caption_dataset(f"videos:{tmp_path}", "all").items[0].captions == ("a", "b")
    assert list(FeatureFiles(tmp_path / "features", 1.0).read(written, 0.0, 2.0)) == ["video"]


@pytest.mark.parametrize(("stored", "written"), [(NFD, NFC), (NFC, NFD)])
def test_videos_of_official_lists_are_found_in_either_spelling(tmp_path: Path, stored: str, written: str) -> None:
    (tmp_path / f"{stored}.mp4").touch()
    (tmp_path / "test_list.txt").write_text(written)
    (tmp_path / "raw-captions.json").write_text(json.dumps({stored: ["a cat"]}))
    assert create_retrieval_dataset(f"msvd:{tmp_path}", "test").texts == ["a cat"]
    for folder, name in (("clip_features", stored), ("clip_text_features", f"qid{stored}")):
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / f"{name}.npz", features=np.ones((2, 4)), last_hidden_state=np.ones((2, 4)))
    folder = FeatureFolder(tmp_path)
    assert folder.video(written).shape == folder.text(written).shape == (2, 4)


@pytest.mark.parametrize(("stored", "written"), [(NFD, NFC), (NFC, NFD)])
def test_movies_are_found_in_either_spelling(tmp_path: Path, stored: str, written: str) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "CLIP_B32_frames_features_5fps.h5", "w") as file:
        file[stored] = np.ones((20, 4), np.float32)
    (tmp_path / "mad-v2-ad-named.csv").write_text(f"movie,start,end,text\n{written},0,2,A cat.\n")
    dataset = create_caption_dataset(f"mad:{tmp_path}", "train-named")
    assert dataset.items[0].captions == ("A cat.",)
    assert list(dataset.read(0)) == ["video"]


def test_a_class_spelled_in_two_ways_is_one_class(tmp_path: Path) -> None:
    for name in (f"train/{NFD}", f"val/{NFC}", "train/z", "val/z"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "0.jpg").write_bytes(encoded(0, 0))
    for split in ("train", "val"):
        dataset = create_dataset(str(tmp_path / "data"), split)
        assert (dataset.classes, dataset.labels()) == ([NFC, "z"], [0, 1])
    (tmp_path / "classes.txt").write_text(f"y\n{NFD}\nz\n")
    assert relabel(dataset, read_class_map(tmp_path / "classes.txt")).labels() == [1, 2]
    (tmp_path / "classes.txt").write_text(f"{NFC}\n{NFD}\n")
    with pytest.raises(DataError, match="twice"):
        read_class_map(tmp_path / "classes.txt")


def test_a_list_of_labels_names_images_and_classes_in_either_spelling(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in (f"{NFD}.jpg", f"{NFC}2.jpg"):
        (tmp_path / "data" / name).write_bytes(encoded(0, 0))
    (tmp_path / "list.csv").write_text(f"{NFC}.jpg,{NFC}\n{NFD}2,{NFD}\n")
    dataset = create_dataset(f"imagelist:{tmp_path / 'data'}:{tmp_path / 'list.csv'}", "all")
    assert (dataset.classes, dataset.labels()) == ([NFC], [0, 0])
    (tmp_path / "list.csv").write_text(f"{NFC}.jpg,cat\n{NFD}.jpg,dog\n{NFD}2,cat\n")
    with pytest.raises(DataError, match="two labels, 'cat' and 'dog'"):
        create_dataset(dataset.spec, "all")


def test_a_list_of_labels_with_headings_is_csv(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a, b.jpg").write_bytes(encoded(0, 0))
    spec, table = f"imagelist:{tmp_path / 'data'}:{tmp_path / 'list.csv'}", tmp_path / "list.csv"
    table.write_text('filename,label\n"a, b.jpg","tench, Tinca tinca"\n')
    dataset = create_dataset(spec, "all")
    assert (dataset.classes, dataset.labels()) == (["tench, Tinca tinca"], [0])
    for line, message in {"absent.jpg,tench, Tinca": "3 cells", "c.jpg,": "no image or no label"}.items():
        table.write_text(f'filename,label\n"a, b.jpg",cat\n{line}\n')
        with pytest.raises(DataError, match=f"line 3 of .*{message}"):
            create_dataset(spec, "all")


def test_a_class_list_keeps_what_only_unicode_calls_a_line_break(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("a\u2028b\nc\r\nd\x85e\n", newline="")
    assert read_class_map(tmp_path / "classes.txt") == ["a\u2028b", "c", "d\x85e"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("image,label,split\na.jpg,cat,train\n", ["cat"]),
        ("id,filename,label\n7,a.jpg,cat\n", ["cat"]),
        ("filename,breed,\na.jpg,cat,\n", ["cat"]),
        ("image,label,label\na.jpg,cat,dog\n", "has the heading 'label' twice"),
        (
            "image,breed,age\na.jpg,cat,3\n",
            "has the columns image, breed, age; rename that of the labels to 'label' or",
        ),
        ("image,label,age\na.jpg,,3\n", "line 2 of .* has no image or no label"),
    ],
)
def test_the_image_and_label_of_a_wider_table_are_read(tmp_path: Path, text: str, found: list[str] | str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jpg").write_bytes(encoded(0, 0))
    (tmp_path / "list.csv").write_text(text)
    spec = f"imagelist:{tmp_path / 'data'}:{tmp_path / 'list.csv'}"
    if isinstance(found, list):
        assert create_dataset(spec, "all").classes == found
        return
    with pytest.raises(DataError, match=found):
        create_dataset(spec, "all")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('a,b\n1,"2\n3"\n4,"5\n6,7\n', "cannot read .*: line 4 has a double quote that is not closed; close it"),
        ('a,"b\n', "cannot read .*: line 1 has a double quote that is not closed; close it"),
        ('a,b\n1,2\n3,"4" 5\n', "cannot read .*: line 3 is not CSV"),
    ],
)
def test_a_quote_that_is_wrong_is_named_by_its_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(DataError, match=says):
        open_table(tmp_path / "table.csv")


@pytest.mark.parametrize("length", ["inf", "nan", "-3", "0", "abc", "1e18"])
def test_a_duration_that_is_none_is_named_by_its_line(tmp_path: Path, length: str) -> None:
    with pytest.raises(DataError, match=rf"line 2 of .*Charades_v1_test\.csv has a duration of {length} s; it must"):
        durations(tmp_path, f"id,length\na,{length}\n")


def test_a_time_of_mad_that_is_not_finite_is_named_by_its_line(tmp_path: Path) -> None:
    pytest.importorskip("h5py")
    with pytest.raises(DataError, match="line 3 of .* has no start and end in seconds: 'nan' is not a number"):
        mad(tmp_path, "movie,start,end,text\nm,0,1,A cat.\nm,nan,1,A cat.\n")
