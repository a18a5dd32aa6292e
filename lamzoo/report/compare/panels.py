"""The plots of a comparison, independent of the renderer: panels, series, labels and Pareto fronts."""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeVar

from lamzoo.errors import LamzooError
from lamzoo.escaping import printable
from lamzoo.profiling.results import BenchRow
from lamzoo.registry.catalog import get_pretrained_cfg
from lamzoo.registry.refs import display_name
from lamzoo.report.compare.entries import Comparison, Entry, Group, family, number, setting_text, some
from lamzoo.report.compare.timm_results import TimmResult

#: Colours of models with masks, of plain models, and of the background series.
LAM, PLAIN = "#c2410c", "#1d4ed8"
_FRONT, _JOIN, _TIMM, _TIMM_FRONT = "#15803d", "#6b7280", "#b8bcc4", "#8b919c"

_TITLE = 62  # characters of a title that fit above a panel
_LOGARITHMIC_FROM = 6  # times the smallest x: below this a linear axis reads better
_UNEVEN = 0.15  # relative difference of latencies above which a note is added

T = TypeVar("T")


@dataclass(frozen=True)
class Point:
    """A model in a plot.

    Attributes:
        entry: its row.
        x: its cost.
        y: its score.
        best: whether it is on the Pareto front of the zoo's models: no other model is both cheaper and better.
        seeds: rows of the same model trained with other seeds, itself first, of which ``x`` and ``y`` are the means;
            empty for a single one.
        x_range: quartiles of a latency; None if unknown.
        y_error: standard deviation over the seeds; None for a single one.
    """

    entry: Entry
    x: float
    y: float
    best: bool = False
    seeds: tuple[Entry, ...] = ()
    x_range: tuple[float, float] | None = None
    y_error: float | None = None

    @property
    def label(self) -> str:
        """The model's label in a plot; a saved model has the name of its folder."""
        row = self.entry.row
        how = row.label.removeprefix(row.name)
        if len(self.seeds) > 1:
            shared = display_name(family(row)) or display_name(row.name)
            return f"{shared}{how} ({len(self.seeds)} seeds)"
        return display_name(row.name) + how

    @property
    def rows(self) -> tuple[BenchRow, ...]:
        """The rows of its seeds, or its only row."""
        return tuple(entry.row for entry in self.seeds or (self.entry,))


@dataclass(frozen=True)
class Series:
    """Markers or a line with one style and one legend entry; a panel draws its series in order.

    Attributes:
        name: name in the legend.
        places: x and y; ``(None, None)`` interrupts a line.
        style: style of markers (``"dot"``, ``"square"``, ``"circle"``, ``"ring"``) or of a line.
        color: as ``#rrggbb``.
        steps: whether a line is drawn in steps, right first and then up.
        labels: label of each marker.
        facts: data of each marker as lines of text, the name first; shown on hovering.
        in_legend: False for markers on a line that is in the legend already.
        x_ranges: lower and upper end of each marker's error bar; None for no bar.
        y_errors: half the length of each marker's error bar; None for no bar.
        copies: Python that creates the model of each marker.
    """

    name: str
    places: tuple[tuple[float | None, float | None], ...]
    style: Literal["dot", "square", "circle", "ring", "solid", "dashed", "dotted"]
    color: str
    steps: bool = False
    labels: tuple[str, ...] = ()
    facts: tuple[tuple[str, ...], ...] = ()
    in_legend: bool = True
    x_ranges: tuple[tuple[float, float] | None, ...] = ()
    y_errors: tuple[float | None, ...] = ()
    copies: tuple[str, ...] = ()

    @property
    def is_line(self) -> bool:
        return self.style in ("solid", "dashed", "dotted")

    @property
    def xs(self) -> tuple[float | None, ...]:
        """The costs."""
        return tuple(x for x, _ in self.places)

    @property
    def ys(self) -> tuple[float | None, ...]:
        """The scores."""
        return tuple(y for _, y in self.places)


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: the data set and, for latencies, the setting of the measurement.
        x_label: label of the cost axis.
        y_label: label of the score axis.
        points: the zoo's models.
        joins: pairs of plain backbone and LAM, joined by a line.
        curves: the same model with several token budgets, by increasing cost, joined by a line.
        timm: timm's published results with known GMACs, drawn in the background.
        timm_front: the Pareto front of those, by increasing GMACs.
    """

    title: str
    x_label: str
    y_label: str
    points: tuple[Point, ...] = ()
    joins: tuple[tuple[Point, Point], ...] = ()
    curves: tuple[tuple[Point, ...], ...] = ()
    timm: tuple[TimmResult, ...] = ()
    timm_front: tuple[TimmResult, ...] = ()

    @cached_property
    def front(self) -> tuple[Point, ...]:
        """The points on the Pareto front, by increasing cost."""
        return tuple(sorted((point for point in self.points if point.best), key=lambda point: (point.x, point.y)))

    @property
    def logarithmic(self) -> bool:
        """Whether the costs are so far apart that their axis should be logarithmic."""
        xs = [point.x for point in self.points] + [result.gmacs or 0.0 for result in self.timm]
        return bool(xs) and min(xs) > 0 and max(xs) > _LOGARITHMIC_FROM * min(xs)

    @property
    def heading(self) -> str:
        """The title with lines truncated at the front, the least specific part of a path, to fit above the panel."""
        lines = (line if len(line) <= _TITLE else f"…{line[1 - _TITLE :]}" for line in self.title.split("\n"))
        return "\n".join(lines)

    @cached_property
    def series(self) -> tuple[Series, ...]:
        """All series of the panel, the background first; labels are drawn on top."""
        timm = tuple((result.gmacs, result.top1) for result in self.timm)
        timm_front = tuple((result.gmacs, result.top1) for result in self.timm_front)
        joins = tuple(
            place for plain, lam in self.joins for place in ((plain.x, plain.y), (lam.x, lam.y), (None, None))
        )
        front = tuple((point.x, point.y) for point in self.front)
        found = [
            Series("timm's published results", timm, "dot", _TIMM, facts=tuple(map(_timm_facts, self.timm))),
            Series("their Pareto front", timm_front, "dotted", _TIMM_FRONT, steps=True),
            Series("LAM and its backbone", joins, "solid", _JOIN),
            *(self._curves(masked) for masked in (False, True)),
            Series("Pareto front", front, "dashed", _FRONT, steps=True),
            Series("on the front", front, "ring", _FRONT, in_legend=False),
            self._models("plain backbone", "square", PLAIN, masked=False),
            self._models("with LAM", "circle", LAM, masked=True),
        ]
        return tuple(series for series in found if series.places)

    def _models(self, name: str, style: Literal["square", "circle"], color: str, *, masked: bool) -> Series:
        points = [point for point in self.points if point.entry.row.has_lam == masked]
        return Series(
            name,
            tuple((point.x, point.y) for point in points),
            style,
            color,
            labels=tuple(point.label for point in points),
            facts=tuple(_facts(point, self.y_label) for point in points),
            x_ranges=tuple(point.x_range for point in points),
            y_errors=tuple(point.y_error for point in points),
            copies=tuple(creation(point.entry.row) for point in points),
        )

    def _curves(self, masked: bool) -> Series:
        curves = (curve for curve in self.curves if curve[0].entry.row.has_lam == masked)
        places = tuple(place for curve in curves for place in (*((point.x, point.y) for point in curve), (None, None)))
        name = "token budgets, with LAM" if masked else "token budgets, plain"
        return Series(name, places, "solid", LAM if masked else PLAIN)


def gmacs_panels(comparison: Comparison) -> tuple[Panel, ...]:
    """Returns score against GMACs, one panel per data set and metric; that of ImageNet-1k includes timm's results."""
    label = "GMACs of one image, masks included (10⁹ multiply-accumulates)"
    known = tuple(result for result in comparison.timm if result.gmacs is not None)
    front = pareto(known, lambda result: (result.gmacs or 0.0, result.top1))
    panels = []
    for group in comparison.groups:
        if not group.scored:
            continue
        panel = _panel(group.title, label, group, group.entries, lambda entry: entry.row.gmacs)
        panels.append(replace(panel, timm=known, timm_front=front) if group is comparison.timm_group else panel)
    if known and comparison.timm_group is None:
        title = "ImageNet-1k, validation: timm's published results alone"
        panels.append(Panel(title, label, "top-1 (%)", timm=known, timm_front=front))
    return tuple(panels)


def latency_panels(comparison: Comparison) -> tuple[Panel, ...]:
    """Returns score against latency, one panel per data set, metric, device, dtype, number of threads and mode.

    Latencies of separate runs are not compared if there is a ratio: a LAM is plotted at the latency of its plain
    backbone times its ratio, which was measured in alternation; see :func:`comparable_latency`.
    """
    panels = []
    for group in comparison.groups:
        if not group.scored:
            continue
        for setting in dict.fromkeys(entry.setting for entry in group.entries if entry.row.latency_ms is not None):
            device, dtype, threads, mode = setting
            counted = "" if threads is None else f", {threads} thread{'s' if threads != 1 else ''}"
            title = f"{group.title}\n{device or 'unknown device'}, {dtype or 'unknown dtype'}{counted}, {mode}"
            label = "latency of one image (ms, median); of a LAM: its backbone's times the ratio timed in alternation"
            entries = [entry for entry in group.entries if entry.setting == setting]
            panels.append(_panel(title, label, group, entries, comparable_latency, latency_range))
    return tuple(panels)


def comparable_latency(entry: Entry) -> float | None:
    """Returns a latency in milliseconds that is comparable with that of the plain backbone's row.

    It is the latency of the backbone times the ratio to the same model without masks, measured in alternation on one
    machine. Without a ratio, or a row of the backbone in the same setting, it is the latency of the row.
    """
    backbone = _timed_backbone(entry)
    return entry.row.latency_ms if backbone is None else backbone * (entry.row.latency_ratio or 0.0)


def latency_range(entry: Entry) -> tuple[float, float] | None:
    """Returns the quartiles of :func:`comparable_latency`, those of the ratio where it is used; None if unknown."""
    row, backbone = entry.row, _timed_backbone(entry)
    low, high = (
        (row.latency_q1_ms, row.latency_q3_ms) if backbone is None else (row.latency_ratio_q1, row.latency_ratio_q3)
    )
    return None if low is None or high is None else (low * (backbone or 1.0), high * (backbone or 1.0))


def _timed_backbone(entry: Entry) -> float | None:
    """Returns the latency that the ratio of a row is multiplied with; None without such a row or ratio."""
    row, twin = entry.row, entry.twin
    if row.latency_ratio is None or twin is None or Entry(twin, "").setting != entry.setting:
        return None
    return twin.latency_ms


def creation(row: BenchRow) -> str:
    """Returns the Python that creates the model of a row, printable but for the ends of its lines."""
    given = [_literal(row.name)]
    given += ["pretrained=True"] if row.weights_sha256 or row.value is not None else []
    size = _resized(row)
    given += [] if size is None else [f"img_size={size}"]
    lines = [f"model = lamzoo.create_model({', '.join(given)})"]
    if row.merge is not None:
        lines.append(f"lamzoo.merge_tokens(model, target_gmacs={row.merge:g} * lamzoo.profile(model).gmacs)")
    return "\n".join([*lines, *(["lamzoo.fuse(model)"] if row.form else [])])


def _literal(text: str) -> str:
    """Returns a string of Python in double quotes, without hidden characters, for text of a table of any origin."""
    return printable(json.dumps(text, ensure_ascii=False))


def command(row: BenchRow) -> str:
    """Returns a command that measures a row again, with its settings, on a device of the same type."""
    device = None if row.device is None else row.device.partition(" ")[0]
    options = {
        "--data": row.data,
        "--split": row.split if row.data else None,
        "--img-size": _resized(row),
        "--device": device,
        "--dtype": row.dtype,
        "--threads": row.threads,
        "--seed": row.seed,
        "--merge": None if row.merge is None else f"{row.merge:g}",
        "--rerank": None if row.rerank is None else row.rerank or 1,  # any number also measures without
        "--out": "again.csv",
    }
    parts = [f"{option} {shlex.quote(str(value))}" for option, value in options.items() if value is not None]
    flags = ["--fuse"] * (row.form is not None) + ["--compile"] * (row.mode == "compiled")
    return " ".join(["lamzoo bench", shlex.quote(row.name), *parts, *flags])


def _resized(row: BenchRow) -> int | None:
    """Returns the image size that a model is built with, unless it is its own; one that isn't square always is."""
    if row.img_size is None or not row.img_size.isdecimal():
        return None
    size = int(row.img_size)
    if ":" in row.name or "/" in row.name:  # neither read folders that a table names, nor import another library
        return size
    try:
        known = get_pretrained_cfg(row.name).input_size
    except LamzooError:  # not registered on this machine
        return size
    return None if tuple(known[1:]) == (size, size) else size


def plot_notes(comparison: Comparison) -> tuple[str, ...]:
    """Returns notes on what the plots omit or separate, and why, one sentence each."""
    notes = []
    entries = [entry for group in comparison.groups for entry in group.entries]
    unscored = [entry.row.name for group in comparison.groups if not group.scored for entry in group.entries]
    if unscored:
        notes.append(f"Not plotted, because measured without --data and so without a score: {some(unscored)}.")
    scored = [group for group in comparison.groups if group.scored]
    if len(scored) > 1:
        notes.append("Scores on different data, splits or metrics are not comparable: each has its own panel.")
    for column, values in (("GMACs", [e.row.gmacs for e in entries]), ("latency", [e.row.latency_ms for e in entries])):
        without = [entry.row.name for entry, value in zip(entries, values, strict=True) if value is None]
        if without:
            notes.append(f"Not plotted, because {column} was not measured: {some(without)}.")
    timed = [entry for group in scored for entry in group.entries if entry.row.latency_ms is not None]
    settings = dict.fromkeys(entry.setting for entry in timed)
    if len(settings) > 1:
        notes.append("Latencies of different devices, dtypes, threads or modes are not comparable: each has a panel.")
    for setting in settings:
        versions = sorted({str(entry.row.torch) for entry in timed if entry.setting == setting})
        if len(versions) > 1:
            notes.append(
                f"Latencies on {setting[0]} were measured with different torch versions: {', '.join(versions)}."
            )
    uneven = [entry.row.name for entry in entries if _uneven(entry)]
    if uneven:
        notes.append(
            f"The row of the plain backbone is more than {_UNEVEN:.0%} faster or slower than in alternation with its "
            f"LAM, so the ratio is more reliable than the two latencies and is plotted: {some(uneven)}."
        )
    if any(point.y_error is not None for panel in gmacs_panels(comparison) for point in panel.points):
        notes.append(
            "A model trained with several seeds is one point: the mean, with the standard deviation as its error bar."
        )
    if comparison.timm:
        without = [result.name for result in comparison.timm if result.gmacs is None]
        if without:
            notes.append(f"Of timm's {len(comparison.timm)} results {len(without)} have no GMACs at their image size.")
        notes.append("timm's speeds were measured on other machines and are not in the latency plots.")
    return tuple(notes)


def pareto(items: Iterable[T], place: Callable[[T], tuple[float, float]]) -> tuple[T, ...]:
    """Returns the Pareto front: items for which no other has at most their cost and at least their score, one strictly.

    Args:
        items: any items.
        place: returns the cost (lower is better) and score (higher is better) of an item.

    Returns:
        The items on the front, by increasing cost, including ties.
    """
    front: list[T] = []
    best: tuple[float, float] = (-math.inf, -math.inf)
    for item in sorted(items, key=lambda item: (place(item)[0], -place(item)[1])):
        here = place(item)
        if here[1] > best[1] or here == best:
            front.append(item)
            best = here
    return tuple(front)


def _uneven(entry: Entry) -> bool:
    """Returns whether the machine ran at another speed when the row of the twin was timed."""
    in_turns, twin = entry.row.plain_latency_ms, entry.twin
    if in_turns is None or twin is None or not twin.latency_ms or entry.setting != Entry(twin, "").setting:
        return False
    return abs(in_turns / twin.latency_ms - 1) > _UNEVEN


def _panel(
    title: str,
    x_label: str,
    group: Group,
    entries: Sequence[Entry],
    cost: Callable[[Entry], float | None],
    spread: Callable[[Entry], tuple[float, float] | None] = lambda entry: None,
) -> Panel:
    placed = [entry for entry in entries if cost(entry) is not None and entry.row.value is not None]
    together: dict[object, list[Entry]] = {}
    for entry in placed:
        together.setdefault(_without_seed(entry), []).append(entry)
    made = [
        point
        for alike in together.values()
        for point in (
            [_mean(alike, cost)]
            if _are_seeds(alike)
            else [Point(entry, cost(entry) or 0.0, entry.row.value or 0.0, x_range=spread(entry)) for entry in alike]
        )
    ]
    best = {id(point) for point in pareto(made, lambda point: (point.x, group.sign * point.y))}
    points = tuple(replace(point, best=id(point) in best) for point in made)
    by_row = {row: point for point in points for row in point.rows}
    curves = _budget_curves(points)
    reduced = {id(point) for curve in curves for point in curve if point.entry.row.merge is not None}
    joins = tuple(
        (by_row[point.entry.twin], point)
        for point in points
        if point.entry.twin is not None and point.entry.twin in by_row and id(point) not in reduced
    )
    return Panel(title, x_label, group.metric_label, points, joins, curves)


def _without_seed(entry: Entry) -> object:
    row = entry.row
    cost = (row.params_m, row.lam_params_m, row.gmacs, row.lam_gmacs)
    return (family(row), row.plain, *cost, row.merge, row.form, row.rerank, row.img_size, *entry.setting)


def _are_seeds(alike: Sequence[Entry]) -> bool:
    """Returns whether rows that differ by seeds at most are several trainings, not one measured several times."""
    weights = {entry.row.weights_sha256 for entry in alike} - {None}
    return len(weights) == len(alike) > 1


def _mean(seeds: Sequence[Entry], cost: Callable[[Entry], float | None]) -> Point:
    """Returns the point of one model with several seeds."""
    values = [entry.row.value or 0.0 for entry in seeds]
    costs = [cost(entry) or 0.0 for entry in seeds]
    x, y = statistics.fmean(costs), statistics.fmean(values)
    ends = None if min(costs) == max(costs) else (min(costs), max(costs))
    return Point(seeds[0], x, y, seeds=tuple(seeds), x_range=ends, y_error=statistics.stdev(values))


def _budget_curves(points: Sequence[Point]) -> tuple[tuple[Point, ...], ...]:
    """Returns the points of each model that was measured with several token budgets, by increasing cost."""
    curves: dict[object, list[Point]] = {}
    for point in points:
        row = point.entry.row
        weights = frozenset((seed.name, seed.weights_sha256) for seed in point.rows)
        curves.setdefault((weights, row.form, row.rerank, row.img_size, point.entry.setting), []).append(point)
    found = (sorted(curve, key=lambda point: point.x) for curve in curves.values())
    return tuple(tuple(curve) for curve in found if len({point.entry.row.merge for point in curve}) == len(curve) > 1)


def _facts(point: Point, y_label: str) -> tuple[str, ...]:
    row = point.entry.row
    score = f"{y_label}: {number(point.y, digits=2)}"
    if point.y_error is not None:
        each = ", ".join(number(seed.value, digits=2) for seed in point.rows)
        score += f" ± {number(point.y_error, digits=2)} (standard deviation of {len(point.seeds)} seeds: {each})"
    elif point.entry.difference is not None:
        score += f" ({point.entry.difference:+.2f} against its backbone)"
    lines = [point.label if point.seeds else row.label, score]
    for label, whole, part in (
        ("GMACs", row.gmacs, row.lam_gmacs),
        ("params (M)", row.params_m, row.lam_params_m),
    ):
        lines.append(f"{label}: {number(whole)}" + (f", {number(part)} in masks" if part else ""))
    if row.latency_ms is not None:
        ratio = "" if row.latency_ratio is None else f", {row.latency_ratio:.2f} × plain"
        lines.append(f"latency: {row.latency_ms:.2f} ms{ratio}")
    machine = setting_text(point.entry) + (f", torch {row.torch}" if row.torch else "")
    return (*lines, f"machine: {machine}", command(row))


def _timm_facts(result: TimmResult) -> tuple[str, ...]:
    speeds = (f"{speed.images_per_s:,.0f} images/s, batch {speed.batch}: {speed.machine}" for speed in result.speeds)
    return (
        f"{result.name} (timm)",
        f"top-1: {result.top1:.2f} %",
        f"GMACs: {number(result.gmacs)}",
        f"{number(result.params_m)} M parameters, {result.img_size} px",
        *speeds,
    )
