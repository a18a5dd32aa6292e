"""The report that a run of text-video retrieval ends with: its scores in Markdown and JSON, and its curves."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import timm
import torch

import lamzoo
from lamzoo.errors import DataError, MissingExtraError
from lamzoo.evaluation.retrieval import WAYS
from lamzoo.files import atomic_files

_logger = logging.getLogger(__name__)

_COLUMNS = ("R1", "R5", "R10", "R50", "MedianR", "MeanR")


def write_retrieval_report(folder: Path, facts: dict[str, Any], history: list[dict[str, float]]) -> None:
    """Writes ``report.md``, ``report.json`` and, where matplotlib is installed, ``curves.png`` into a folder.

    Args:
        folder: made where it isn't there.
        facts: about the run, as plain values; ``scores`` among them are metrics of ``retrieval_metrics`` by split.
        history: one record an epoch.

    Raises:
        DataError: a file can't be written there.
    """
    from lamzoo.report.curves import draw_curves

    facts = facts | {"versions": {"lamzoo": lamzoo.__version__, "torch": torch.__version__, "timm": timm.__version__}}
    lines = ["# Training report", "", "| | |", "|---|---|"]
    lines += [f"| {key.replace('_', ' ')} | {_cell(value)} |" for key, value in facts.items() if key != "scores"]
    lines += ["", f"| split | | {' | '.join(_COLUMNS)} |", f"|---|---|{'---:|' * len(_COLUMNS)}"]
    for split, metrics in facts["scores"].items():
        for way, name in WAYS.items():
            lines.append(f"| {split} | {name} | {' | '.join(f'{metrics[way][key]:.1f}' for key in _COLUMNS)} |")
    lines += ["", "Recall in percent, ranks from 1. The weights are those of the last epoch, not of the best.", ""]
    with atomic_files(DataError) as stage:
        try:
            figure = draw_curves(history, "eval_t2v_R1", "text to video R@1, validation (%)")
            figure.savefig(stage(folder / "curves.png"), format="png")
            lines += ["![curves](curves.png)", ""]
        except MissingExtraError as error:
            _logger.warning("the report has no curves: %s", error)
        stage(folder / "report.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", "utf-8")
        stage(folder / "report.md").write_text("\n".join(lines), "utf-8")


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return " ".join(text.replace("|", "\\|").split())
