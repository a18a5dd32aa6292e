"""What a run reports while it trains, and at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Progress:
    """Progress of a run, passed to the callback after each update and each evaluation.

    Attributes:
        epoch: current epoch, from 0.
        epochs: total number of epochs.
        update: number of optimiser updates so far.
        updates: total number of updates.
        loss: mean training loss of the epoch, updated at least twice a second.
        metric: name of the watched metric, such as ``"top1"``.
        value: its value in the last evaluation; None before the first one.
        scores: scores of the last evaluation by name; empty before the first one.
    """

    epoch: int
    epochs: int
    update: int
    updates: int
    loss: float
    metric: str
    value: float | None
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainResult:
    """The result of a training run.

    Attributes:
        output: the run's folder.
        model: folder of the trained model, for ``create_model("local-dir:...")``.
        history: one record per epoch, as in ``metrics.csv``.
        scores: scores of the trained model by split: the one scored during the run, and the recipe's ``test_split``; a
            :class:`lamzoo.training.Score` for classification, else the result of
            :func:`lamzoo.evaluation.retrieval_metrics`, :func:`lamzoo.evaluation.moment_metrics` or
            :func:`lamzoo.evaluation.captions.evaluate.caption_scores`.
        report: path of ``report.md``; None without a report.
        left_out: number of unreadable inputs that were left out.
        epoch: epoch of the model's weights, from 1.
        about: a sentence on the choice of these weights.
        masks: folder of the masks and the classifier of this model, for :func:`lamzoo.load_lam`, if nothing else was
            trained.
    """

    output: Path
    model: Path
    history: list[dict[str, float]]
    scores: dict[str, Any] = field(default_factory=dict)
    report: Path | None = None
    left_out: int = 0
    epoch: int = 0
    about: str = ""
    masks: Path | None = None
