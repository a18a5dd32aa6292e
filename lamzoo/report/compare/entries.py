"""Benchmarked models, grouped by the data of their score, each LAM with its plain twin."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from lamzoo.data.splits import SPLIT_NAMES
from lamzoo.errors import DataError
from lamzoo.profiling.results import BenchRow, read_rows
from lamzoo.report.compare.timm_results import TimmResult, is_imagenet1k, read_timm
from lamzoo.tasks import find_metric

Setting = tuple[str | None, str | None, int | None, str]

_DATA_SETS = {
    "charades": "Charades-STA", "flickr8k": "Flickr8k", "grid": "GRID", "lsmdc": "LSMDC", "mad": "MAD",
    "msrvtt": "MSR-VTT", "msvd": "MSVD", "qvhighlights": "QVHighlights", "tvsum": "TVSum",
}  # fmt: skip
_SEED = r"(?:^|[-_./\\])seed[-_]?\d+$"  # at the end of a run's folder, or all of its name
_NAMED = 3  # maximum number of names in a note


@dataclass(frozen=True)
class Entry:
    """One row of a results table, with its context.

    Attributes:
        row: the measurements.
        source: the file that contains the row.
        twin: the row of its plain backbone with all tokens at the same image size, scored on the same data, preferably
            in the same setting; None for such a backbone, or if there is no such row.
    """

    row: BenchRow
    source: str
    twin: BenchRow | None = None

    @property
    def setting(self) -> Setting:
        """Device, dtype, threads and mode; only latencies of the same setting are comparable."""
        return (self.row.device, self.row.dtype, self.row.threads, self.row.mode)

    @property
    def difference(self) -> float | None:
        """The score minus that of the plain twin."""
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
    """Models with comparable scores.

    Attributes:
        data: the data set; None, like the next two, for models without a score.
        split: its split.
        metric: the metric.
        entries: smaller models first, each plain model before the LAMs on the same backbone.
        name: short name of the data set, as of :func:`data_name`; its specification where two have the same.
    """

    data: str | None
    split: str | None
    metric: str | None
    entries: tuple[Entry, ...]
    name: str = ""

    @property
    def scored(self) -> bool:
        """Whether the models have a score."""
        return self.metric is not None

    @property
    def title(self) -> str:
        """The data set and its split."""
        if self.data is None:
            return "not scored"
        name = self.name or self.data
        return f"{name}, {self.split}" if self.split else name

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
    """A comparison of models.

    Attributes:
        groups: one for each data set, split and metric; the models without a score last.
        failed: rows whose measurement failed.
        timm: timm's published results on ImageNet-1k.
        timm_group: the group that is comparable with these results, if there is one.
        notes: notes on the selection and its limits, one sentence each.
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
    """Reads results tables and groups comparable models.

    Args:
        paths: CSV files written by ``lamzoo bench``.
        timm: folder of timm's ``results-imagenet.csv`` and ``benchmark-infer-*.csv``, or the path of the former.
        timm_data: the ``data`` of the rows scored on ImageNet-1k's validation split, which are compared with timm's;
            guessed from the names by default.

    Raises:
        DataError: a file can't be read, the row of a LAM lacks its cost, there are no rows, or no row has
            ``timm_data``.
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
    """Joins names for a sentence; lists the first few and counts the others."""
    unique = list(dict.fromkeys(names))
    more = len(unique) - _NAMED
    return ", ".join(unique[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def data_name(spec: str) -> str:
    """Returns a short name of a data set, without the path on the machine that measured.

    ``"npz:../shared/data/cifar10"`` gives ``"cifar10"``, ``"imagefolder:/data/imagenet/val"`` ``"imagenet"``,
    ``"grid:/data/grid_s1:lips"`` ``"GRID, lips"``, ``"hfds:timm/imagenet-1k-wds"`` ``"timm/imagenet-1k-wds"``.
    """
    kind, colon, rest = spec.partition(":")
    if not colon or not rest or kind == "hfds":
        return rest or spec
    known = _DATA_SETS.get(kind)
    folder, _, option = rest.rpartition(":") if known and ":" in rest else (rest, "", "")
    if known:
        return f"{known}, {option}" if option and not re.search(r"[/\\]", option) else known
    if kind == "torchvision":
        return rest.partition(":")[0]
    parts = [part for part in re.split(r"[/\\]", folder) if part not in ("", ".", "..")]
    parts = [part for part in parts if not _is_pattern(part)] or parts
    while len(parts) > 1 and parts[-1].lower() in SPLIT_NAMES:
        parts.pop()
    return parts[-1] if parts else spec


def family(row: BenchRow) -> str:
    """Returns a row's name without the seed that ends the folder of a training run.

    ``local-dir:runs/lam-seed1`` gives ``local-dir:runs/lam``, ``local-dir:runs/rank4/seed0`` ``local-dir:runs/rank4``.
    """
    if not row.name.startswith("local-dir:"):
        return row.name
    kind, _, folder = row.name.partition(":")
    run = re.sub(r"(?<=[^/\\])[/\\]+model$", "", folder.rstrip("/\\"))
    return f"{kind}:{re.sub(_SEED, '', run)}"


def _is_pattern(part: str) -> bool:
    return any(sign in part for sign in "{*")


def setting_text(entry: Entry) -> str:
    """Formats the setting of a measurement: ``"cpu, float32, 2 threads, eager"``."""
    device, dtype, threads, mode = entry.setting
    counted = None if threads is None else f"{threads} thread{'s' if threads != 1 else ''}"
    return ", ".join(part for part in (device, dtype, counted, mode) if part)


def number(value: float | None, *, digits: int | None = None) -> str:
    """Formats a number for a table.

    Args:
        value: the number; None gives an empty cell.
        digits: decimal places; by default four significant digits with at most four decimal places, but always at least
            two significant digits, so that a small cost is never shown as zero.
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
        raise DataError(f"There are no rows in {some(map(str, paths))}; measure models with `lamzoo bench`.")
    if repeated:
        notes.append(f"{repeated} duplicate row(s) of the tables are shown once.")
    return list(entries.values())


def _check_finite(row: BenchRow, path: Path) -> None:
    for field in fields(row):
        value = getattr(row, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise DataError(f"{path}: {field.name} of {row.name} is {value}; measure it again with `lamzoo bench`.")


def _check_cost(row: BenchRow, path: Path) -> None:
    """Raises an error if the cost of the masks of a LAM is missing or zero, so that no table shows them as free."""
    masked = row.has_lam or bool(row.lam_gmacs) or row.plain is not None
    masked = masked or (row.latency_ratio is not None and None in (row.lam_params_m, row.lam_gmacs))
    if not (row.ok and masked):
        return
    costs = {"params_m": row.params_m, "lam_params_m": row.lam_params_m, "gmacs": row.gmacs, "lam_gmacs": row.lam_gmacs}
    for column, cost in costs.items():
        if not cost:
            raise DataError(
                f"{path}: {row.name} has masks and its {column} is {'empty' if cost is None else 'zero'}; the cost of "
                "the masks is required, so measure the model again with `lamzoo bench`."
            )


def _group(entries: list[Entry]) -> tuple[Group, ...]:
    members: dict[tuple[str | None, str | None, str | None], list[Entry]] = {}
    for entry in entries:
        row = entry.row
        scored = row.value is not None and row.metric is not None
        members.setdefault((row.data, row.split, row.metric) if scored else (None, None, None), []).append(entry)
    names = {data: data_name(data) for data, *_ in members if data is not None}
    repeated = {name for name, count in Counter(names.values()).items() if count > 1}
    groups = [
        Group(
            data, split, metric,
            _in_order([_with_twin(entry, rows) for entry in rows]),
            name="" if data is None or names[data] in repeated else names[data],
        )
        for (data, split, metric), rows in members.items()
    ]  # fmt: skip
    return tuple(sorted(groups, key=lambda group: (not group.scored, group.title, group.metric or "")))


def _with_twin(entry: Entry, others: list[Entry]) -> Entry:
    row = entry.row
    name = row.plain if row.plain is not None or row.merge is None else row.name
    if name is None:
        return entry
    whole = [
        other
        for other in others
        if other.row.name == name and (other.row.merge, other.row.form, other.row.rerank) == (None, None, row.rerank)
    ]
    candidates = [other for other in whole if other.row.img_size == row.img_size]
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
        known = some(str(group.data) for group in scored) or "no row with a score"
        raise DataError(f"No row was scored on --timm-data {data!r}; the tables have {known}.")
    for group in scored:
        if group.metric == "top1" and (group.data == data if data else is_imagenet1k(str(group.data))):
            notes.append(
                f"{group.title} is assumed to be ImageNet-1k's validation split, on which timm published its results; "
                "--timm-data selects another."
            )
            return group
    notes.append(
        "No row was scored on ImageNet-1k's validation split, as timm's published results are, so these have their own "
        "panel (--timm-data selects the rows to compare with them)."
    )
    return None


def _missing_twins(groups: tuple[Group, ...]) -> list[str]:
    alone = [entry.row for group in groups for entry in group.entries if entry.row.has_lam and entry.twin is None]
    if not alone:
        return []
    names = some(row.name if row.plain is None else f"{row.name} (of {row.plain})" for row in alone)
    return [f"Without a row of the plain backbone at the same size and on the same data: {names}."]


def _over_the_rest(whole: float | None, part: float | None) -> float | None:
    return None if whole is None or part is None or whole <= part else whole / (whole - part)
