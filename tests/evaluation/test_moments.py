"""Scores of moments and highlights: the official tool's, to the digit, and what is wrong with a submission is named."""

import copy
import gzip
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamzoo.errors import DataError
from lamzoo.evaluation import moment_metrics
from lamzoo.evaluation.moments.metrics import _clip_precision, _window_precision
from lamzoo.evaluation.moments.submissions import read_submission, write_submission

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "qvhighlights"
STORED = ["moment_detr_sample.val", "moment_detr_clip.val", "qd_detr_clip.val"]


def lines(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("name", STORED)
def test_published_submissions_score_as_by_the_official_tool(name: str) -> None:
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is not here")
    expected = json.loads((DATA / "preds_metrics.json").read_text())[name]["moment_detr_standalone_eval"]
    predictions, annotations = (
        lines(DATA / "preds" / f"{name}.jsonl.gz"),
        lines(DATA / "highlight_val_release.jsonl.gz"),
    )
    start = time.process_time()
    assert moment_metrics(predictions, annotations) == expected
    assert time.process_time() - start < 20


def annotation(qid: int = 1, windows: tuple[tuple[int, int], ...] = ((0, 8),), duration: int = 20) -> dict[str, Any]:
    clips = sorted({clip for start, end in windows for clip in range(start // 2, end // 2)})
    return {
        "qid": qid,
        "duration": duration,
        "relevant_windows": [list(window) for window in windows],
        "relevant_clip_ids": clips,
        "saliency_scores": [[4, 2, 0] for _ in clips],
    }


def prediction(qid: int = 1, windows: tuple[tuple[float, float, float], ...] = ((0, 8, 0.9),)) -> dict[str, Any]:
    saliency = [1.0] * 4 + [0.0] * 6
    return {"qid": qid, "pred_relevant_windows": [list(window) for window in windows], "pred_saliency_scores": saliency}


def test_the_right_answer_scores_all_there_is() -> None:
    metrics = moment_metrics([prediction()], [annotation()])
    assert set(metrics["full"]["MR-mAP"].values()) == set(metrics["short"]["MR-R1"].values()) == {100.0}
    assert metrics["HL-min-VeryGood"] == {"HL-mAP": 33.33, "HL-Hit1": 100.0}  # one annotator of three gave it
    assert metrics["HL-min-Fair"] == {"HL-mAP": 66.67, "HL-Hit1": 100.0}
    assert list(metrics["brief"])[:3] == ["MR-full-R1@0.5", "MR-full-R1@0.7", "MR-full-mAP"]


def test_predictions_may_be_arrays() -> None:
    arrays = {key: np.array(value, np.float32) if key != "qid" else value for key, value in prediction().items()}
    assert moment_metrics([arrays], [annotation()]) == moment_metrics([prediction()], [annotation()])


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_submission_is_read_back(name: str, tmp_path: Path) -> None:
    write_submission(tmp_path / name, [prediction()])
    assert read_submission(tmp_path / name) == [prediction()]
    assert (tmp_path / name).read_bytes().startswith(b"\x1f\x8b") == name.endswith(".gz")


def test_lengths_are_scored_apart() -> None:
    truth = annotation(windows=((0, 8), (0, 20)))  # a short one, and one in the middle
    metrics = moment_metrics([prediction()], [truth])
    assert metrics["short"]["MR-mAP"]["average"] == 100.0
    assert metrics["middle"]["MR-mAP"]["average"] == 0.0
    assert metrics["full"]["MR-mAP"]["average"] == 50.0
    assert metrics["full"]["MR-R1"]["0.95"] == 100.0  # of the nearest
    assert metrics["long"]["MR-mAP"]["average"] == 0.0  # no query has one


def test_the_first_window_counts_for_recall_and_the_scores_for_precision() -> None:
    metrics = moment_metrics([prediction(windows=((10, 18, 0.1), (0, 8, 0.9)))], [annotation()])
    assert metrics["full"]["MR-R1"]["0.5"] == 0.0
    assert metrics["full"]["MR-mAP"]["0.5"] == 100.0


def test_half_an_overlap_is_half_however_it_rounds() -> None:
    found = prediction(windows=((7.8, 54.1, 0.9),))
    found["pred_saliency_scores"] = [0.0] * 38
    metrics = moment_metrics([found], [annotation(windows=((20, 76),), duration=76)])
    assert metrics["full"]["MR-R1"]["0.5"] == 100.0  # 34.1 of 68.2 seconds; the lengths' sum rounds to less


def test_a_true_window_is_found_once() -> None:
    metrics = moment_metrics([prediction(windows=((0, 8, 0.9), (0, 8, 0.8)))], [annotation(windows=((0, 8), (10, 18)))])
    assert metrics["full"]["MR-mAP"]["0.5"] == 50.0


def test_what_was_not_predicted_or_graded_is_not_scored() -> None:
    windows, saliencies, ungraded = prediction(), prediction(), annotation()
    del windows["pred_saliency_scores"], saliencies["pred_relevant_windows"], ungraded["saliency_scores"]
    assert "HL-min-Fair" not in moment_metrics([windows], [annotation()])
    assert set(moment_metrics([saliencies], [annotation()])) == {
        "brief", "HL-min-Fair", "HL-min-Good", "HL-min-VeryGood",
    }  # fmt: skip
    assert set(moment_metrics([prediction()], [ungraded])) == {"brief", "full", "long", "middle", "short"}
    with pytest.raises(DataError, match="nothing can be scored"):
        moment_metrics([saliencies], [ungraded])


@pytest.mark.parametrize("clips", [8, 9, 11, 12, 75])
def test_saliencies_may_end_with_the_features_or_the_longest_video(clips: int) -> None:
    answer = prediction() | {"pred_saliency_scores": ([1.0] * 4 + [0.0] * 80)[:clips]}
    other = annotation(2, duration=150)
    metrics = moment_metrics([answer, prediction(2) | {"pred_saliency_scores": [0.0] * 75}], [annotation(), other])
    assert metrics["HL-min-Fair"]["HL-Hit1"] == 100.0


spans = st.tuples(st.integers(0, 20), st.integers(1, 10)).map(lambda span: (span[0], span[0] + span[1]))


@given(st.lists(spans, min_size=1, max_size=4), st.lists(st.tuples(spans, st.floats(0, 1)), min_size=1, max_size=10))
def test_the_precision_of_windows_is_that_written_out(truth: list[Any], windows: list[Any]) -> None:
    predicted = np.array([(*span, score) for span, score in windows], dtype=float)
    found = _window_precision(predicted, np.array(truth, dtype=float))
    ranked = sorted(windows, key=lambda window: -window[1])
    for level, threshold in enumerate(0.5 + 0.05 * np.arange(10)):
        left, right = list(enumerate(truth)), []
        for (start, end), _ in ranked:
            overlaps = []
            for which, (other_start, other_end) in left:
                shared = max(0, min(end, other_end) - max(start, other_start))
                overlaps.append((shared / (end - start + other_end - other_start - shared), which))
            best = max(overlaps, default=(0.0, -1))
            right.append(best[0] >= round(threshold, 2))
            if right[-1]:
                left = [(which, span) for which, span in left if which != best[1]]
        precisions = [sum(right[: n + 1]) / (n + 1) for n in range(len(right))]
        expected = sum(max(precisions[n:]) for n in range(len(right)) if right[n]) / len(truth)
        assert found[level] == pytest.approx(expected)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_precision_of_clips_is_that_written_out(clips: list[tuple[bool, int]]) -> None:
    good, scores = np.array([g for g, _ in clips]), np.array([s for _, s in clips], dtype=float)
    curve = []  # recall and precision at each distinct score
    for threshold in sorted(set(scores), reverse=True):
        above = scores >= threshold
        curve.append((int(good[above].sum()), good[above].mean()))
    steps = [n for n in range(len(curve)) if curve[n][0] > (curve[n - 1][0] if n else 0)]
    best = [max(precision for _, precision in curve[n:]) for n in steps]
    expected = float(good.all()) if len(set(good)) == 1 else float(np.mean(best))
    assert _clip_precision(good, scores) == pytest.approx(expected)


def changed(**changes: Any) -> list[dict[str, Any]]:
    return [prediction() | changes]


@pytest.mark.parametrize(
    ("predictions", "says"),
    [
        ([], "lack 1 of 1 queries, such as qid 1"),
        ([{}], "Prediction 0 has no qid"),
        (changed(qid=7), "qid 7, which is not annotated"),
        ([prediction(), prediction()], "qid 1 twice"),
        (changed(vid="other"), "qid 1 is of the video 'other', and the data has"),
        (changed(pred_relevant_windows=[]), "qid 1 has no windows"),
        (changed(pred_relevant_windows=[[0, 8]]), r"window \[0, 8\]; a window is \[start, end, score\]"),
        (changed(pred_relevant_windows=[[0, float("nan"), 1]]), "three finite numbers"),
        (changed(pred_relevant_windows=[[0, "8", 1]]), "three finite numbers"),
        (changed(pred_relevant_windows=[[8, 2, 1]]), r"\[8, 2, 1\], which ends before it begins"),
        (changed(pred_relevant_windows=[[30, 40, 1]]), r"\[30, 40, 1\], outside its video of 20 s"),
        (changed(pred_relevant_windows=[[-9, 4, 1]]), "outside its video of 20 s"),
        (changed(pred_saliency_scores=[0.0] * 5), r"qid 1 has 5 saliencies, and its video has 10 clips of 2 s"),
        (changed(pred_saliency_scores=[]), "has 0 saliencies"),
        (changed(qid="7"), "qid '7', which is not annotated"),
        (changed(pred_saliency_scores=[float("inf")] * 10), "a saliency that is not a finite number"),
        (changed(pred_saliency_scores=[10**400] * 10), "a saliency that is not a finite number"),
    ],
)
def test_a_malformed_submission_is_named(predictions: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        moment_metrics(predictions, [annotation() | {"vid": "v"}])
    assert "\n" not in str(caught.value)


def test_nothing_that_was_given_is_changed() -> None:
    predictions, annotations = [prediction(windows=((10, 18, 0.1), (0, 8, 0.9)))], [annotation()]
    before = copy.deepcopy((predictions, annotations))
    moment_metrics(predictions, annotations)
    assert (predictions, annotations) == before


@pytest.mark.parametrize(
    ("annotations", "says"),
    [
        ([], "empty or have a qid twice"),
        ([annotation(), annotation()], "empty or have a qid twice"),
        ([annotation() | {"relevant_windows": []}], "qid 1 has no relevant_windows"),
    ],
)
def test_malformed_annotations_are_named(annotations: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(DataError, match=says):
        moment_metrics([prediction()], annotations)
