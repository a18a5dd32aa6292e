"""The results table: one typed row per measured model, stored as CSV."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lamzoo import records
from lamzoo.registry.refs import join_name
from lamzoo.tasks import MetricSpec, find_metric

Status = Literal["ok", "failed"]
Mode = Literal["eager", "compiled"]
Form = Literal["fused"]


@dataclass(frozen=True)
class BenchRow:
    """Measurements of one model in one setting; None is an empty cell. The fields are the CSV's columns.

    Attributes:
        model: name of the architecture for ``create_model``: ``"lam_vit_micro"``, ``"timm/vit_tiny_patch16_224"``,
            ``"local-dir:runs/mine"``.
        tag: tag of the weights; None for random weights without a tag.
        data: data set of ``value``, as given; None without a score.
        split: split of the data.
        metric: metric of ``value``, by its name in the task: ``"top1"``.
        value: the score.
        params_m: parameters in 10^6.
        lam_params_m: parameters of the masks in 10^6.
        gmacs: multiply-accumulates of one image in 10^9.
        lam_gmacs: multiply-accumulates of the masks in 10^9.
        latency_ms: median latency of one image (batch size 1) in milliseconds.
        latency_ratio: median ratio to the plain backbone with all tokens, timed alternately; None for such a backbone.
        images_per_s: throughput at ``batch``, from the median pass.
        peak_mib: memory of the weights and a forward pass of one image in MiB, measured by
            :class:`lamzoo.profiling.MemoryMeter`; None on the CPU for a compiled model, where it would include the
            compiler's memory.
        img_size: image height in pixels, or ``"HxW"`` if not square.
        batch: batch size of ``images_per_s``, the one with the highest throughput.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``.
        device: ``"cpu (AMD EPYC)"`` or ``"cuda (NVIDIA H100)"``.
        threads: number of PyTorch's CPU threads.
        torch: version of torch.
        timm: version of timm.
        weights_sha256: hash of the weights file; None for random weights.
        seed: seed of random weights and input.
        commit: commit of the lamzoo checkout, with ``-dirty`` for uncommitted changes; None for an installed wheel.
        plain: :attr:`name` of the plain twin's row; None for a plain model, or without a twin.
        latency_q1_ms: first quartile of the latency.
        latency_q3_ms: third quartile of the latency.
        latency_ratio_q1: first quartile of the ratio.
        latency_ratio_q3: third quartile of the ratio.
        plain_latency_ms: median latency of the same model without masks and token reduction in milliseconds, timed
            alternately.
        images_per_s_ratio: ratio to the throughput of the same model without both at the same batch size.
        mode: ``"eager"``, or ``"compiled"`` with ``torch.compile``.
        status: whether the measurement succeeded.
        error: reason of the failure, in one line.
        task: name of the model's task; None in tables of lamzoo 0.1.
        merge: share of its GMACs that the model's tokens were merged to, by ``lamzoo bench --merge``; None without.
        form: ``"fused"`` for the form for inference, by ``lamzoo bench --fuse``; None without.
        rerank: number of candidates that the joint transformer of a retrieval model orders, by ``lamzoo bench
            --rerank``; 0 for its first stage alone; None where it compares every pair, or there is none.
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
    merge: float | None = None
    form: Form | None = None
    rerank: int | None = None

    @property
    def name(self) -> str:
        """``arch.tag``, or ``arch`` without a tag; ``plain`` refers to this name."""
        return join_name(self.model, self.tag)

    @property
    def label(self) -> str:
        """The name, how tokens were merged, the form, and the stages of retrieval."""
        merged = "" if self.merge is None else f", merged to {100 * self.merge:g} %"
        form = "" if self.form is None else f", {self.form}"
        stages = "" if self.rerank is None else f", {self.rerank} reranked" if self.rerank else ", first stage"
        return self.name + merged + form + stages

    @property
    def spec(self) -> MetricSpec | None:
        """The metric of ``value``; None if the model was not scored or the metric is unknown."""
        return None if self.metric is None else find_metric(self.metric, self.task)

    @property
    def ok(self) -> bool:
        """Whether the measurement succeeded."""
        return self.status == "ok"

    @property
    def has_lam(self) -> bool:
        """Whether the model has masks; False if the measurement failed before this was known."""
        return bool(self.lam_params_m)

    @property
    def key(self) -> tuple[Any, ...]:
        """The identity of a row within a table: model, data and measurement settings."""
        setting = (self.img_size, self.dtype, self.device, self.threads, self.mode, self.merge, self.form, self.rerank)
        return (self.model, self.tag, self.data, self.split, *setting)


COLUMNS = tuple(field.name for field in dataclasses.fields(BenchRow))

# The decimals that are significant in each kind of measurement; more would be noise in diffs.
_DECIMALS = {"value": 3, "params_m": 6, "lam_params_m": 6, "gmacs": 6, "lam_gmacs": 6, "peak_mib": 1}


def read_rows(path: str | Path) -> list[BenchRow]:
    """Reads a results table.

    Args:
        path: a CSV file written by :func:`write_rows`; columns may have any order.

    Returns:
        The rows, in the order of the file.

    Raises:
        DataError: the file cannot be read, a column is missing or unknown, or a cell has the wrong type; names file,
            line and column.
    """
    return records.read_csv(path, BenchRow, optional=("task", "merge", "form", "rerank"))


def write_rows(path: str | Path, rows: Iterable[BenchRow]) -> None:
    """Writes a results table atomically; an existing table is replaced.

    Args:
        path: the CSV file.
        rows: the rows, in the order of the file.

    Raises:
        DataError: the file cannot be written.
    """
    records.write_csv(path, COLUMNS, rows, cell=_cell)


def _cell(column: str, value: Any) -> str:
    return f"{value:.{_DECIMALS.get(column, 4)}f}" if isinstance(value, float) else str(value)
