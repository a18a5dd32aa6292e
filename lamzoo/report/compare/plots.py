"""Draws the comparison's panels with matplotlib, without pyplot and its global state; knows no results table."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal

from lamzoo.report.compare.panels import Panel, Point
from lamzoo.report.mpl import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

#: Colours that the page's plots share: the models with masks, the plain ones, the front, timm's.
LAM, PLAIN, FRONT, TIMM = "#c2410c", "#1d4ed8", "#15803d", "#b8bcc4"

_WIDTH, _HEIGHT = 7.2, 5.0  # inches a panel
_MOST_COLUMNS = 2
_TITLE = 62  # characters of a title that fit above a panel
_OFFSETS = (
    (7, 6), (7, -12), (-7, 6), (-7, -12), (0, 11), (0, -18), (12, -3), (-12, -3),
    (16, 18), (16, -24), (-16, 18), (-16, -24), (30, 30), (-30, 30), (30, -36), (-30, -36),
)  # fmt: skip
_SAMPLES = 40  # of a line, to see whether a name lies on it
_HALO = 5  # pixels around a point that its own name may not touch


def draw_panels(panels: Sequence[Panel], title: str) -> Figure:
    """Draws panels side by side: plain models, LAMs, a line from each backbone to its LAM, and the Pareto front.

    Args:
        panels: none gives a picture that says so.
        title: over the whole figure.

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
    figure.canvas.draw()  # lays out, so that the labels know where they are
    for axis, panel in zip(axes, panels, strict=False):
        _label(axis, panel)
    return figure


def encode(figure: Figure, kind: Literal["png", "svg"]) -> bytes:
    """Returns the figure as a file's content, the same for the same figure."""
    import matplotlib

    content = io.BytesIO()
    metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "lamzoo", "svg.fonttype": "none"}):
        figure.savefig(content, format=kind, metadata=metadata)
    return content.getvalue()


def shortened(title: str) -> str:
    """Cuts what is too long for a panel's title from the front, where a path is least telling."""
    lines = (line if len(line) <= _TITLE else f"…{line[1 - _TITLE :]}" for line in title.split("\n"))
    return "\n".join(lines)


def short_name(point: Point) -> str:
    """Returns a model's name for the inside of a plot: of a folder its last part."""
    name = point.entry.row.name
    return PurePath(name.partition(":")[2]).name if name.startswith("local-dir:") else name


def _draw_panel(axis: Axes, panel: Panel) -> None:
    axis.set_title(shortened(panel.title), fontsize=9.5)
    axis.set_xlabel(panel.x_label, fontsize=8.5)
    axis.set_ylabel(panel.y_label, fontsize=8.5)
    axis.tick_params(labelsize=8)
    axis.grid(visible=True, which="major", color="#e5e7eb", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    if panel.logarithmic:
        axis.set_xscale("log")
        _plain_ticks(axis)
    if panel.timm:
        axis.scatter(
            [result.gmacs or 0.0 for result in panel.timm],
            [result.top1 for result in panel.timm],
            s=9, color=TIMM, linewidths=0, alpha=0.7, label="timm's published results", zorder=1,
        )  # fmt: skip
        front = panel.timm_front
        axis.plot(
            [result.gmacs or 0.0 for result in front],
            [result.top1 for result in front],
            color="#8b919c", linewidth=1, linestyle=":", drawstyle="steps-post", label="their Pareto front", zorder=1,
        )  # fmt: skip
    for plain, lam in panel.joins:
        axis.plot([plain.x, lam.x], [plain.y, lam.y], color="#6b7280", linewidth=1.1, zorder=2)
    _draw_front(axis, panel)
    plain_points = [point for point in panel.points if not point.entry.row.has_lam]
    lam_points = [point for point in panel.points if point.entry.row.has_lam]
    _scatter(axis, plain_points, "plain backbone", marker="s", color=PLAIN)
    _scatter(axis, lam_points, "with LAM, joined to its backbone", marker="o", color=LAM)
    axis.margins(x=0.03 if panel.timm else 0.14, y=0.12)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7.5, loc="best", framealpha=0.9)


def _draw_front(axis: Axes, panel: Panel) -> None:
    front = panel.front
    if not front:
        return
    style: dict[str, Any] = {"color": FRONT, "linewidth": 1.3, "linestyle": "--", "drawstyle": "steps-post"}
    axis.plot([point.x for point in front], [point.y for point in front], zorder=3, **style)
    axis.scatter(
        [point.x for point in front],
        [point.y for point in front],
        s=120, facecolors="none", edgecolors=FRONT, linewidths=1.4, label="Pareto front", zorder=4,
    )  # fmt: skip


def _scatter(axis: Axes, points: Sequence[Point], label: str, *, marker: str, color: str) -> None:
    if points:
        xs, ys = [point.x for point in points], [point.y for point in points]
        axis.scatter(
            xs, ys, s=38, marker=marker, color=color, edgecolors="white", linewidths=0.7, label=label, zorder=5
        )


def _plain_ticks(axis: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _label(axis: Axes, panel: Panel) -> None:
    """Writes the models' names where neither a name, a point nor a line is; those on the front choose first."""
    frame = axis.get_window_extent()
    taken = _taken(axis, panel)
    named = set()
    for point in sorted(panel.points, key=lambda point: not point.best):
        name = short_name(point)
        if (name, point.y) in named:
            continue
        named.add((name, point.y))
        for right, up in _OFFSETS:
            text = axis.annotate(
                name, (point.x, point.y), xytext=(right, up), textcoords="offset points", fontsize=7, zorder=6,
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
    """Returns the places, in pixels, where a name would hide something."""
    from matplotlib.transforms import Bbox

    def pixels(point: Point) -> tuple[float, float]:
        x, y = axis.transData.transform((point.x, point.y))
        return float(x), float(y)

    ends = [(pixels(plain), pixels(lam)) for plain, lam in panel.joins]
    for (x, y), (next_x, next_y) in itertools.pairwise(map(pixels, panel.front)):
        ends += [((x, y), (next_x, y)), ((next_x, y), (next_x, next_y))]  # a step, as the front is drawn
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
