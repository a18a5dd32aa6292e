"""The report that a run of retrieval, moments or captions ends with: scores in Markdown and JSON, and curves."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from lamzoo.errors import DataError, MissingExtraError
from lamzoo.evaluation.retrieval.metrics import WAYS
from lamzoo.files import atomic_files
from lamzoo.version import __version__

_logger = logging.getLogger(__name__)

_RANKS = ("R1", "R5", "R10", "R50", "MedianR", "MeanR")


def write_score_report(
    folder: Path,
    facts: Mapping[str, Any],
    scores: Mapping[str, Any],
    table: Sequence[str],
    history: list[dict[str, float]],
    curve: tuple[str, str],
    about_weights: str,
) -> None:
    """Writes ``report.md``, ``report.json`` and, where matplotlib is installed, ``curves.png`` into a folder.

    Args:
        folder: made where it isn't there.
        facts: about the run, as plain values.
        scores: by split, as plain values, for the JSON.
        table: the same as lines of Markdown.
        history: one record an epoch.
        curve: the score that is drawn, its key in the history and its name.
        about_weights: a sentence on which epoch's weights the model has.

    Raises:
        DataError: a file can't be written there.
    """
    from lamzoo.report.curves import draw_curves

    versions = {"lamzoo": __version__, "torch": torch.__version__, "timm": timm.__version__}
    facts = {**facts, "versions": versions}
    lines = ["# Training report", "", "| | |", "|---|---|"]
    lines += [f"| {key.replace('_', ' ')} | {_cell(value)} |" for key, value in facts.items()]
    lines += ["", *table, "", about_weights, ""]
    with atomic_files(DataError) as stage:
        try:
            draw_curves(history, *curve).savefig(stage(folder / "curves.png"), format="png")
            lines += ["![curves](curves.png)", ""]
        except MissingExtraError as error:
            _logger.warning("the report has no curves: %s", error)
        text = json.dumps({**facts, "scores": scores}, indent=2, ensure_ascii=False)
        stage(folder / "report.json").write_text(text + "\n", "utf-8")
        stage(folder / "report.md").write_text("\n".join(lines), "utf-8")


def retrieval_table(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Writes metrics of :func:`lamzoo.evaluation.retrieval_metrics`, by split, as a table."""
    lines = [f"| split | | {' | '.join(_RANKS)} |", f"|---|---|{'---:|' * len(_RANKS)}"]
    for split, metrics in scores.items():
        for way, name in WAYS.items():
            lines.append(f"| {split} | {name} | {' | '.join(f'{metrics[way][key]:.1f}' for key in _RANKS)} |")
    return [*lines, "", "Recall in percent, ranks from 1."]


def moment_table(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Writes metrics of :func:`lamzoo.evaluation.moment_metrics`, by split, as a table of what is brief in them."""
    keys = list(dict.fromkeys(key for metrics in scores.values() for key in metrics["brief"]))
    lines = [f"| split | {' | '.join(keys)} |", f"|---|{'---:|' * len(keys)}"]
    for split, metrics in scores.items():
        brief = metrics["brief"]
        lines.append(f"| {split} | {' | '.join(f'{brief[key]:.2f}' for key in keys)} |")
    return [*lines, "", "All in percent, as QVHighlights' official tool computes it."]


def caption_table(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Writes metrics of :func:`lamzoo.evaluation.captions.evaluate.caption_scores`, by split, as a table."""
    keys = list(dict.fromkeys(key for metrics in scores.values() for key in metrics))
    lines = [f"| split | {' | '.join(keys)} |", f"|---|{'---:|' * len(keys)}"]
    for split, metrics in scores.items():
        lines.append(f"| {split} | {' | '.join(f'{metrics[key]:.3f}' for key in keys)} |")
    return [*lines, "", "Word error rate and sentence accuracy in percent, the others as COCO's tools give them."]


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return " ".join(text.replace("|", "\\|").split())
