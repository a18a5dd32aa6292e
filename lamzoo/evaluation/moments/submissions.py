"""Submissions in the official form of QVHighlights: one JSON object a line and query."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lamzoo.data.json_files import check_fields, read_json_lines
from lamzoo.data.moments import MomentDataset
from lamzoo.errors import DataError
from lamzoo.evaluation.moments.metrics import moment_metrics
from lamzoo.files import atomic_files
from lamzoo.tasks.base import Evaluation

_LISTS = ("pred_relevant_windows", "pred_saliency_scores")


def read_submission(path: str | Path) -> list[dict[str, Any]]:
    """Reads a submission, gzipped or not; :func:`lamzoo.evaluation.moment_metrics` checks what the lines say.

    Raises:
        DataError: there is no such file, or a line is no JSON object with a qid, or has no list where one belongs.
    """
    predictions = []
    for line, where in read_json_lines(Path(path)):
        if "qid" not in line:
            raise DataError(f"{where} has no qid; give the query that it answers")
        check_fields(line, {"qid": int | str}, where)
        for key in _LISTS:
            if not isinstance(line.get(key, []), list):
                raise DataError(f"{where}: {key} is not a list")
        predictions.append(line)
    return predictions


def score_submission(path: str | Path, dataset: MomentDataset) -> Evaluation:
    """Scores a submission as ``lamzoo eval FILE.jsonl`` does.

    Raises:
        DataError: as of :func:`read_submission` and :func:`lamzoo.evaluation.moment_metrics`.
    """
    metrics = moment_metrics(read_submission(path), dataset.annotations())
    record = {"submission": str(path), "queries": len(dataset), "metrics": metrics}
    return Evaluation(metrics, f"{len(dataset):,} queries", record)


def write_submission(path: str | Path, predictions: Sequence[Mapping[str, Any]]) -> None:
    """Writes a submission, all of it or nothing.

    Raises:
        DataError: the file can't be written there.
    """
    text = "".join(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions)
    with atomic_files(DataError) as stage:
        stage(Path(path)).write_text(text, encoding="utf-8")
