"""The comparison as a self-contained HTML page: a sortable, filterable table (DataTables) and plots (plotly)."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Literal

from lamzoo.errors import MissingExtraError
from lamzoo.escaping import html_text
from lamzoo.report.compare.entries import Comparison, Entry, data_name, number, setting_text
from lamzoo.report.compare.panels import LAM, PLAIN, Panel, Series, command, creation, gmacs_panels, latency_panels
from lamzoo.report.compare.text import LEGEND, all_notes, pareto_costs

if TYPE_CHECKING:
    from plotly.graph_objects import Figure, Scatter

_PLOTLY = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtonsToRemove": ["sendChartToCloud", "select2d", "lasso2d"],  # the first would upload the plot
    "plotlyServerURL": "",
}
_MOST_LABELS = 16  # more labels in a plot would overlap


@dataclass(frozen=True)
class _Column:
    heading: str
    cell: Callable[[Entry], str]
    kind: Literal["text", "choice", "number"] = "number"
    visible: bool = True
    style: str = ""


def to_html(comparison: Comparison) -> str:
    """Renders the comparison as one page that includes its scripts and styles.

    Raises:
        MissingExtraError: plotly or itables, which includes DataTables, is not installed.
    """
    try:
        import itables
        import plotly.io  # noqa: F401 - raises early if plotly is missing
    except ImportError as error:
        raise MissingExtraError(
            f"The page needs plotly and itables ({error}); install them with: pip install 'lamzoo[compare]'"
        ) from None
    bundle = Path(itables.__file__).parent / "html"
    columns = _columns(comparison)
    kinds = {
        "rows": len(comparison.entries),
        "kinds": [column.kind for column in columns],
        "visible": [column.visible for column in columns],
    }
    template = Template(resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title="Models with learnable attention masks and their plain backbones",
        subtitle=html_text(_subtitle(comparison)),
        lam=LAM,
        plain=PLAIN,
        plots="\n".join(_sections(comparison)),
        legend=escape(LEGEND, quote=False),
        head="".join(f"<th>{html_text(column.heading)}</th>" for column in columns),
        filters="<th></th>" * len(columns),
        failures=_failures(comparison),
        body="\n".join(_table_row(entry, columns) for entry in comparison.entries),
        notes="".join(f"<li>{html_text(note)}</li>" for note in all_notes(comparison)),
        columns=json.dumps(kinds),
        datatables_css=(bundle / "dt_bundle.css").read_text(encoding="utf-8"),
        datatables_js=base64.b64encode((bundle / "dt_bundle.js").read_bytes()).decode("ascii"),
    )


def _sections(comparison: Comparison) -> list[str]:
    """Returns the plots with their headings; the first one includes plotly's script."""
    from plotly.io import to_html as figure_html

    sections: list[str] = []
    for heading, name, panels in (
        ("Accuracy against GMACs", "gmacs", gmacs_panels(comparison)),
        ("Accuracy against latency", "latency", latency_panels(comparison)),
    ):
        plots = [
            figure_html(
                draw_interactive(panel),
                full_html=False,
                include_plotlyjs=not sections and index == 0,
                include_mathjax=False,
                config=_PLOTLY,
                div_id=f"{name}-{index}",
            )
            for index, panel in enumerate(panels)
        ]
        if plots:
            boxes = "\n".join(f'<div class="plot">{plot}</div>' for plot in plots)
            sections.append(f'<h2>{heading}</h2>\n<div class="plots">\n{boxes}\n</div>')
    return sections


def draw_interactive(panel: Panel) -> Figure:
    """Draws one panel with plotly; hovering over a model shows its data."""
    from plotly.graph_objects import Figure

    figure = Figure()
    labelled = len(panel.points) <= _MOST_LABELS
    for series in panel.series:
        trace = _trace(series)
        if labelled and series.labels:
            height = "top" if series.style == "circle" else "bottom"
            trace.update(
                mode="markers+text",
                text=[f"\u2002{html_text(label)}\u2002" for label in series.labels],  # a space off the marker
                textposition=[f"{height} {_side(x, panel)}" for x, _ in series.places],
                textfont={"size": 11},
                cliponaxis=False,
            )
        figure.add_trace(trace)
    figure.update_layout(
        template="plotly_white",
        title={"text": "<br>".join(map(html_text, panel.heading.split("\n"))), "font": {"size": 14}, "x": 0.02},
        xaxis={"title": {"text": html_text(panel.x_label)}, "type": "log" if panel.logarithmic else "linear"},
        yaxis={"title": {"text": html_text(panel.y_label)}},
        legend={"orientation": "h", "y": -0.2},
        margin={"l": 60, "r": 20, "t": 60, "b": 40},
        height=520,
        hovermode="closest",
    )
    if panel.logarithmic:
        ticks = [step * 10.0**power for power in range(-6, 7) for step in (1, 2, 5)]
        figure.update_xaxes(tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    return figure


def _side(x: float | None, panel: Panel) -> Literal["left", "right"]:
    """Returns the side of a point on which its label stays within the plot."""
    xs = [other for series in panel.series for other in series.xs if other is not None]
    scale = math.log if panel.logarithmic else float
    return "left" if scale(x or 0.0) > (scale(min(xs)) + scale(max(xs))) / 2 else "right"


_DASHES = {"solid": "solid", "dashed": "dash", "dotted": "dot"}
_MARKERS = {"dot": ("circle", 5), "square": ("square", 10), "circle": ("circle", 10), "ring": ("circle-open", 16)}


def _trace(series: Series) -> Scatter:
    from plotly.graph_objects import Scatter

    trace = Scatter(x=series.xs, y=series.ys, name=series.name, showlegend=series.in_legend, hoverinfo="skip")
    if series.is_line:
        shape = "hv" if series.steps else "linear"
        return trace.update(
            mode="lines", line={"color": series.color, "dash": _DASHES[series.style], "shape": shape, "width": 1.5}
        )
    symbol, size = _MARKERS[series.style]
    edge = {"color": series.color, "width": 2} if series.style == "ring" else {"color": "white", "width": 1}
    trace.update(mode="markers", marker={"color": series.color, "size": size, "symbol": symbol, "line": edge})
    if any(error is not None for error in series.y_errors):
        trace.update(error_y={"type": "data", "array": series.y_errors, "thickness": 1.2, "width": 4})
    if any(ends is not None for ends in series.x_ranges):
        pairs = list(zip(series.x_ranges, series.xs, strict=True))
        sides = [[0.0 if ends is None or x is None else abs(ends[side] - x) for ends, x in pairs] for side in (1, 0)]
        trace.update(error_x={"type": "data", "array": sides[0], "arrayminus": sides[1], "thickness": 1.2, "width": 4})
    if series.copies:
        trace.update(customdata=series.copies)
    if series.facts:
        texts = ["<br>".join([f"<b>{html_text(name)}</b>", *map(html_text, lines)]) for name, *lines in series.facts]
        trace.update(hovertext=texts, hoverinfo="text")
    return trace


def _columns(comparison: Comparison) -> tuple[_Column, ...]:
    front = pareto_costs(comparison)
    failed = bool(comparison.failed)
    names = {entry.row.data: data_name(entry.row.data) for entry in comparison.failed if entry.row.data is not None}
    names |= {group.data: group.name or group.data for group in comparison.groups if group.data is not None}
    metrics = {group.metric_label for group in comparison.groups if group.scored}

    def kind(entry: Entry) -> str:
        return "LAM" if entry.row.has_lam else "plain" if entry.row.ok else "?"

    def plain(column: str) -> Callable[[Entry], str]:
        return lambda entry: "" if getattr(entry.row, column) is None else str(getattr(entry.row, column))

    def figures(column: str, digits: int | None = None) -> Callable[[Entry], str]:
        return lambda entry: number(getattr(entry.row, column), digits=digits)

    return (
        _Column("model", lambda entry: entry.row.label, "text", style="name"),
        _Column("kind", kind, "choice"),
        _Column("data", lambda entry: names.get(entry.row.data or "", ""), "choice", len(comparison.groups) > 1),
        _Column("split", plain("split"), "choice", visible=False),
        _Column("metric", plain("metric"), "choice", visible=len(metrics) > 1),
        _Column(metrics.pop() if len(metrics) == 1 else "score", figures("value", 2)),
        _Column("vs plain", lambda entry: "" if entry.difference is None else f"{entry.difference:+.2f}"),
        _Column("params (M)", figures("params_m")),
        _Column("of masks (M)", figures("lam_params_m")),
        _Column("GMACs", figures("gmacs")),
        _Column("of masks (GMACs)", figures("lam_gmacs")),
        _Column("GMACs ratio", lambda entry: number(entry.gmacs_ratio, digits=3), visible=False),
        _Column("latency (ms)", figures("latency_ms", 3)),
        _Column("latency q1", figures("latency_q1_ms", 3), visible=False),
        _Column("latency q3", figures("latency_q3_ms", 3), visible=False),
        _Column("latency ratio", figures("latency_ratio", 2)),
        _Column("ratio q1", figures("latency_ratio_q1", 2), visible=False),
        _Column("ratio q3", figures("latency_ratio_q3", 2), visible=False),
        _Column("images/s", figures("images_per_s")),
        _Column("peak (MiB)", figures("peak_mib")),
        _Column("Pareto", lambda entry: ", ".join(front.get(entry.row, ())), "choice"),
        _Column("px", plain("img_size"), "choice", visible=False),
        _Column("batch", plain("batch"), visible=False),
        _Column("measured on", setting_text, "choice"),
        _Column("plain twin", plain("plain"), "choice", visible=False),
        _Column("seed", plain("seed"), "choice", visible=False),
        _Column("torch", plain("torch"), "choice", visible=False),
        _Column("timm", plain("timm"), "choice", visible=False),
        _Column("weights sha256", plain("weights_sha256"), "text", visible=False),
        _Column("commit", plain("commit"), "choice", visible=False),
        _Column("data as given", plain("data"), "choice", visible=False),
        _Column("command", lambda entry: command(entry.row), "text", visible=False),
        _Column("file", lambda entry: entry.source, "choice", visible=False),
        _Column("status", plain("status"), "choice", visible=failed),
        _Column("reason", plain("error"), "text", visible=False, style="reason"),
    )


def _table_row(entry: Entry, columns: Sequence[_Column]) -> str:
    kind = "failed" if not entry.row.ok else "lam" if entry.row.has_lam else "plain"
    cells = []
    for column in columns:
        style = column.style or ("number" if column.kind == "number" else "")
        copied = f' data-copy="{escape(creation(entry.row))}"' if style == "name" and entry.row.ok else ""
        cells.append(f'<td class="{style}"{copied}>{html_text(column.cell(entry))}</td>')
    return f'<tr class="{kind}">{"".join(cells)}</tr>'


def _failures(comparison: Comparison) -> str:
    if not comparison.failed:
        return ""
    items = []
    for entry in comparison.failed:
        data = f" on {html_text(entry.row.data)}" if entry.row.data else ""
        items.append(f"<li><b>{html_text(entry.row.label)}</b>{data}: {html_text(entry.row.error or 'not known')}</li>")
    return f"<h2>Failed</h2>\n<ul>{''.join(items)}</ul>"


def _subtitle(comparison: Comparison) -> str:
    measured = [entry.row for group in comparison.groups for entry in group.entries]
    lams = sum(row.has_lam for row in measured)
    parts = [f"{len(measured)} measured models, {lams} of them with masks"]
    if comparison.timm:
        parts.append(f"{len(comparison.timm)} published results of timm behind them")
    if comparison.failed:
        parts.append(f"{len(comparison.failed)} failed")
    return "; ".join(parts) + "."
