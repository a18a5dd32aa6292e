"""The comparison as Markdown and CSV, and the columns of its tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lamzoo.escaping import csv_line, markdown
from lamzoo.profiling.results import COLUMNS as ROW_COLUMNS
from lamzoo.profiling.results import BenchRow
from lamzoo.report.compare.entries import Comparison, Entry, Group, number, setting_text
from lamzoo.report.compare.panels import gmacs_panels, latency_panels, plot_notes

#: Explanation of the columns, printed with the tables.
LEGEND = (
    "Each LAM, and each model with merged tokens, is below its plain backbone. Parameters, GMACs (10⁹ "
    "multiply-accumulates of one image, attention included), latency and memory are those of the whole model; "
    '"of masks" is the masks\' share. Latency is the median (and quartiles) of one image, "ratio" the median ratio to '
    "the same model without its masks and with all tokens, timed in alternation; the plots show these models at their "
    'backbone\'s latency times their ratio. "vs plain" is the score minus the plain backbone\'s. "Pareto" lists the '
    "costs for which no other model of the same panel is both cheaper and better."
)


@dataclass(frozen=True)
class Column:
    """A column of a printed table.

    Attributes:
        heading: heading of the column.
        cell: returns the text of an entry's cell, possibly empty.
        numeric: whether the column is right-aligned.
        speed: whether the column moves to a second table if one table would be too wide.
    """

    heading: str
    cell: Callable[[Entry], str]
    numeric: bool = True
    speed: bool = False


def columns_of(group: Group, front: Mapping[BenchRow, tuple[str, ...]]) -> tuple[Column, ...]:
    """Returns the columns of a group's table: score, costs and the masks' share of them.

    Args:
        group: a group of a comparison.
        front: :func:`pareto_costs` of that comparison.
    """
    score = [
        Column(group.metric_label, lambda entry: number(entry.row.value, digits=2)),
        Column("vs plain", lambda entry: "" if entry.difference is None else f"{entry.difference:+.2f}"),
    ]
    costs = [
        Column("params (M)", lambda entry: number(entry.row.params_m)),
        Column("of masks", lambda entry: number(entry.row.lam_params_m)),
        Column("GMACs", lambda entry: number(entry.row.gmacs)),
        Column("of masks", lambda entry: number(entry.row.lam_gmacs)),
        Column("latency (ms)", lambda entry: _latency(entry.row), speed=True),
        Column("ratio", lambda entry: _ratio(entry.row), speed=True),
        Column("images/s", lambda entry: number(entry.row.images_per_s), speed=True),
        Column("peak (MiB)", lambda entry: number(entry.row.peak_mib), speed=True),
    ]
    name = Column("model", lambda entry: entry.row.label, numeric=False)
    columns = [name, *(score if group.scored else ()), *costs]
    if len({entry.row.img_size for entry in group.entries}) > 1:
        columns.append(Column("px", lambda entry: entry.row.img_size or ""))
    if len({entry.row.seed for entry in group.entries}) > 1:
        columns.append(Column("seed", lambda entry: "" if entry.row.seed is None else str(entry.row.seed)))
    if len({entry.setting for entry in group.entries}) > 1:
        columns.append(Column("measured on", setting_text, numeric=False, speed=True))
    if group.scored:
        columns.append(Column("Pareto", lambda entry: ", ".join(front.get(entry.row, ())), numeric=False))
    return tuple(columns)


def pareto_costs(comparison: Comparison) -> dict[BenchRow, tuple[str, ...]]:
    """Returns the costs for which each row is on a Pareto front: "GMACs", "latency"."""
    found: dict[BenchRow, tuple[str, ...]] = {}
    for cost, panels in (("GMACs", gmacs_panels(comparison)), ("latency", latency_panels(comparison))):
        for panel in panels:
            for point in panel.front:
                for row in point.rows:
                    found[row] = (*found.get(row, ()), cost)
    return found


def caption(group: Group) -> str:
    """Returns the setting of a group's measurements, as far as its rows agree."""
    facts = []
    settings = {setting_text(entry) for entry in group.entries}
    if len(settings) == 1:
        facts.append(settings.pop())
    sizes = {entry.row.img_size for entry in group.entries}
    if len(sizes) == 1 and (size := sizes.pop()) is not None:
        facts.append(f"{size} px")
    for package in ("torch", "timm"):
        versions = sorted({getattr(entry.row, package) for entry in group.entries} - {None})
        if versions:
            facts.append(f"{package} {' and '.join(versions)}")
    return ", ".join(facts)


def all_notes(comparison: Comparison) -> tuple[str, ...]:
    """Returns the notes on the comparison and its plots, one sentence each."""
    failed = len(comparison.failed)
    broken = (f"{failed} measurement(s) failed; they are listed with the reasons.",) if failed else ()
    return (*broken, *comparison.notes, *plot_notes(comparison))


def to_markdown(comparison: Comparison, *, pictures: Sequence[str] = ()) -> str:
    """Renders the comparison as Markdown.

    Args:
        comparison: the comparison.
        pictures: image files to show above the tables, relative to the Markdown file.
    """
    lines = ["# Comparison", ""]
    for picture in pictures:
        lines += [f"![{picture.rpartition('.')[0].replace('-', ' ')}]({picture})", ""]
    front = pareto_costs(comparison)
    for group in comparison.groups:
        columns = columns_of(group, front)
        lines += [f"## {markdown(group.title)}", "", markdown(caption(group)), ""]
        lines += _markdown_table(columns, group.entries)
    if comparison.failed:
        reason = Column("reason", lambda entry: entry.row.error or "not known", numeric=False)
        name = Column("model", lambda entry: entry.row.label, numeric=False)
        data = Column("data", lambda entry: entry.row.data or "", numeric=False)
        lines += ["## Failed", "", *_markdown_table((name, data, reason), comparison.failed)]
    lines += [LEGEND, ""]
    notes = all_notes(comparison)
    lines += [*(f"- {markdown(note)}" for note in notes), *([""] if notes else [])]
    return "\n".join(lines).rstrip("\n") + "\n"


def to_csv(comparison: Comparison) -> str:
    """Renders all rows as CSV: the columns of the results tables, and additional ones.

    These are ``source``, ``plain_value``, ``value_difference``, ``gmacs_ratio``, ``params_ratio``, ``pareto_gmacs``
    and ``pareto_latency`` (``yes`` on the front).
    """
    front = pareto_costs(comparison)
    added = ("plain_value", "value_difference", "gmacs_ratio", "params_ratio", "pareto_gmacs", "pareto_latency")
    lines = [csv_line((*ROW_COLUMNS, "source", *added))]
    for entry in comparison.entries:
        best = front.get(entry.row, ())
        derived = (
            None if entry.twin is None else entry.twin.value,
            *(None if v is None else round(v, 6) for v in (entry.difference, entry.gmacs_ratio, entry.params_ratio)),
            *("yes" if cost in best else None for cost in ("GMACs", "latency")),
        )
        lines.append(csv_line([*(getattr(entry.row, column) for column in ROW_COLUMNS), entry.source, *derived]))
    return "".join(lines)


def _latency(row: BenchRow) -> str:
    return _spread(row.latency_ms, row.latency_q1_ms, row.latency_q3_ms)


def _ratio(row: BenchRow) -> str:
    return _spread(row.latency_ratio, row.latency_ratio_q1, row.latency_ratio_q3)


def _spread(middle: float | None, low: float | None, high: float | None) -> str:
    if middle is None:
        return ""
    digits = 3 if middle < 1 else 2
    text = number(middle, digits=digits)
    return text if low is None or high is None else f"{text} ({low:.{digits}f}-{high:.{digits}f})"


def _markdown_table(columns: Sequence[Column], entries: Sequence[Entry]) -> list[str]:
    lines = ["| " + " | ".join(markdown(column.heading) for column in columns) + " |"]
    lines.append("|" + "|".join("---:" if column.numeric else "---" for column in columns) + "|")
    for entry in entries:
        lines.append("| " + " | ".join(markdown(column.cell(entry)) for column in columns) + " |")
    return [*lines, ""]
