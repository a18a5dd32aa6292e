"""QVHighlights' official metrics for moments and highlights, from predictions and annotations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lamzoo.data.json_files import is_number
from lamzoo.data.moments.base import MARGIN
from lamzoo.errors import DataError
from lamzoo.tasks.base import MetricSpec, ScoreTable, metric_table

Array: TypeAlias = NDArray[np.float64]
Metrics: TypeAlias = dict[str, Any]

CLIP_SECONDS = 2.0
_THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
_LENGTHS = {"short": (0, 10), "middle": (10, 30), "long": (30, 150), "full": None}
_GRADES = {"Fair": 2, "Good": 3, "VeryGood": 4}
_MOST_WINDOWS = 10  # per query, evaluated by mean average precision


def moment_metrics(predictions: Sequence[Mapping[str, Any]], annotations: Sequence[Mapping[str, Any]]) -> Metrics:
    """Computes the metrics of QVHighlights' official tool, digit for digit (Lei et al., arXiv 2107.09609, section 4).

    A window is correct at a threshold if its intersection over union with a ground-truth window reaches it. ``R1``
    compares the first window of a query with the ground-truth window nearest to it; ``mAP`` evaluates the ten windows
    with the highest scores. ``short`` (up to 10 s), ``middle`` (up to 30 s) and ``long`` (up to 150 s) restrict the
    evaluation to ground-truth windows of that length and their queries. ``HL-min-...`` treats a clip as positive if an
    annotator gave it at least that grade, for each of the three annotators separately: ``HL-mAP`` is the mean average
    precision of the clip ranking, ``HL-Hit1`` whether the highest ranked clip is positive.

    Args:
        predictions: one per query, in any order: ``qid``; ``pred_relevant_windows``, a list of ``[start, end, score]``
            in seconds, best first; and ``pred_saliency_scores``, one number per two-second clip. Predictions with only
            one of the two are scored on that one.
        annotations: ``qid``, ``duration`` in seconds, ``relevant_windows``, ``relevant_clip_ids`` and
            ``saliency_scores``, three grades from 0 to 4 for each of those clips. Without the last two, highlights are
            not scored.

    Returns:
        The official tool's dictionary: ``brief``, ``HL-min-Fair``, ``HL-min-Good``, ``HL-min-VeryGood``, ``full``,
        ``long``, ``middle`` and ``short``, in percent with two decimals.

    Raises:
        DataError: a query has no prediction or two, a prediction matches no query, there are no windows, a window or
            score is not a number, a clip does not have three grades, a window ends before it begins or lies outside the
            video, or the number of saliencies is wrong. A window may extend to the end of the longest video, and the
            number of saliencies may be off by two, as in published submissions; missing ones count as zero.
    """
    truth = {annotation["qid"]: annotation for annotation in annotations}
    if len(truth) != len(annotations) or not truth:
        raise DataError("The annotations are empty or have a qid twice; give each query once.")
    for qid, annotation in truth.items():
        if not annotation["relevant_windows"]:
            raise DataError(f"The annotation of qid {qid} has no relevant_windows; remove the query.")
    found = _by_query(predictions, truth)
    metrics: Metrics = {}
    if all("pred_relevant_windows" in prediction for prediction in found.values()):
        _check_windows(found, truth)
        metrics |= {name: _moments(found, _of_length(truth, bounds)) for name, bounds in _LENGTHS.items()}
    if all("pred_saliency_scores" in prediction for prediction in found.values()) and all(
        "saliency_scores" in annotation for annotation in truth.values()
    ):
        check_grades(annotations)
        _check_saliencies(found, truth)
        metrics |= _highlights(found, truth)
    if not metrics:
        raise DataError(
            "The predictions have neither pred_relevant_windows for every query nor pred_saliency_scores with "
            "annotated grades; nothing can be scored."
        )
    return {"brief": _brief(metrics)} | dict(sorted(metrics.items()))


def score_table(scores: Mapping[str, Mapping[str, Any]]) -> ScoreTable:
    """Returns the brief metrics of :func:`moment_metrics` as a table with one row per split."""
    keys = list(dict.fromkeys(key for of_split in scores.values() for key in of_split["brief"]))
    columns = (key.removeprefix("MR-full-").removeprefix("MR-").removeprefix("HL-min-") for key in keys)
    specs = [MetricSpec(key, ("brief", key), heading) for key, heading in zip(keys, columns, strict=True)]
    return metric_table(specs, scores, note="All in percent, as QVHighlights' official tool computes it.")


def check_grades(annotations: Sequence[Mapping[str, Any]]) -> None:
    """Validates the grades that highlights are scored against.

    Args:
        annotations: as of :func:`moment_metrics`; skipped if one has no ``saliency_scores``.

    Raises:
        DataError: a relevant clip does not have three grades, or lies outside the video.
    """
    for annotation in annotations if all("saliency_scores" in each for each in annotations) else ():
        qid, clips, grades = (annotation[key] for key in ("qid", "relevant_clip_ids", "saliency_scores"))
        total = _num_clips(annotation)
        if len(clips) != len(grades) or not all(isinstance(clip, int) and 0 <= clip < total for clip in clips):
            raise DataError(
                f"The annotation of qid {qid} has {len(grades)} saliency_scores for the relevant_clip_ids {clips}, of "
                f"a video of {total} clips; they must agree."
            )
        if not all(len(each) == 3 and all(map(is_number, each)) for each in grades):
            raise DataError(
                f"The annotation of qid {qid} has a clip without three grades in its saliency_scores; remove both "
                "to score moments only."
            )


def _by_query(predictions: Sequence[Mapping[str, Any]], truth: Mapping[Any, Any]) -> dict[Any, Mapping[str, Any]]:
    found: dict[Any, Mapping[str, Any]] = {}
    for number, prediction in enumerate(predictions):
        if "qid" not in prediction:
            raise DataError(f"Prediction {number} has no qid; give the query that it answers.")
        qid = prediction["qid"]
        if qid in found:
            raise DataError(f"The predictions have qid {qid} twice; remove one.")
        if qid not in truth:
            raise DataError(
                f"The predictions have qid {qid!r}, which is not annotated; do they belong to another split?"
            )
        video, own = prediction.get("vid"), truth[qid].get("vid")  # other data may number its queries alike
        if video is not None and own is not None and video != own:
            raise DataError(
                f"The prediction for qid {qid} is of the video {video!r:.60}, and the data has {own!r:.60}; score it "
                "on the data that it was made for."
            )
        found[qid] = prediction
    missing = [qid for qid in truth if qid not in found]
    if missing:
        few = ", ".join(map(str, missing[:3]))
        raise DataError(f"The predictions lack {len(missing)} of {len(truth)} queries, such as qid {few}.")
    return found


def _check_windows(found: Mapping[Any, Mapping[str, Any]], truth: Mapping[Any, Mapping[str, Any]]) -> None:
    latest = max(annotation["duration"] for annotation in truth.values()) + CLIP_SECONDS
    for qid, prediction in found.items():
        windows = prediction["pred_relevant_windows"]
        if windows is None or not len(windows):
            raise DataError(f"The prediction for qid {qid} has no windows; give at least one.")
        for window in windows:
            what = f"The prediction for qid {qid} has the window {window}"
            whole = isinstance(window, (Sequence, np.ndarray)) and len(window) == 3
            if not whole or not all(is_number(value) for value in window):
                raise DataError(f"{what}; a window is [start, end, score], three finite numbers.")
            start, end, _ = window
            if start > end:
                raise DataError(f"{what}, which ends before it begins.")
            if end < 0 or start < -CLIP_SECONDS or end > latest:
                duration = truth[qid]["duration"]
                raise DataError(f"{what}, outside its video of {duration:g} s; windows are in seconds.")


def _check_saliencies(found: Mapping[Any, Mapping[str, Any]], truth: Mapping[Any, Mapping[str, Any]]) -> None:
    longest = max(_num_clips(annotation) for annotation in truth.values())
    for qid, prediction in found.items():
        scores, clips = prediction["pred_saliency_scores"], _num_clips(truth[qid])
        scores = () if scores is None else scores
        if not all(is_number(score) for score in scores):
            raise DataError(f"The prediction for qid {qid} has a saliency that is not a finite number.")
        # Some models predict for the longest video, regardless of this one's length.
        if all(abs(len(scores) - right) > MARGIN for right in (clips, longest)) or not len(scores):
            raise DataError(
                f"The prediction for qid {qid} has {len(scores)} saliencies, and its video has {clips} clips of "
                f"{CLIP_SECONDS:g} s; give one per clip."
            )


def _of_length(truth: Mapping[Any, Mapping[str, Any]], bounds: tuple[int, int] | None) -> dict[Any, Array]:
    """Returns the ground-truth windows ``(windows, 2)`` with lengths above the lower and up to the upper bound."""
    windows = {qid: np.array(annotation["relevant_windows"], dtype=float) for qid, annotation in truth.items()}
    if bounds is None:
        return windows
    shorter, longest = bounds
    kept = {}
    for qid, of_query in windows.items():
        lengths = of_query[:, 1] - of_query[:, 0]
        inside = (lengths > shorter) & (lengths <= longest)
        if inside.any():
            kept[qid] = of_query[inside]
    return kept


def _moments(found: Mapping[Any, Mapping[str, Any]], truth: Mapping[Any, Array]) -> Metrics:
    precisions, hits = [], []
    for qid, true_windows in truth.items():
        windows = np.array(found[qid]["pred_relevant_windows"], dtype=float)
        precisions.append(_window_precision(windows[:_MOST_WINDOWS], true_windows))
        nearest = true_windows[_overlap(windows[:1, :2], true_windows).argmax()]
        hits.append(_paired_overlap(windows[0, :2], nearest) >= np.array(_THRESHOLDS))
    if not truth:
        precisions, hits = [np.zeros(len(_THRESHOLDS))], [np.zeros(len(_THRESHOLDS), dtype=bool)]
    precision = np.array(precisions).mean(axis=0)
    names = [str(threshold) for threshold in _THRESHOLDS]
    return {
        "MR-mAP": {**dict(zip(names, map(_percent, precision), strict=True)), "average": _percent(precision.mean())},
        "MR-R1": dict(zip(names, map(_percent, np.array(hits).mean(axis=0)), strict=True)),
    }


def _window_precision(windows: Array, true_windows: Array) -> Array:
    """Returns ActivityNet's interpolated average precision of windows ``(n, 3)`` at each threshold."""
    windows = windows[np.argsort(-windows[:, 2], kind="stable")]
    overlaps = _overlap(windows[:, :2], true_windows)
    right = np.zeros((len(_THRESHOLDS), len(windows)))
    taken = np.zeros((len(_THRESHOLDS), len(true_windows)), dtype=bool)
    for number, overlap in enumerate(overlaps):
        nearest_first = overlap.argsort()[::-1]
        for level, threshold in enumerate(_THRESHOLDS):
            for which in nearest_first:
                if overlap[which] < threshold:
                    break
                if not taken[level, which]:  # each true window is matched once
                    taken[level, which] = True
                    right[level, number] = 1
                    break
    found = right.cumsum(axis=1)
    precision = found / np.arange(1, len(windows) + 1)
    recall = found / len(true_windows)
    return np.array([_interpolated(*curve) for curve in zip(precision, recall, strict=True)])


def _interpolated(precision: Array, recall: Array) -> float:
    """Returns the area under the interpolated precision-recall curve."""
    precision = np.concatenate([[0.0], precision, [0.0]])
    recall = np.concatenate([[0.0], recall, [1.0]])
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.flatnonzero(np.diff(recall))
    return float(np.sum((recall[steps + 1] - recall[steps]) * precision[steps + 1]))


def _overlap(windows: Array, others: Array) -> Array:
    """Returns the intersection over union ``(n, m)`` of windows ``(n, 2)`` and ``(m, 2)``; 0 where both are empty."""
    (start, end), (other_start, other_end) = (x.T for x in (windows, others))
    shared = np.clip(np.minimum.outer(end, other_end) - np.maximum.outer(start, other_start), 0, None)
    union = np.add.outer(end - start, other_end - other_start) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union != 0)


def _paired_overlap(window: Array, other: Array) -> float:
    """As :func:`_overlap`, of ``(2,)`` each, with the union that the official tool has here, which rounds otherwise."""
    shared = min(window[1], other[1]) - max(window[0], other[0])
    union = max(window[1], other[1]) - min(window[0], other[0])
    return float(shared / union) if shared > 0 else 0.0


def _highlights(found: Mapping[Any, Mapping[str, Any]], truth: Mapping[Any, Mapping[str, Any]]) -> Metrics:
    grades = {qid: _clip_grades(annotation) for qid, annotation in truth.items()}
    metrics = {}
    for name, least in _GRADES.items():
        hits, precisions = [], []
        for qid, of_clips in grades.items():
            scores = np.array(found[qid]["pred_saliency_scores"], dtype=float)
            good = of_clips >= least
            best = int(scores.argmax())
            hits.append(bool(best < len(good) and good[best].any()))
            fitted = np.zeros(len(good))
            fitted[: len(scores)] = scores[: len(good)]
            precisions += [_clip_precision(by_one, fitted) for by_one in good.T]
        metrics[f"HL-min-{name}"] = {"HL-mAP": _percent(np.mean(precisions)), "HL-Hit1": _percent(np.mean(hits))}
    return metrics


def _clip_grades(annotation: Mapping[str, Any]) -> NDArray[np.int64]:
    """Returns the three annotators' grades, ``(clips, 3)``, 0 for clips that are not relevant."""
    grades = np.zeros((_num_clips(annotation), 3), dtype=np.int64)
    grades[annotation["relevant_clip_ids"]] = annotation["saliency_scores"]
    return grades


def _clip_precision(good: NDArray[np.bool_], scores: Array) -> float:
    """Returns the official average precision of a clip ranking.

    It is the mean of the interpolated precision over the recall steps.
    """
    if good.all() or not good.any():
        return float(good.all())
    order = np.argsort(-scores, kind="stable")
    last_of_ties = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    found = good[order].cumsum()[last_of_ties]
    precision = np.maximum.accumulate((found / (last_of_ties + 1))[::-1])[::-1]
    steps = np.flatnonzero(np.diff(found, prepend=0))
    return float(precision[steps].mean())


def _num_clips(annotation: Mapping[str, Any]) -> int:
    return int(annotation["duration"] / CLIP_SECONDS)


def _percent(share: float | np.floating[Any]) -> float:
    return float(f"{100 * float(share):.2f}")


def _brief(metrics: Metrics) -> dict[str, float]:
    brief: dict[str, float] = {}
    if "full" in metrics:
        full = metrics["full"]
        brief |= {f"MR-full-R1@{level}": full["MR-R1"][level] for level in ("0.5", "0.7")}
        brief["MR-full-mAP"] = full["MR-mAP"]["average"]
        brief |= {f"MR-full-mAP@{level}": full["MR-mAP"][level] for level in ("0.5", "0.75")}
        brief |= {f"MR-{name}-mAP": metrics[name]["MR-mAP"]["average"] for name in ("long", "middle", "short")}
    for grade in _GRADES:
        scores: Mapping[str, float] = metrics.get(f"HL-min-{grade}", {})
        brief |= {f"HL-min-{grade}-{key.removeprefix('HL-')}": value for key, value in scores.items()}
    return brief
