"""Figures of a query's spans, saliency and masks over time with matplotlib, without pyplot."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lamzoo.escaping import printable
from lamzoo.report.mask_figure import COLOURS, colour_scale
from lamzoo.report.mpl import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TRUE, _FOUND, _INK = "#2e7d5b", "#c8553d", "#1b3a57"
_WIDTH, _ROW, _CURVE, _STRIP, _WORDS = 8.0, 0.19, 0.8, 0.55, 0.7  # inches
_GROUPS = 4  # groups of words side by side
_NUMBERS = 8  # maximum number of tick labels per group
_LEAST_HEIGHT = 0.05  # minimum height of an importance axis, so that masks within 5 % of neutral stay flat


@dataclass(frozen=True)
class LayerImportance:
    """Mean mask value of each key of one layer, by kind of key.

    Attributes:
        name: heading of its panels.
        clips: ``(N,)``, float; empty if the layer doesn't attend to clips.
        words: ``(W,)``, likewise.
        token: that of the saliency token; None if the layer doesn't attend to one.
    """

    name: str
    clips: NDArray[np.float32]
    words: NDArray[np.float32]
    token: float | None = None


@dataclass(frozen=True)
class Timeline:
    """Spans, saliency and masks for one query.

    Attributes:
        duration: duration of the video, seconds.
        true: start and end of each true span, seconds; empty if unknown.
        found: ``(K, 3)``, float: start and end in seconds, and score from 0 to 1, the best first.
        saliency: ``(N,)``, float, of each clip.
        layers: the masked layers.
    """

    duration: float
    true: tuple[tuple[float, float], ...]
    found: NDArray[np.float64]
    saliency: NDArray[np.float32]
    layers: tuple[LayerImportance, ...] = ()


def draw_timeline(timeline: Timeline, *, neutral: float, title: str) -> Figure:
    """Draws spans, saliency and the importance of clips over a time axis, and the importance of words below.

    All clips are equally long. Predicted spans with higher scores are more opaque, and true spans are shaded in all
    panels over time. Importances are drawn relative to ``neutral``, with one colour scale for all layers, symmetric
    about it, and one height scale per panel.

    Args:
        timeline: the data.
        neutral: mask value that leaves the scores unchanged.
        title: title of the figure.

    Returns:
        The figure, with an Agg canvas.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    strips = [layer for layer in timeline.layers if layer.clips.size]
    groups = [layer for layer in timeline.layers if layer.words.size]
    columns = max(1, min(len(groups), _GROUPS))
    spans = _ROW * (len(timeline.found) + bool(timeline.true)) + 0.06
    heights = [spans, _CURVE, *[_STRIP] * len(strips), *[_WORDS] * math.ceil(len(groups) / columns)]
    above = 0.15 * (title.count("\n") + 1)
    below = 0.35 + 0.45 * bool(groups)
    figure = new_figure((_WIDTH, sum(heights) + 0.08 * len(heights) + above + below))
    figure.suptitle(printable(title, keep="\n"), fontsize=9, parse_math=False)  # dollar signs are literal
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)

    times = [figure.add_subplot(grid[row, :]) for row in range(2 + len(strips))]
    _spans(times[0], timeline)
    edges = np.linspace(0, timeline.duration, len(timeline.saliency) + 1)
    times[1].stairs(timeline.saliency, edges, baseline=None, color=_INK, linewidth=1.0)
    name_panel(times[1], "saliency")
    for axis in times:
        _over_time(axis, timeline, is_last=axis is times[-1])
    words = [
        figure.add_subplot(grid[len(times) + number // columns, number % columns]) for number in range(len(groups))
    ]
    if timeline.layers:
        scale = colour_scale([values for layer in timeline.layers for values in (layer.clips, layer.words)], neutral)
        for axis, layer in zip(times[2:], strips, strict=True):
            draw_strip(axis, layer.clips, edges, neutral, scale)
            name_panel(axis, layer.name)
            if layer.token is not None:
                _beside(axis, 0.5, f"saliency\ntoken\n{layer.token:.3g}", axis.transAxes)
        for axis, layer in zip(words, groups, strict=True):
            _bars(axis, layer, neutral, scale)
        draw_colour_bar(figure, scale, [*times[2:], *words])
    figure.align_ylabels(times)
    return figure


def draw_strip(
    axis: Any, values: NDArray[np.float32], edges: NDArray[np.float64], neutral: float, scale: tuple[float, float]
) -> None:
    """Draws a curve, and fills the area between it and the neutral value with the colours of a heat strip.

    Args:
        axis: the matplotlib axes.
        values: ``(N,)``, importances.
        edges: ``(N + 1,)``, the boundaries of the intervals.
        neutral: mask value that leaves the scores unchanged.
        scale: limits of the colour scale.
    """
    low, high = _height(axis, values, neutral)
    area = axis.stairs(values, edges, baseline=neutral, fill=True, facecolor="none", edgecolor="none")
    heat = axis.imshow(
        values[None],
        cmap=COLOURS,
        vmin=scale[0],
        vmax=scale[1],
        extent=(edges[0], edges[-1], low, high),
        interpolation="nearest",
        aspect="auto",
        zorder=1.5,
    )
    heat.set_clip_path(area)
    axis.stairs(values, edges, baseline=None, color=_INK, linewidth=0.7, zorder=2)


def name_panel(axis: Any, name: str) -> None:
    """Writes the name of a panel, of one or several lines, to its left."""
    axis.set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")


def draw_colour_bar(figure: Figure, scale: tuple[float, float], axes: list[Any]) -> None:
    """Draws the colour bar of importances to the right of panels."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    heat = ScalarMappable(Normalize(*scale), COLOURS)
    bar = figure.colorbar(heat, ax=axes, extend="both", extendfrac=0.04, aspect=9 * len(axes), pad=0.01)
    bar.set_label("importance", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _spans(axis: Any, timeline: Timeline) -> None:
    rows = ["true"] if timeline.true else []
    for start, end in timeline.true:
        _span(axis, 0, start, end, _TRUE, 0.9)
    for start, end, score in timeline.found:
        _span(axis, len(rows), start, end, _FOUND, 0.1 + 0.8 * score)
        _beside(axis, len(rows), f"score {score:.2f}", axis.get_yaxis_transform())
        rows.append(f"found {len(rows) + 1 - bool(timeline.true)}")
    axis.set_yticks(range(len(rows)), rows)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(rows) - 0.5, -0.5)  # the best at the top


def _span(axis: Any, row: int, start: float, end: float, colour: str, opacity: float) -> None:
    # Outlined, so that a span of a second is visible in a video of an hour, and adjacent spans are distinct.
    face = (colour, float(opacity))
    axis.barh(row, end - start, left=start, height=0.7, facecolor=face, edgecolor=colour, linewidth=0.8)


def _over_time(axis: Any, timeline: Timeline, *, is_last: bool) -> None:
    axis.set_xlim(0, timeline.duration)
    axis.tick_params(axis="both", labelsize=7, labelbottom=is_last)
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    for start, end in timeline.true:
        axis.axvspan(start, end, color=_TRUE, alpha=0.1, linewidth=0, zorder=0)
    if is_last:
        axis.set_xlabel("time (s)", fontsize=8, labelpad=2)


def _bars(axis: Any, layer: LayerImportance, neutral: float, scale: tuple[float, float]) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    _height(axis, layer.words, neutral)
    numbers = np.arange(1, len(layer.words) + 1)
    colours = colormaps[COLOURS](Normalize(*scale)(layer.words))
    axis.bar(numbers, layer.words - neutral, 0.8, bottom=neutral, color=colours, edgecolor=_INK, linewidth=0.5)
    shown = numbers[:: math.ceil(len(numbers) / _NUMBERS)]
    axis.set_xticks(shown, [str(number) for number in shown])
    axis.set_xlim(0.4, max(len(numbers), 3) + 0.6)  # keeps the bar of a single word narrow
    axis.set_title(layer.name.replace("\n", ", "), fontsize=8, pad=3)
    axis.set_xlabel("word", fontsize=8, labelpad=2)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def _height(axis: Any, values: NDArray[np.float32], neutral: float) -> tuple[float, float]:
    """Marks the neutral value and scales the axis to all values; returns the limits."""
    from matplotlib.ticker import MaxNLocator

    low, high = min(neutral, float(values.min())), max(neutral, float(values.max()))
    margin = 0.08 * (high - low) + max(0.0, _LEAST_HEIGHT - (high - low)) / 2
    low, high = low - margin, high + margin
    ticks = neutral + np.asarray(
        MaxNLocator(3).tick_values(low - neutral, high - neutral)
    )  # includes the neutral value
    axis.set_yticks([tick for tick in ticks if low <= tick <= high])
    axis.set_ylim(low, high)
    axis.axhline(neutral, color=_INK, linewidth=0.5, linestyle=(0, (4, 3)))
    return low, high


def _beside(axis: Any, height: float, text: str, transform: Any) -> None:
    axis.text(1.01, height, text, transform=transform, fontsize=7, va="center", ha="left", clip_on=False)
