"""Training curves and confusion matrices with matplotlib, without pyplot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lamzoo.escaping import printable
from lamzoo.report.mpl import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMED = 60  # maximum number of classes for tick labels
_COUNTED = 25  # maximum number of classes for numbers in the cells
_INK, _PALE = "#1b3a57", "#c8553d"


def draw_curves(
    history: Sequence[dict[str, float]], metric: str = "eval_top1", label: str = "top-1, validation (%)"
) -> Figure:
    """Draws losses and a score over the epochs.

    Args:
        history: one record per epoch, with ``epoch``, ``train_loss`` and, if the epoch was evaluated, the metric and,
            for some tasks, ``eval_loss``.
        metric: key of the score.
        label: label of the score axis.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = new_figure((8.0, 3.2))
    losses, scores = figure.subplots(1, 2)
    _line(losses, history, "train_loss", "training (augmented)", _PALE)
    _line(losses, history, "eval_loss", "validation", _INK)
    losses.set_ylabel("loss")
    losses.legend(frameon=False, fontsize=8)
    _line(scores, history, metric, "validation", _INK)
    scores.set_ylabel(label)
    for axis in (losses, scores):
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


def draw_confusion(counts: NDArray[np.int64], names: Sequence[str], title: str) -> Figure:
    """Draws a confusion matrix, coloured by the share of each class.

    Args:
        counts: ``(classes, classes)``; row ``i`` counts the images of class ``i`` by predicted class.
        names: class names.
        title: title of the figure.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    classes = len(names)
    side = 2.6 + min(max(0.34 * classes, 1.6), 12.0)
    figure = new_figure((side + 0.6, side))
    axis = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    heat = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    if classes <= _COUNTED:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shares[row, column] > 0.5 else _INK
                axis.text(column, row, str(count), ha="center", va="center", fontsize=7, color=colour)
    if classes <= _NAMED:
        short = [printable(name if len(name) <= 24 else f"{name[:23]}…") for name in names]
        axis.set_xticks(range(classes), short, rotation=90, fontsize=7, parse_math=False)
        axis.set_yticks(range(classes), short, fontsize=7, parse_math=False)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    axis.set_title(printable(title), fontsize=9, parse_math=False)
    bar = figure.colorbar(heat, ax=axis, fraction=0.046, pad=0.03)
    bar.set_label("share of the class", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    return figure


def _line(axis: Any, history: Sequence[dict[str, float]], key: str, label: str, colour: str) -> None:
    points = [(record["epoch"] + 1, record[key]) for record in history if key in record]
    if points:
        axis.plot(*zip(*points, strict=True), label=label, color=colour, marker="o" if len(points) < 25 else None, ms=3)
