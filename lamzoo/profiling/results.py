"""The results table: one typed row a measured model, read from and written to CSV; measures nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lamzoo import records
from lamzoo.tasks import MetricSpec, find_metric

Status = Literal["ok", "failed"]
Mode = Literal["eager", "compiled"]


@dataclass(frozen=True)
class BenchRow:
    """What was measured of one model under one setting; None is an empty cell. The fields are the CSV's columns.

    Attributes:
        model: name of the architecture, as for ``create_model``: ``"lam_vit_micro"``, ``"timm/vit_tiny_patch16_224"``,
            ``"local-dir:runs/mine"``.
        tag: its set of weights; None for random weights that no tag was asked for.
        data: the data set that ``value`` was measured on, as given; None where none was.
        split: of that data.
        metric: what ``value`` is, the name of a metric of the task: ``"top1"``.
        value: the score.
        params_m: 10^6 parameters.
        lam_params_m: the masks' part of them.
        gmacs: 10^9 multiply-accumulates of one image.
        lam_gmacs: the masks' part of them.
        latency_ms: median milliseconds of one image (batch 1).
        latency_ratio: median ratio to the plain backbone, timed in turns; None for a plain model.
        images_per_s: throughput at ``batch``, of the median pass.
        peak_mib: MiB that the weights and a forward pass of one image occupy, as
            :class:`lamzoo.profiling.MemoryMeter` says; None on the CPU for a compiled model, where the compiler's own
            memory would be in it.
        img_size: height of the images in pixels, or ``"HxW"`` where they are not square.
        batch: images at a time where ``images_per_s`` is highest.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``.
        device: ``"cpu (AMD EPYC)"`` or ``"cuda (NVIDIA H100)"``.
        threads: of PyTorch on the CPU.
        torch: version.
        timm: version.
        weights_sha256: of the weights' file; None for random weights.
        seed: of the weights and the input.
        commit: of the lamzoo checkout, with ``-dirty`` for uncommitted changes; None for an installed wheel.
        plain: :attr:`name` of the row of the plain twin, None for a plain model or one without a twin.
        latency_q1_ms: first quartile of the latency.
        latency_q3_ms: third quartile.
        latency_ratio_q1: first quartile of the ratio.
        latency_ratio_q3: third quartile.
        plain_latency_ms: median milliseconds of the same model without its masks, timed in the same turns.
        images_per_s_ratio: throughput over that of the same model without its masks, at the same batch.
        mode: run eagerly or through ``torch.compile``.
        status: whether the measurement succeeded.
        error: why it did not, in one line.
        task: the name of the model's task; None in tables of lamzoo 0.1.
    """

    model: str
    tag: str | None = None
    data: str | None = None
    split: str | None = None
    metric: str | None = None
    value: float | None = None
    params_m: float | None = None
    lam_params_m: float | None = None
    gmacs: float | None = None
    lam_gmacs: float | None = None
    latency_ms: float | None = None
    latency_ratio: float | None = None
    images_per_s: float | None = None
    peak_mib: float | None = None
    img_size: str | None = None
    batch: int | None = None
    dtype: str | None = None
    device: str | None = None
    threads: int | None = None
    torch: str | None = None
    timm: str | None = None
    weights_sha256: str | None = None
    seed: int | None = None
    commit: str | None = None
    plain: str | None = None
    latency_q1_ms: float | None = None
    latency_q3_ms: float | None = None
    latency_ratio_q1: float | None = None
    latency_ratio_q3: float | None = None
    plain_latency_ms: float | None = None
    images_per_s_ratio: float | None = None
    mode: Mode = "eager"
    status: Status = "ok"
    error: str | None = None
    task: str | None = None

    @property
    def name(self) -> str:
        """``arch.tag``, or the bare ``arch`` where there is no tag; what ``plain`` of a row with masks refers to."""
        return f"{self.model}.{self.tag}" if self.tag else self.model

    @property
    def spec(self) -> MetricSpec | None:
        """The metric that ``value`` is of; None where the model was not scored, or the metric is unknown here."""
        return None if self.metric is None else find_metric(self.metric, self.task)

    @property
    def ok(self) -> bool:
        """Whether the measurement succeeded."""
        return self.status == "ok"

    @property
    def has_lam(self) -> bool:
        """Whether the model has masks; False where the measurement failed before that was known."""
        return bool(self.lam_params_m)

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells this row from the others of a table: model, data and the setting of the measurement."""
        setting = (self.img_size, self.dtype, self.device, self.threads, self.mode)
        return (self.model, self.tag, self.data, self.split, *setting)


COLUMNS = tuple(field.name for field in dataclasses.fields(BenchRow))

# The decimals that a measurement of that kind is good for; the rest of a float is noise in a diff.
_DECIMALS = {"value": 3, "params_m": 6, "lam_params_m": 6, "gmacs": 6, "lam_gmacs": 6, "peak_mib": 1}


def read_rows(path: str | Path) -> list[BenchRow]:
    """Reads a results table.

    Args:
        path: a CSV that :func:`write_rows` wrote; its columns may have any order.

    Returns:
        Its rows, in the order of the file.

    Raises:
        DataError: the file cannot be read, a column is missing or unknown, or a cell has another type; names file, line
            and column.
    """
    return records.read_csv(path, BenchRow, optional=("task",))


def write_rows(path: str | Path, rows: Iterable[BenchRow]) -> None:
    """Writes a results table, all of it or nothing; a table that was there is replaced.

    Args:
        path: the CSV.
        rows: in the order of the file.

    Raises:
        DataError: the file cannot be written there.
    """
    records.write_csv(path, COLUMNS, rows, cell=_cell)


def _cell(column: str, value: Any) -> str:
    return f"{value:.{_DECIMALS.get(column, 4)}f}" if isinstance(value, float) else str(value)
