"""Measured models in their place: grouped by what their score was measured on, each LAM with its plain twin."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from lamzoo.errors import DataError
from lamzoo.profiling.results import BenchRow, read_rows
from lamzoo.report.compare.timm_results import TimmResult, is_imagenet1k, read_timm
from lamzoo.tasks import find_metric

Setting = tuple[str | None, str | None, int | None, str]

_NAMED = 3  # as many names as a note lists


@dataclass(frozen=True)
class Entry:
    """One row of a results table among others.

    Attributes:
        row: what was measured.
        source: the file that contains it.
        twin: the row of its plain backbone at the same image size, scored on the same data; None for a plain model,
            and where there is no such row. One measured under the same setting comes first.
    """

    row: BenchRow
    source: str
    twin: BenchRow | None = None

    @property
    def setting(self) -> Setting:
        """Device, dtype, threads and mode: latencies of one setting can be compared."""
        return (self.row.device, self.row.dtype, self.row.threads, self.row.mode)

    @property
    def difference(self) -> float | None:
        """The score less that of the plain twin."""
        if self.twin is None or self.twin.value is None or self.row.value is None:
            return None
        return self.row.value - self.twin.value

    @property
    def gmacs_ratio(self) -> float | None:
        """GMACs with masks over those without, of this model itself."""
        return _over_the_rest(self.row.gmacs, self.row.lam_gmacs) if self.row.has_lam else None

    @property
    def params_ratio(self) -> float | None:
        """Parameters with masks over those without, of this model itself."""
        return _over_the_rest(self.row.params_m, self.row.lam_params_m) if self.row.has_lam else None


@dataclass(frozen=True)
class Group:
    """Models whose scores can be compared.

    Attributes:
        data: the data set; None, like the next two, for models that were not scored.
        split: of it.
        metric: what was measured.
        entries: each plain model before the LAMs that have it for a backbone, smaller models first.
    """

    data: str | None
    split: str | None
    metric: str | None
    entries: tuple[Entry, ...]

    @property
    def scored(self) -> bool:
        """Whether the models have a score."""
        return self.metric is not None

    @property
    def title(self) -> str:
        """The data set and its split."""
        if self.data is None:
            return "not scored"
        return f"{self.data}, {self.split}" if self.split else self.data

    @property
    def sign(self) -> int:
        """1 where a higher score is better, -1 for errors and ranks."""
        spec = None if self.metric is None else find_metric(self.metric, self.entries[0].row.task)
        return 1 if spec is None or spec.higher_is_better else -1

    @property
    def metric_label(self) -> str:
        """The metric as a heading, with its unit."""
        spec = None if self.metric is None else find_metric(self.metric, self.entries[0].row.task)
        return spec.heading if spec is not None else self.metric or "score"


@dataclass(frozen=True)
class Comparison:
    """All that there is to compare.

    Attributes:
        groups: one for each data set, split and metric; the models without a score last.
        failed: rows whose measurement failed.
        timm: timm's published results on ImageNet-1k.
        timm_group: the group that they can be compared with, if there is one.
        notes: what a reader must know of what is and what is not shown, a sentence each.
    """

    groups: tuple[Group, ...]
    failed: tuple[Entry, ...]
    timm: tuple[TimmResult, ...] = ()
    timm_group: Group | None = None
    notes: tuple[str, ...] = ()

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All rows, the failed ones last."""
        return (*(entry for group in self.groups for entry in group.entries), *self.failed)


def compare(paths: Sequence[str | Path], *, timm: str | Path | None = None, timm_data: str | None = None) -> Comparison:
    """Reads results tables and puts what can be compared side by side.

    Args:
        paths: CSV files that ``lamzoo bench`` wrote.
        timm: folder of timm's ``results-imagenet.csv`` and ``benchmark-infer-*.csv``, or that file.
        timm_data: the ``data`` of the rows that were scored on ImageNet-1k's validation split and so belong beside
            timm's; guessed from its name by default.

    Raises:
        DataError: a file that cannot be read; rows of a LAM that lack its cost; no row at all; a ``timm_data`` that
            no row has.
    """
    notes: list[str] = []
    entries = _read(paths, notes)
    groups = _group([entry for entry in entries if entry.row.ok])
    published = () if timm is None else read_timm(timm)
    timm_group = _timm_group(groups, timm_data, notes) if published else None
    notes += _missing_twins(groups)
    return Comparison(
        groups=groups,
        failed=tuple(entry for entry in entries if not entry.row.ok),
        timm=published,
        timm_group=timm_group,
        notes=tuple(notes),
    )


def some(names: Iterable[str]) -> str:
    """Joins names for a sentence; of many the first few and how many more there are."""
    unique = list(dict.fromkeys(names))
    more = len(unique) - _NAMED
    return ", ".join(unique[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def setting_text(entry: Entry) -> str:
    """Writes out what a row was measured on: ``"cpu, float32, 2 threads, eager"``."""
    device, dtype, threads, mode = entry.setting
    counted = None if threads is None else f"{threads} thread{'s' if threads != 1 else ''}"
    return ", ".join(part for part in (device, dtype, counted, mode) if part)


def number(value: float | None, *, digits: int | None = None) -> str:
    """Writes a number for a table.

    Args:
        value: None gives an empty cell.
        digits: after the point; by default as many as make four significant ones, at most four, but two significant
            ones in any case, so that a small cost never reads as none.
    """
    if value is None:
        return ""
    if digits is None:
        magnitude = 0 if value == 0 else math.floor(math.log10(abs(value)))
        digits = 0 if value == 0 else max(0, min(3 - magnitude, max(4, 1 - magnitude)))
    return f"{value:.{digits}f}"


def _read(paths: Sequence[str | Path], notes: list[str]) -> list[Entry]:
    entries: dict[BenchRow, Entry] = {}
    repeated = 0
    for path in map(Path, paths):
        for row in read_rows(path):
            _check_finite(row, path)
            _check_cost(row, path)
            repeated += row in entries
            entries.setdefault(row, Entry(row, str(path)))
    if not entries:
        raise DataError(f"There is no row in {some(map(str, paths))}; `lamzoo bench` measures models into one.")
    if repeated:
        notes.append(f"{repeated} row(s) are in the tables twice, cell by cell, and are shown once.")
    return list(entries.values())


def _check_finite(row: BenchRow, path: Path) -> None:
    for field in fields(row):
        value = getattr(row, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise DataError(f"{path}: {field.name} of {row.name} is {value}; measure it again with `lamzoo bench`.")


def _check_cost(row: BenchRow, path: Path) -> None:
    """Refuses a LAM whose own cost was left out, so that no table can make it look free."""
    masked = row.has_lam or bool(row.lam_gmacs) or row.latency_ratio is not None or row.plain is not None
    if not (row.ok and masked):
        return
    costs = {"params_m": row.params_m, "lam_params_m": row.lam_params_m, "gmacs": row.gmacs, "lam_gmacs": row.lam_gmacs}
    for column, cost in costs.items():
        if not cost:
            raise DataError(
                f"{path}: {row.name} has masks and its {column} is {'empty' if cost is None else 'zero'}; a LAM is "
                "compared with its cost or not at all, so measure it again with `lamzoo bench`."
            )


def _group(entries: list[Entry]) -> tuple[Group, ...]:
    members: dict[tuple[str | None, str | None, str | None], list[Entry]] = {}
    for entry in entries:
        row = entry.row
        scored = row.value is not None and row.metric is not None
        members.setdefault((row.data, row.split, row.metric) if scored else (None, None, None), []).append(entry)
    groups = [Group(*key, _in_order([_with_twin(entry, rows) for entry in rows])) for key, rows in members.items()]
    return tuple(sorted(groups, key=lambda group: (not group.scored, group.title, group.metric or "")))


def _with_twin(entry: Entry, others: list[Entry]) -> Entry:
    row = entry.row
    if row.plain is None:
        return entry
    candidates = [other for other in others if other.row.name == row.plain and other.row.img_size == row.img_size]
    if not candidates:
        return entry

    def likeness(other: Entry) -> tuple[bool, bool, bool]:
        return (other.setting == entry.setting, other.row.seed == row.seed, other.source == entry.source)

    return replace(entry, twin=max(candidates, key=likeness).row)


def _in_order(entries: list[Entry]) -> tuple[Entry, ...]:
    def place(entry: Entry) -> tuple[object, ...]:
        plain = entry.twin or entry.row
        setting = tuple(str(part) for part in entry.setting)
        return (setting, plain.gmacs or 0.0, plain.name, entry.twin is not None, entry.row.gmacs or 0.0, entry.row.name)

    return tuple(sorted(entries, key=place))


def _timm_group(groups: tuple[Group, ...], data: str | None, notes: list[str]) -> Group | None:
    scored = [group for group in groups if group.scored]
    if data is not None and data not in {group.data for group in scored}:
        known = some(str(group.data) for group in scored) or "nothing: no row has a score"
        raise DataError(f"No row was scored on {data!r}, which --timm-data names; the tables' data is {known}.")
    for group in scored:
        if group.metric == "top1" and (group.data == data if data else is_imagenet1k(str(group.data))):
            notes.append(
                f"{group.title} is taken for ImageNet-1k's validation split, on which timm published its results; "
                "--timm-data names another."
            )
            return group
    notes.append(
        "No row here was scored on ImageNet-1k's validation split, as timm's published results are, so these have a "
        "panel of their own (--timm-data says which rows belong there)."
    )
    return None


def _missing_twins(groups: tuple[Group, ...]) -> list[str]:
    alone = [entry.row for group in groups for entry in group.entries if entry.row.has_lam and entry.twin is None]
    if not alone:
        return []
    names = some(row.name if row.plain is None else f"{row.name} (of {row.plain})" for row in alone)
    return [f"No row of the plain backbone at the same size and on the same data beside: {names}."]


def _over_the_rest(whole: float | None, part: float | None) -> float | None:
    return None if whole is None or part is None or whole <= part else whole / (whole - part)
