"""JSON and JSON lines as people write them: what is read whatever the editor, and what is refused with its line."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lamzoo.data import create_dataset
from lamzoo.data.captions import create_caption_dataset
from lamzoo.data.csv_tables import open_table
from lamzoo.data.images.archives import read_classes
from lamzoo.data.images.class_map import read_class_map
from lamzoo.data.json_files import check_fields, is_grid, is_number, is_row, read_json, read_json_lines
from lamzoo.data.moments import create_moment_dataset
from lamzoo.errors import DataError
from lamzoo.evaluation import moment_metrics
from lamzoo.evaluation.captions.coco_results import read_captions
from lamzoo.evaluation.moments.submissions import read_submission
from tests.images import encoded
from tests.shards import write_shard
from tests.speech import write_speech

SAMPLES = {"a.jpg": encoded(0, 0), "a.cls": b"0"}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(
    objects=st.lists(st.dictionaries(TEXT, TEXT, max_size=2), max_size=4),
    end=st.sampled_from(["\n", "\r\n", "\n\n", "\n \n"]),
    start=st.sampled_from(["", "\ufeff"]),
    suffix=st.sampled_from([".jsonl", ".jsonl.gz"]),
)
def test_each_object_is_read_with_its_line(
    tmp_path: Path, objects: list[dict[str, str]], end: str, start: str, suffix: str
) -> None:
    data = (start + "".join(json.dumps(each, ensure_ascii=False) + end for each in objects)).encode()
    path = tmp_path / f"data{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    step = end.count("\n")
    where = [f"line {1 + step * number} of {path}" for number in range(len(objects))]
    assert read_json_lines(path) == list(zip(objects, where, strict=True))


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = bytearray(gzip.compress(b'{"qid": 1}' * 99))
    whole[20:24] = b"\xff\xff\xff\xff"
    for data in (b"plain", whole[:-9], bytes(whole), gzip.compress(b"\xff\xfe")):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"cannot read .*a\.jsonl\.gz: "):
            read_json_lines(path)
        with pytest.raises(DataError, match=r"a\.jsonl\.gz is not readable JSON: "):
            read_json(path)
    deep = tmp_path / "deep.jsonl"
    deep.write_text("{}\n" + "[" * 100_000)
    with pytest.raises(DataError, match="line 2 of .* is not JSON"):
        read_json_lines(deep)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("classnames.txt", lambda folder: create_dataset(f"wds:{write_shard(folder / 'a.tar', SAMPLES)}", "all")),
        ("charades_sta_test.txt", lambda folder: create_moment_dataset(f"charades:{folder}", "test")),
        ("classes.txt", lambda folder: read_class_map(folder / "classes.txt")),
        ("classes.json", lambda folder: read_json(folder / "classes.json")),
        ("table.csv", lambda folder: open_table(folder / "table.csv")),
    ],
)
def test_a_text_file_in_another_encoding_is_to_be_saved_as_utf_8(
    tmp_path: Path, name: str, read: Callable[[Path], object]
) -> None:
    (tmp_path / "Charades_v1_test.csv").write_text("id,length\nAB1,20.5\n")
    (tmp_path / name).write_bytes("caf\u00e9\n".encode("latin-1"))
    with pytest.raises(DataError, match=rf"{name}.*: 'utf-8' codec can't decode .*; save it as UTF-8"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, True),
        (-2.5, True),
        (True, False),
        (float("nan"), False),
        (float("inf"), False),
        ("3", False),
        (10**400, False),
        (np.float32(0.5), True),
        (np.float32("inf"), False),
    ],
)
def test_a_number_is_finite_and_no_truth_value(value: Any, number: bool) -> None:
    assert is_number(value) == number
    assert is_row([1, value]) == is_row([1, value], 2) == is_grid([[1, 2], [3, value]]) == number
    assert not is_row([1, value], 3)


def test_fields_are_of_their_types() -> None:
    check_fields({"a": 1, "b": "x"}, {"a": int, "b": int | str}, "line 3 of x")
    for line in ({}, {"a": 1.0}, {"a": True}, {"a": None}):
        with pytest.raises(DataError, match="line 3 of x has no 'a' of type int"):
            check_fields(line, {"a": int}, "line 3 of x")


def test_a_submission_is_read_like_annotations(tmp_path: Path) -> None:
    path = tmp_path / "submission.jsonl"
    path.write_text('\ufeff{"qid": 1, "query": "a\u2028b"}\n\n{"qid": "2"}\n', encoding="utf-8")
    assert [line["qid"] for line in read_submission(path)] == [1, "2"]
    path.write_text('{"qid": 1}\n\n{"qid": [2]}\n')
    with pytest.raises(DataError, match=r"line 3 of .* has no 'qid' of type int | str, but \[2\]"):
        read_submission(path)


def test_captions_and_classes_may_have_a_mark_of_order(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\ufeff[{"image_id": 1, "caption": "a\u2028b"}]', encoding="utf-8")
    assert read_captions(path) == {1: "a\u2028b"}
    path.write_text('\ufeff["cat", "dog"]', encoding="utf-8")
    assert read_classes(path) == (["cat", "dog"], None)


@pytest.mark.parametrize(
    ("prediction", "truth", "says"),
    [
        ({"pred_relevant_windows": [0, 2, 1]}, {}, "has the window 0; a window is"),
        ({"pred_relevant_windows": [[0, 2]]}, {}, r"has the window \[0, 2\]; a window is"),
        ({}, {"relevant_clip_ids": [1.0]}, r"1 saliency_scores for the relevant_clip_ids \[1.0\]"),
        ({}, {"relevant_clip_ids": [9]}, "of a video of 5 clips; they must agree"),
        ({}, {"saliency_scores": [[1, 2]]}, "qid 1 has a clip without three grades"),
    ],
)
def test_scores_name_the_query_that_is_wrong(prediction: dict[str, Any], truth: dict[str, Any], says: str) -> None:
    right = {"qid": 1, "pred_relevant_windows": [[0, 2, 1.0]], "pred_saliency_scores": [0.0] * 5}
    annotation = {"qid": 1, "duration": 10, "relevant_windows": [[0, 2]], "relevant_clip_ids": [1],
                  "saliency_scores": [[1, 2, 3]]}  # fmt: skip
    assert moment_metrics([right], [annotation])["brief"]["MR-full-mAP"] == 100.0
    with pytest.raises(DataError, match=says):
        moment_metrics([right | prediction], [annotation | truth])


@pytest.mark.parametrize("words", [[["bin", 0.1]], ["bin"], [["bin", "0", 1.0]], [[1, 0.1, 0.2]]])
def test_words_without_their_times_are_named(tmp_path: Path, words: list[Any]) -> None:
    folder = write_speech(tmp_path, copies=1)
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    lines[2]["words"] = words
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match="line 3 of .* has the word .*; it must be a string, its start and its end"):
        create_caption_dataset(f"grid:{folder}", "train")


@pytest.mark.parametrize(
    "change",
    [{"sentence": None}, {"movie": None}, {"timestamps": "12"}, {"timestamps": [1, 2, 3]}, {"timestamps": None}],
)
def test_a_sentence_of_mad_without_text_or_times_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    h5py = pytest.importorskip("h5py")
    (tmp_path / "features").mkdir()
    with h5py.File(tmp_path / "features" / "CLIP_L14_frames_features_5fps.h5", "w") as file:
        file["10142"] = np.ones((10, 4), np.float32)
    line = {"movie": "10142", "sentence": "SOMEONE waits.", "timestamps": [0.0, 1.0]}
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "MAD_train.json").write_text(json.dumps({"7": line | change}))
    with pytest.raises(DataError, match="the sentence '7' of .* must have movie, sentence and timestamps"):
        create_caption_dataset(f"mad:{tmp_path}", "train")
