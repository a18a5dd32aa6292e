"""The figure of token reduction: accuracy against GMACs, masked and plain models in colour, peers in grey."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.methods import ALL, PEERS
from lamzoo.report.mpl import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from benchmarks.reduction_tables import Row

#: Methods in the figure; the others of this project are in the tables.
DRAWN = (ALL, "merged", *PEERS)
_WIDTH, _HEIGHT = 4.1, 3.2  # inches of a panel; two are 787 pixels wide in a browser, which a README leaves as they are
_LEGEND_LINE = 0.19
_FONT = 9
_PEER_MARKERS = dict(zip(PEERS, "sD^vPXd", strict=True))
_MASKED, _PLAIN, _PEER_OF_MASKED, _PEER_OF_PLAIN = "#1d4ed8", "#c2410c", "#6b7280", "#a1a6b0"


def draw(rows: Sequence[Row]) -> Figure:
    """Draws accuracy against GMACs, a panel for each data set, on white.

    Args:
        rows: at least one, of :data:`DRAWN` methods; one for each model, method and budget, any of which may be
            missing.
    """
    from matplotlib.lines import Line2D

    scored = list(dict.fromkeys((row.data, row.split) for row in rows))
    styles = {_label(row): _style(row.method, masked=row.method in PEERS or _is_masked(row)) for row in rows}
    labels = sorted(styles, key=_place)
    lines = 3 if len(labels) > 8 else 2
    drawing = new_figure((_WIDTH * len(scored), _HEIGHT + (1 + lines) * _LEGEND_LINE))
    for axis, (data, split) in zip(drawing.subplots(1, len(scored), squeeze=False)[0], scored, strict=True):
        axis.set_title(f"{data}, {split} split", fontsize=_FONT)
        _draw_panel(axis, [row for row in rows if (row.data, row.split) == (data, split)])
    drawing.legend(
        [Line2D([], [], **styles[label]) for label in labels], labels, loc="outside lower center", frameon=False,
        ncols=math.ceil(len(labels) / lines), fontsize=_FONT, title="other methods in grey, dashed on plain models",
        title_fontsize=_FONT,
    )  # fmt: skip
    return drawing


def _draw_panel(axis: Axes, rows: Sequence[Row]) -> None:
    for model, method in dict.fromkeys((row.model, row.method) for row in rows):
        line = sorted((row for row in rows if (row.model, row.method) == (model, method)), key=lambda row: row.gmacs)
        style, order = _style(method, masked=_is_masked(line[0])), 1 if method in PEERS else 3
        if method == ALL:
            axis.axhline(line[0].top1, color=style["color"], linewidth=0.8, linestyle=":", zorder=2)
        points = [row.gmacs for row in line], [row.top1 for row in line]
        axis.plot(*points, **style, label=f"{model}, {method}", zorder=order)
    axis.set_xlabel("GMACs of one image", fontsize=_FONT)
    axis.set_ylabel("top-1 (%)", fontsize=_FONT)
    axis.tick_params(labelsize=_FONT)
    axis.locator_params(nbins=6)
    axis.grid(visible=True, color="#e5e7eb", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_ylim(_floor(rows), max(row.top1 for row in rows) + 0.5)


def _is_masked(row: Row) -> bool:
    return row.model != row.plain


def _label(row: Row) -> str:
    if row.method in PEERS:
        return row.method
    return f"{'masked' if _is_masked(row) else 'plain'}, {row.method}"


def _place(label: str) -> tuple[int, str]:
    """Sorts labels: this project's methods, then the peers in their order."""
    return (1 + list(PEERS).index(label), "") if label in PEERS else (0, label)


def _style(method: str, *, masked: bool) -> dict[str, Any]:
    if method in PEERS:
        colour, line = (_PEER_OF_MASKED, "-") if masked else (_PEER_OF_PLAIN, "--")
        marker = _PEER_MARKERS[method]
        return {"color": colour, "linestyle": line, "marker": marker, "linewidth": 0.9, "markersize": 4}
    colour = _MASKED if masked else _PLAIN
    if method == ALL:
        return {"color": colour, "linestyle": "", "marker": "*", "markersize": 11}
    return {"color": colour, "linestyle": "-", "marker": "o", "linewidth": 2, "markersize": 5}


def _floor(rows: Sequence[Row]) -> float:
    """Returns the lowest accuracy to draw: somewhat below the rows in colour, which some peers fall far below."""
    lowest = min((row.top1 for row in rows if row.method not in PEERS), default=0.0)
    return max(min(row.top1 for row in rows) - 0.5, lowest - 4)
