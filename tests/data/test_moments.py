"""Queries about videos, in the official layouts: what is read, and how what is wrong is named."""

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lamzoo.data.moments import MomentDataset, create_moment_dataset
from lamzoo.errors import DataError, MissingSplitError
from lamzoo.evaluation import moment_metrics

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
LINE = {
    "qid": 7,
    "query": "A dog runs.",
    "vid": "a_0.0_20.0",
    "duration": 20,
    "relevant_clip_ids": [2, 3],
    "saliency_scores": [[4, 0, 1], [3, 2, 2]],
    "relevant_windows": [[4, 8]],
}


def write(path: Path, *lines: Any) -> None:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def save(path: Path, rows: int, columns: int, key: str = "features", fill: float | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float16)
    np.savez(path, **{key: values if fill is None else np.full_like(values, fill)})


@pytest.fixture
def qvhighlights(tmp_path: Path) -> Path:
    write(tmp_path / "highlight_val_release.jsonl", LINE)
    write(tmp_path / "highlight_test_release.jsonl", {k: LINE[k] for k in ("qid", "query", "vid", "duration")})
    features = tmp_path / "features"
    save(features / "clip_features" / "a_0.0_20.0.npz", 10, 8)
    save(features / "slowfast_features" / "a_0.0_20.0.npz", 9, 6)
    save(features / "clip_text_features" / "qid7.npz", 4, 5, "last_hidden_state")
    return tmp_path


def opened(folder: Path, split: str = "val") -> MomentDataset:
    return create_moment_dataset(f"qvhighlights:{folder}", split)


def test_queries_and_features_are_read(qvhighlights: Path) -> None:
    dataset = opened(qvhighlights, "validation")
    (query,) = dataset.queries
    assert (dataset.split, len(dataset), dataset.clip_seconds) == ("val", 1, 2.0)
    assert (query.qid, query.text, query.windows) == (7, "A dog runs.", ((4.0, 8.0),))
    found = dataset.read(0)
    assert found.video.shape == (9, 6 + 8 + 2)  # as many clips as both have, and their two positions
    assert found.video.dtype == found.text.dtype == np.float32
    assert np.linalg.norm(found.video[:, :6], axis=1) == pytest.approx(1.0)
    assert np.linalg.norm(found.video[:, 6:14], axis=1) == pytest.approx(1.0)
    assert found.video[:, -2] == pytest.approx(np.arange(9) / 9)
    assert found.video[:, -1] == pytest.approx(np.arange(1, 10) / 9)
    assert found.text.shape == (4, 5)


def test_slowfast_is_optional(qvhighlights: Path) -> None:
    (qvhighlights / "features" / "slowfast_features").rename(qvhighlights / "away")
    assert opened(qvhighlights).read(0).video.shape == (10, 8 + 2)


def test_the_truth_comes_back_in_the_official_form(qvhighlights: Path) -> None:
    assert opened(qvhighlights).annotations() == [LINE]
    answer = {"qid": 7, "pred_relevant_windows": [[4, 8, 1.0]], "pred_saliency_scores": [0.0] * 2 + [1.0] * 8}
    assert moment_metrics([answer], opened(qvhighlights).annotations())["brief"]["MR-full-mAP"] == 100.0


def test_a_test_split_may_keep_its_moments_to_itself(qvhighlights: Path) -> None:
    hidden = opened(qvhighlights, "test")
    assert hidden.queries[0].windows == ()
    with pytest.raises(DataError, match="doesn't include the moments of query 7"):
        hidden.annotations()
    write(qvhighlights / "highlight_test_with_gt.jsonl.gz", LINE)
    assert opened(qvhighlights, "test").annotations() == [LINE]


def test_it_travels_to_workers(qvhighlights: Path) -> None:
    dataset = opened(qvhighlights)
    assert np.array_equal(pickle.loads(pickle.dumps(dataset)).read(0).video, dataset.read(0).video)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: (f / "clip_features" / "a_0.0_20.0.npz").unlink(), r"clip_features has no a_0\.0_20\.0\.npz"),
        (lambda f: (f / "clip_text_features" / "qid7.npz").unlink(), r"has no qid7\.npz"),
        (lambda f: save(f / "slowfast_features" / "a_0.0_20.0.npz", 5, 6), "has 10 clips and .* has 5"),
        (lambda f: save(f / "clip_features" / "a_0.0_20.0.npz", 10, 8, "x"), "has no array 'features'"),
        (lambda f: save(f / "clip_features" / "a_0.0_20.0.npz", 10, 8, fill=np.nan), "not finite"),
        (lambda f: save(f / "clip_features" / "a_0.0_20.0.npz", 0, 8), r"float16 \(0, 8\)"),
        (
            lambda f: (f / "clip_features" / "a_0.0_20.0.npz").write_bytes(b"PK\x03\x04 no"),
            "is not a complete npz archive",
        ),
    ],
)
def test_features_that_are_wrong_are_named(qvhighlights: Path, change: Any, says: str) -> None:
    dataset = opened(qvhighlights)
    change(qvhighlights / "features")
    with pytest.raises(DataError, match=says):
        dataset.read(0)


@pytest.mark.parametrize(("rows", "read"), [(8, True), (12, True), (7, False), (13, False)])
def test_graded_clips_need_a_row_of_features_each_but_for_two(qvhighlights: Path, rows: int, read: bool) -> None:
    for folder in ("clip_features", "slowfast_features"):
        save(qvhighlights / "features" / folder / "a_0.0_20.0.npz", rows, 8)
    dataset = opened(qvhighlights)
    if read:
        assert len(dataset.read(0).video) == rows
        return
    with pytest.raises(DataError, match=rf"'a_0\.0_20\.0' of .* have {rows} rows, and its 20 s have 10 clips of 2 s"):
        dataset.read(0)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["{"], "line 1 of .* is not JSON"),
        (["[1]"], "is not a JSON object"),
        ([LINE | {"qid": "7"}], "line 1 of .* has no 'qid' of type int, but '7'"),
        ([LINE, LINE], "query 7 is listed twice"),
        ([LINE | {"relevant_windows": [[8, 4]]}], r"the window \[8, 4\] in a video of 20 s"),
        ([LINE | {"relevant_windows": [[4, 40]]}], r"the window \[4, 40\]"),
        ([LINE | {"relevant_clip_ids": [2]}], "grades 2 clips and lists 1"),
        ([LINE | {"relevant_clip_ids": [2, 30]}], "of a video of 10"),
        ([LINE | {"relevant_clip_ids": [2, 2]}], "of a video of 10"),
        ([LINE | {"relevant_clip_ids": []}], "grades 2 clips and lists 0"),
        ([LINE, "", LINE | {"relevant_windows": [[4, 8, 0.9]]}], r"line 3 of .* relevant_windows \[\[4, 8, 0.9\]\]"),
        ([LINE | {"relevant_windows": [4, 8]}], r"line 1 of .* each must be \[start, end\], in seconds"),
        ([LINE | {"relevant_windows": 4}], "line 1 of .* has the relevant_windows 4"),
        (
            ['{"qid": 7, "query": "a", "vid": "a", "duration": NaN}'],
            "line 1 of .* is not JSON: NaN is not a number in JSON",
        ),
        ([LINE | {"duration": float("inf")}], "line 1 of .* is not JSON: Infinity is not a number in JSON"),
        ([LINE | {"duration": 10**400}], "line 1 of .* has the duration 1000.*; it must be a finite number"),
        ([LINE | {"duration": True}], "line 1 of .* no 'duration' of type int | float, but True"),
        ([LINE | {"duration": 0}], "line 1 of .* has a duration of 0 s"),
        ([LINE | {"duration": 1e18}], r"line 1 of .* has a duration of 1e\+18 s; .* at most 604800 \(a week\)"),
        (
            [LINE | {"relevant_clip_ids": [2.0, 3.0]}],
            r"line 1 of .* relevant_clip_ids \[2.0, 3.0\]; they must be whole",
        ),
        ([LINE | {"relevant_clip_ids": "23"}], "line 1 of .* has the relevant_clip_ids '23'"),
        ([LINE | {"saliency_scores": [[4, 0, 1], [3, 2]]}], "line 1 of .* must have equally many grades"),
        ([LINE | {"saliency_scores": [[4, 0, 1], [3, 2, None]]}], "line 1 of .* saliency_scores"),
        ([LINE | {"saliency_scores": [4, 3]}], "line 1 of .* saliency_scores"),
    ],
)
def test_lines_that_are_wrong_are_named(qvhighlights: Path, lines: list[Any], says: str) -> None:
    write(qvhighlights / "highlight_val_release.jsonl", *lines)
    with pytest.raises(DataError, match=says):
        opened(qvhighlights)


@pytest.mark.parametrize("name", ["highlight_val_release.jsonl", "highlight_val_release.jsonl.gz"])
def test_line_separators_in_a_sentence_a_mark_of_order_and_blank_lines_are_read(qvhighlights: Path, name: str) -> None:
    (qvhighlights / "highlight_val_release.jsonl").unlink()
    text = "a\u2028b\u2029c\x85d"
    lines = [json.dumps(LINE | {"query": text}, ensure_ascii=False), "", " ", json.dumps(LINE | {"qid": 8}), ""]
    write(qvhighlights / name, "\ufeff" + "\r\n".join(lines))
    assert [(query.qid, query.text) for query in opened(qvhighlights).queries] == [(7, text), (8, "A dog runs.")]


@pytest.mark.parametrize(
    ("spec", "split", "says"),
    [
        ("qvhighlights:", "val", "has nothing after qvhighlights:"),
        ("moments:x", "val", "is not a moment data set; it must be qvhighlights:DIR"),
        ("qvhighlights:nowhere", "val", "no such folder"),
        ("qvhighlights:{}", "", "is empty"),
    ],
)
def test_wrong_specifications_are_named(qvhighlights: Path, spec: str, split: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        create_moment_dataset(spec.format(qvhighlights), split)


def test_a_missing_split_or_folder_is_named(qvhighlights: Path) -> None:
    with pytest.raises(MissingSplitError, match="no split 'train'; it has 'val', 'test'"):
        opened(qvhighlights, "train")
    (qvhighlights / "features" / "clip_text_features").rename(qvhighlights / "away")
    with pytest.raises(DataError, match="has no folder clip_text_features; compute it with `lamzoo extract-features`"):
        opened(qvhighlights).read(0)


def test_annotations_need_no_features(qvhighlights: Path) -> None:
    (qvhighlights / "features").rename(qvhighlights / "away")
    assert opened(qvhighlights).annotations() == [LINE]


def test_tvsum_has_grades_by_domain(tmp_path: Path) -> None:
    label = [[1.0] * 20, [5.0] * 20, [2.0] * 20]
    lines = [
        {"qid": v, "query": "title", "vid": v, "duration": 3, "label": label, "domain": d}
        for v, d in (("x", "BK"), ("y", "VT"))
    ]
    write(tmp_path / "tvsum_val.jsonl.gz", *lines)
    save(tmp_path / "clip_features" / "x.npz", 3, 4)
    save(tmp_path / "clip_text_features" / "qidx.npz", 2, 4, "last_hidden_state")
    both = create_moment_dataset(f"tvsum:{tmp_path}", "val")
    one = create_moment_dataset(f"tvsum:{tmp_path}:BK", "val")
    assert [query.qid for query in both.queries] == ["x", "y"]
    assert [query.qid for query in one.queries] == ["x"]
    assert one.queries[0].grades is not None
    assert (one.queries[0].duration, one.queries[0].grades.shape) == (6.0, (3, 20))
    assert one.read(0).video.shape == (3, 6)
    with pytest.raises(DataError, match="no domain 'ZZ'; it has BK, VT"):
        create_moment_dataset(f"tvsum:{tmp_path}:ZZ", "val")
    for wrong in ([[1.0] * 20, [5.0] * 19], [1.0, 2.0], []):
        write(tmp_path / "tvsum_val.jsonl.gz", *lines, "", lines[0] | {"qid": "z", "label": wrong})
        with pytest.raises(DataError, match="line 4 of .* has a label that is not a list of clips"):
            create_moment_dataset(f"tvsum:{tmp_path}", "val")


def test_charades_sta_is_read(tmp_path: Path) -> None:
    lines = ("AB1 1.5 9.0##a person runs", "AB1 30.0 31.0##nothing", "AB1 4 60.2##sits")
    write(tmp_path / "charades_sta_test.txt", *lines)
    (tmp_path / "Charades_v1_test.csv").write_text("id,length\nAB1,20.5\n")
    save(tmp_path / "clip_features" / "AB1.npz", 10, 4)
    save(tmp_path / "clip_text_features" / "qidtest2.npz", 2, 4, "last_hidden_state")
    dataset = create_moment_dataset(f"charades:{tmp_path}", "test")
    assert [(q.qid, q.text, q.windows) for q in dataset.queries] == [
        ("test0", "a person runs", ((1.5, 9.0),)),
        ("test2", "sits", ((4.0, 20.5),)),
    ]
    assert dataset.read(1).text.shape == (2, 4)
    write(tmp_path / "charades_sta_test.txt", "\ufeffAB1 1.5 9.0##a\u2028person", "", "AB1 4 8##sits")
    separated = create_moment_dataset(f"charades:{tmp_path}", "test")
    assert [(query.qid, query.text) for query in separated.queries] == [("test0", "a\u2028person"), ("test2", "sits")]
    write(tmp_path / "charades_sta_test.txt", "AB1 1.5##no end")
    with pytest.raises(DataError, match="line 1 of .* doesn't have the form"):
        create_moment_dataset(f"charades:{tmp_path}", "test")
    write(tmp_path / "charades_sta_test.txt", "AB2 1.5 3.0##another")
    with pytest.raises(DataError, match=r"about the video AB2, which is not in Charades_v1_test\.csv"):
        create_moment_dataset(f"charades:{tmp_path}", "test")


@pytest.mark.parametrize(("split", "count"), [("train", 7218), ("val", 1550), ("test", 1542)])
def test_the_released_annotations_are_read_whole(tmp_path: Path, split: str, count: int) -> None:
    if not (SHARED / "qvhighlights").is_dir():
        pytest.skip(f"{SHARED / 'qvhighlights'} is not here")
    for path in (SHARED / "qvhighlights").glob("highlight_*"):
        (tmp_path / path.name).symlink_to(path)
    for folder in ("clip_features", "clip_text_features"):
        (tmp_path / folder).mkdir()
    dataset = create_moment_dataset(f"qvhighlights:{tmp_path}", split)
    assert len(dataset) == count
    name = "highlight_test_with_gt" if split == "test" else f"highlight_{split}_release"
    with gzip.open(SHARED / "qvhighlights" / f"{name}.jsonl.gz", "rt") as file:
        raw = [json.loads(line) for line in file]
    for mine, theirs in zip(dataset.annotations(), raw, strict=True):
        assert mine["relevant_windows"] == theirs["relevant_windows"]
        graded = [c for c, s in zip(theirs["relevant_clip_ids"], theirs["saliency_scores"], strict=True) if any(s)]
        assert mine["relevant_clip_ids"] == graded


@pytest.mark.parametrize(("split", "count"), [("train", 40), ("val", 10)])
def test_tvsums_labels_are_read_whole(tmp_path: Path, split: str, count: int) -> None:
    if not (SHARED / "tvsum_labels").is_dir():
        pytest.skip(f"{SHARED / 'tvsum_labels'} is not here")
    for path in (SHARED / "tvsum_labels").glob("tvsum_*"):
        (tmp_path / path.name).symlink_to(path)
    for folder in ("clip_features", "clip_text_features"):
        (tmp_path / folder).mkdir()
    dataset = create_moment_dataset(f"tvsum:{tmp_path}", split)
    assert len(dataset) == count
    assert all(query.grades is not None and query.grades.shape[1] == 20 for query in dataset.queries)
