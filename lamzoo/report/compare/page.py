"""The comparison as one HTML page that needs no network: a table to sort and filter (DataTables), plots (plotly)."""

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
from typing import TYPE_CHECKING, Any, Literal

from lamzoo.errors import MissingExtraError
from lamzoo.report.compare.entries import Comparison, Entry
from lamzoo.report.compare.panels import Panel, Point, gmacs_panels, latency_panels
from lamzoo.report.compare.plots import FRONT, LAM, PLAIN, TIMM, short_name, shortened
from lamzoo.report.compare.text import LEGEND, all_notes, number, pareto_costs, setting_text
from lamzoo.report.compare.timm_results import TimmResult

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_PLOTLY = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtonsToRemove": ["sendChartToCloud", "select2d", "lasso2d"],  # the first would upload the plot
    "plotlyServerURL": "",
}
_MOST_LABELS = 16  # more names inside a plot would hide one another


@dataclass(frozen=True)
class _Column:
    heading: str
    cell: Callable[[Entry], str]
    kind: Literal["text", "choice", "number"] = "number"
    visible: bool = True
    style: str = ""


def to_html(comparison: Comparison) -> str:
    """Writes the comparison as one page, its scripts and styles within it.

    Raises:
        MissingExtraError: plotly or itables, which carries DataTables, is not installed.
    """
    try:
        import itables
        import plotly.io  # noqa: F401 - says early what is missing
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
        title="Models with learnable attention masks, beside their plain backbones",
        subtitle=escape(_subtitle(comparison)),
        lam=LAM,
        plain=PLAIN,
        plots="\n".join(_sections(comparison)),
        legend=escape(LEGEND, quote=False),
        head="".join(f"<th>{escape(column.heading)}</th>" for column in columns),
        filters="<th></th>" * len(columns),
        failures=_failures(comparison),
        body="\n".join(_table_row(entry, columns) for entry in comparison.entries),
        notes="".join(f"<li>{escape(note)}</li>" for note in all_notes(comparison)),
        columns=json.dumps(kinds),
        datatables_css=(bundle / "dt_bundle.css").read_text(encoding="utf-8"),
        datatables_js=base64.b64encode((bundle / "dt_bundle.js").read_bytes()).decode("ascii"),
    )


def _sections(comparison: Comparison) -> list[str]:
    """Returns the plots under their headings; the first of them brings plotly's script with it."""
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
    """Draws one panel with plotly: timm's results behind, the joins, the front, and the models, each with its facts."""
    from plotly.graph_objects import Figure, Scatter

    figure = Figure()
    if panel.timm:
        front = [(result.gmacs, result.top1) for result in panel.timm_front]
        places = [(result.gmacs, result.top1) for result in panel.timm]
        figure.add_trace(_markers("timm's published results", places, list(map(_timm_hover, panel.timm)), TIMM, size=5))
        figure.add_trace(_line("their Pareto front", front, color="#8b919c", dash="dot", shape="hv"))
    joined: list[tuple[float | None, float | None]] = []
    for plain, lam in panel.joins:
        joined += [(plain.x, plain.y), (lam.x, lam.y), (None, None)]
    if joined:
        figure.add_trace(_line("LAM and its backbone", joined, color="#6b7280"))
    if panel.front:
        places = [(point.x, point.y) for point in panel.front]
        figure.add_trace(_line("Pareto front", places, color=FRONT, dash="dash", shape="hv"))
        figure.add_trace(_markers("on the front", places, None, FRONT, size=16, symbol="circle-open"))
    labelled = len(panel.points) <= _MOST_LABELS
    for name, masked, color, symbol in (("plain backbone", False, PLAIN, "square"), ("with LAM", True, LAM, "circle")):
        points = [point for point in panel.points if point.entry.row.has_lam == masked]
        if points:
            places, facts = [(point.x, point.y) for point in points], [_hover(point, panel) for point in points]
            trace: Scatter = _markers(name, places, facts, color, size=10, symbol=symbol)
            if labelled:
                names = [f"\u2002{escape(short_name(point))}\u2002" for point in points]  # a space off the marker
                sides = [f"{'top' if masked else 'bottom'} {_side(point, panel)}" for point in points]
                trace.update(
                    mode="markers+text", text=names, textposition=sides, textfont={"size": 11}, cliponaxis=False
                )
            figure.add_trace(trace)
    figure.update_layout(
        template="plotly_white",
        title={"text": escape(shortened(panel.title)).replace("\n", "<br>"), "font": {"size": 14}, "x": 0.02},
        xaxis={"title": {"text": panel.x_label}, "type": "log" if panel.logarithmic else "linear"},
        yaxis={"title": {"text": panel.y_label}},
        legend={"orientation": "h", "y": -0.2},
        margin={"l": 60, "r": 20, "t": 60, "b": 40},
        height=520,
        hovermode="closest",
    )
    if panel.logarithmic:
        ticks = [step * 10.0**power for power in range(-6, 7) for step in (1, 2, 5)]
        figure.update_xaxes(tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    return figure


def _side(point: Point, panel: Panel) -> Literal["left", "right"]:
    """Says on which side of its point a name stays within the plot."""
    xs = [other.x for other in panel.points] + [result.gmacs or 0.0 for result in panel.timm]
    scale = math.log if panel.logarithmic else float
    return "left" if scale(point.x) > (scale(min(xs)) + scale(max(xs))) / 2 else "right"


def _line(
    name: str, places: Sequence[tuple[Any, Any]], *, color: str, dash: str = "solid", shape: str = "linear"
) -> Any:
    from plotly.graph_objects import Scatter

    xs, ys = zip(*places, strict=True)
    line = {"color": color, "dash": dash, "shape": shape, "width": 1.5}
    return Scatter(x=xs, y=ys, name=name, mode="lines", line=line, hoverinfo="skip")


def _markers(
    name: str,
    places: Sequence[tuple[Any, Any]],
    facts: list[str] | None,
    color: str,
    *,
    size: int,
    symbol: str = "circle",
) -> Any:
    from plotly.graph_objects import Scatter

    xs, ys = zip(*places, strict=True)
    marker: dict[str, Any] = {"color": color, "size": size, "symbol": symbol, "line": {"color": "white", "width": 1}}
    if symbol.endswith("-open"):
        marker["line"] = {"color": color, "width": 2}
    if facts is None:
        return Scatter(x=xs, y=ys, name=name, mode="markers", marker=marker, hoverinfo="skip", showlegend=False)
    return Scatter(x=xs, y=ys, name=name, mode="markers", marker=marker, hovertext=facts, hoverinfo="text")


def _hover(point: Point, panel: Panel) -> str:
    row = point.entry.row
    lines = [f"<b>{escape(row.name)}</b>", f"{escape(panel.y_label)}: {number(row.value, digits=2)}"]
    if point.entry.difference is not None:
        lines[-1] += f" ({point.entry.difference:+.2f} against its backbone)"
    facts = [("GMACs", row.gmacs, row.lam_gmacs), ("params (M)", row.params_m, row.lam_params_m)]
    for label, whole, part in facts:
        lines.append(f"{label}: {number(whole)}" + (f", {number(part)} of them the masks'" if part else ""))
    if row.latency_ms is not None:
        ratio = "" if row.latency_ratio is None else f", {row.latency_ratio:.2f} × without masks"
        lines.append(f"latency: {row.latency_ms:.2f} ms{ratio}")
        lines.append(escape(setting_text(point.entry)))
    return "<br>".join(lines)


def _timm_hover(result: TimmResult) -> str:
    lines = [f"<b>{escape(result.name)}</b> (timm)", f"top-1: {result.top1:.2f} %", f"GMACs: {number(result.gmacs)}"]
    lines.append(f"{number(result.params_m)} M parameters, {result.img_size} px")
    for speed in result.speeds:
        lines.append(f"{speed.images_per_s:,.0f} images/s, batch {speed.batch}: {escape(speed.machine)}")
    return "<br>".join(lines)


def _columns(comparison: Comparison) -> tuple[_Column, ...]:
    front = pareto_costs(comparison)
    failed = bool(comparison.failed)
    metrics = {group.metric_label for group in comparison.groups if group.scored}

    def kind(entry: Entry) -> str:
        return "LAM" if entry.row.has_lam else "plain" if entry.row.ok else "?"

    def plain(column: str) -> Callable[[Entry], str]:
        return lambda entry: "" if getattr(entry.row, column) is None else str(getattr(entry.row, column))

    def figures(column: str, digits: int | None = None) -> Callable[[Entry], str]:
        return lambda entry: number(getattr(entry.row, column), digits=digits)

    return (
        _Column("model", lambda entry: entry.row.name, "text", style="name"),
        _Column("kind", kind, "choice"),
        _Column("data", plain("data"), "choice", len(comparison.groups) > 1),
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
        _Column("file", lambda entry: entry.source, "choice", visible=False),
        _Column("status", plain("status"), "choice", visible=failed),
        _Column("reason", plain("error"), "text", visible=False, style="reason"),
    )


def _table_row(entry: Entry, columns: Sequence[_Column]) -> str:
    kind = "failed" if not entry.row.ok else "lam" if entry.row.has_lam else "plain"
    cells = []
    for column in columns:
        style = column.style or ("number" if column.kind == "number" else "")
        cells.append(f'<td class="{style}">{escape(column.cell(entry))}</td>')
    return f'<tr class="{kind}">{"".join(cells)}</tr>'


def _failures(comparison: Comparison) -> str:
    if not comparison.failed:
        return ""
    items = []
    for entry in comparison.failed:
        data = f" on {escape(entry.row.data)}" if entry.row.data else ""
        items.append(f"<li><b>{escape(entry.row.name)}</b>{data}: {escape(entry.row.error or 'not known')}</li>")
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
