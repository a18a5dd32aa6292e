"""Drawing of the comparison's panels with matplotlib, without pyplot and its global state."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lamzoo.escaping import printable
from lamzoo.report.compare.panels import Panel, Point, Series
from lamzoo.report.mpl import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

_WIDTH, _HEIGHT = 7.2, 5.0  # inches per panel
_MOST_COLUMNS = 2
_OFFSETS = (
    (7, 6), (7, -12), (-7, 6), (-7, -12), (0, 11), (0, -18), (12, -3), (-12, -3),
    (16, 18), (16, -24), (-16, 18), (-16, -24), (30, 30), (-30, 30), (30, -36), (-30, -36),
)  # fmt: skip
_SAMPLES = 40  # samples of a line, to test whether it overlaps a label
_HALO = 5  # pixels around a point that its label must not touch


def draw_panels(panels: Sequence[Panel], title: str) -> Figure:
    """Draws panels side by side: plain models, LAMs, a line from each backbone to its LAM, and the Pareto front.

    Args:
        panels: the panels; without any, the figure contains a message only.
        title: title of the figure.

    Returns:
        The figure, drawn by Agg.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    columns = min(_MOST_COLUMNS, max(1, len(panels)))
    lines = max(1, math.ceil(len(panels) / columns))
    figure = new_figure((_WIDTH * columns, _HEIGHT * lines + 0.3), extra="compare")
    figure.suptitle(title, fontsize=12, fontweight="bold")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in axes[max(1, len(panels)) :]:
        axis.remove()
    if not panels:
        axes[0].axis("off")
        axes[0].text(0.5, 0.5, "no row has both a score and this cost", ha="center", transform=axes[0].transAxes)
    for axis, panel in zip(axes, panels, strict=False):
        _draw_panel(axis, panel)
    figure.canvas.draw()  # computes the layout, which the placement of labels depends on
    for axis, panel in zip(axes, panels, strict=False):
        _label(axis, panel)
    return figure


def _draw_panel(axis: Axes, panel: Panel) -> None:
    axis.set_title(printable(panel.heading, keep="\n"), fontsize=9.5, parse_math=False)
    axis.set_xlabel(panel.x_label, fontsize=8.5)
    axis.set_ylabel(printable(panel.y_label), fontsize=8.5, parse_math=False)
    axis.tick_params(labelsize=8)
    axis.grid(visible=True, which="major", color="#e5e7eb", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    if panel.logarithmic:
        axis.set_xscale("log")
        _plain_ticks(axis)
    for height, series in enumerate(panel.series, start=1):
        _draw(axis, series, height)
    axis.margins(x=0.03 if panel.timm else 0.14, y=0.12)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7.5, loc="best", framealpha=0.9)


_LINES: dict[str, dict[str, Any]] = {
    "solid": {"linestyle": "-", "linewidth": 1.1},
    "dashed": {"linestyle": "--", "linewidth": 1.3},
    "dotted": {"linestyle": ":", "linewidth": 1.0},
}
_MARKERS: dict[str, dict[str, Any]] = {
    "dot": {"s": 9, "linewidths": 0, "alpha": 0.7},
    "square": {"s": 38, "marker": "s", "edgecolors": "white", "linewidths": 0.7},
    "circle": {"s": 38, "marker": "o", "edgecolors": "white", "linewidths": 0.7},
    "ring": {"s": 120, "linewidths": 1.4},
}


def _draw(axis: Axes, series: Series, height: int) -> None:
    label = series.name if series.in_legend else None
    xs, ys = ([math.nan if value is None else value for value in values] for values in (series.xs, series.ys))
    if series.is_line:
        steps = "steps-post" if series.steps else "default"
        style = _LINES[series.style]
        axis.plot(xs, ys, color=series.color, drawstyle=steps, label=label, zorder=height, **style)
        return
    fill: dict[str, Any] = (
        {"facecolors": "none", "edgecolors": series.color} if series.style == "ring" else {"color": series.color}
    )
    axis.scatter(xs, ys, label=label, zorder=height, **fill, **_MARKERS[series.style])
    bars: dict[str, Any] = {"color": series.color, "linewidth": 0.9, "alpha": 0.6, "zorder": height - 0.5}
    for (x, y), ends, error in zip(series.places, series.x_ranges, series.y_errors, strict=False):
        if x is None or y is None:
            continue
        if ends is not None:
            axis.plot(ends, (y, y), **bars)
        if error is not None:
            axis.plot((x, x), (y - error, y + error), **bars)


def _plain_ticks(axis: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _label(axis: Axes, panel: Panel) -> None:
    """Labels the models without overlap of labels, points and lines; models on the front are labelled first."""
    frame = axis.get_window_extent()
    taken = _taken(axis, panel)
    named = set()
    for point in sorted(panel.points, key=lambda point: not point.best):
        name = printable(point.label)
        if (name, point.y) in named:
            continue
        named.add((name, point.y))
        for right, up in _OFFSETS:
            text = axis.annotate(
                name, (point.x, point.y), xytext=(right, up), textcoords="offset points", fontsize=7, zorder=10,
                parse_math=False,
                bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.7},
                ha="left" if right > 0 else "right" if right < 0 else "center",
                arrowprops={"arrowstyle": "-", "color": "#9ca3af", "linewidth": 0.5} if abs(up) > 15 else None,
            )  # fmt: skip
            text.set_in_layout(False)
            box = text.get_window_extent()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def _taken(axis: Axes, panel: Panel) -> list[Bbox]:
    """Returns the boxes, in pixels, that labels must not cover."""
    from matplotlib.transforms import Bbox

    def pixels(point: Point) -> tuple[float, float]:
        x, y = axis.transData.transform((point.x, point.y))
        return float(x), float(y)

    ends = [(pixels(plain), pixels(lam)) for plain, lam in panel.joins]
    for (x, y), (next_x, next_y) in itertools.pairwise(map(pixels, panel.front)):
        ends += [((x, y), (next_x, y)), ((next_x, y), (next_x, next_y))]  # the front is drawn in steps
    taken = [
        Bbox.from_bounds(start[0] + share * (end[0] - start[0]) - 1, start[1] + share * (end[1] - start[1]) - 1, 2, 2)
        for start, end in ends
        for share in (step / _SAMPLES for step in range(_SAMPLES + 1))
    ]
    for point in panel.points:
        x, y = pixels(point)
        taken.append(Bbox.from_bounds(x - _HALO, y - _HALO, 2 * _HALO, 2 * _HALO))
    legend = axis.get_legend()
    return taken if legend is None else [*taken, legend.get_window_extent()]
