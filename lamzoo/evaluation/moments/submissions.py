"""Submissions in QVHighlights' official format: JSON Lines with one object per query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lamzoo.data.json_files import check_fields, read_json_lines
from lamzoo.data.moments import MomentDataset
from lamzoo.errors import DataError
from lamzoo.evaluation.moments.metrics import moment_metrics
from lamzoo.files import write_data
from lamzoo.reading import to_json
from lamzoo.tasks.base import Evaluation

_LISTS = ("pred_relevant_windows", "pred_saliency_scores")


def read_submission(path: str | Path) -> list[dict[str, Any]]:
    """Reads a submission, gzipped or not; :func:`lamzoo.evaluation.moment_metrics` validates the values.

    Raises:
        DataError: the file does not exist, or a line is not a JSON object with a qid, or a field is not a list.
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
    """Writes a submission atomically, gzipped if the name ends in ``.gz``.

    Raises:
        DataError: the file can't be written.
    """
    write_data(path, "".join(to_json(prediction) + "\n" for prediction in predictions).encode())
