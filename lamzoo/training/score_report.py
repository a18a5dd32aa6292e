"""The report of a run: scores in Markdown and JSON, and training curves."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch

from lamzoo.errors import DataError, MissingExtraError
from lamzoo.escaping import markdown
from lamzoo.files import atomic_files
from lamzoo.reading import to_json
from lamzoo.tasks import MetricSpec, ScoreTable, Task
from lamzoo.version import __version__

_logger = logging.getLogger(__name__)


def write_score_report(
    folder: Path,
    facts: Mapping[str, Any],
    scores: Mapping[str, Any],
    task: Task,
    metric: MetricSpec,
    history: list[dict[str, float]],
    about_weights: str,
) -> None:
    """Writes ``report.md``, ``report.json`` and, where matplotlib is installed, ``curves.png`` into a folder.

    Args:
        folder: output folder; created if needed.
        facts: facts about the run, as plain values.
        scores: scores by split, as plain values.
        task: the run's task.
        metric: the watched metric, whose curve is drawn.
        history: one record per epoch.
        about_weights: a sentence on the epoch of the model's weights.

    Raises:
        DataError: a file can't be written there.
    """
    from lamzoo.report.curves import draw_curves

    versions = {"lamzoo": __version__, "torch": torch.__version__, "timm": timm.__version__}
    facts = {**facts, "versions": versions}
    lines = ["# Training report", "", "| | |", "|---|---|"]
    lines += [f"| {markdown(key.replace('_', ' '))} | {_cell(value)} |" for key, value in facts.items()]
    lines += ["", *_table(task.score_table(scores)), "", markdown(about_weights), ""]
    with atomic_files(DataError) as stage:
        try:
            draw_curves(history, f"eval_{metric.name}", f"{metric.heading}, validation").savefig(
                stage(folder / "curves.png"), format="png"
            )
            lines += ["![curves](curves.png)", ""]
        except MissingExtraError as error:
            _logger.warning("the report has no curves: %s", error)
        text = to_json({**facts, "scores": scores}, indent=2)
        stage(folder / "report.json").write_text(text + "\n", "utf-8")
        stage(folder / "report.md").write_text("\n".join(lines), "utf-8")


def _table(table: ScoreTable) -> list[str]:
    texts = [index == 0 or not heading for index, heading in enumerate(table.columns)]
    rule = "".join("---|" if text else "---:|" for text in texts)
    lines = [f"| {' | '.join(map(markdown, cells))} |" for cells in (table.columns, *table.rows)]
    return [lines[0], f"|{rule}", *lines[1:], *(["", table.note] if table.note else [])]


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return markdown(", ".join(f"{key} {entry}" for key, entry in value.items()))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else markdown(str(value))
