"""The command ``lamzoo bench``: models by pattern in, one row of a results table for each out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lamzoo.cli import _output as out
from lamzoo.cli._options import Device, Json
from lamzoo.errors import ConfigError

if TYPE_CHECKING:
    from lamzoo.profiling.results import BenchRow


def bench(
    patterns: Annotated[list[str], typer.Argument(metavar="PATTERN...", help=(
        "Wildcards, parts of names, arch, arch.tag, timm/NAME, hf-hub:REPO or a folder."))],
    output: Annotated[Path, typer.Option("--out", metavar="FILE.csv", help=(
        "The table; rows that are there are kept, so that a stopped run goes on."))],
    data: Annotated[str | None, typer.Option(metavar="SPEC", help=(
        "Also score the models, with their weights, on this data set, given as for eval; "
        "without it they have random weights."))] = None,
    split: Annotated[str | None, typer.Option(help="Which part of the data [test, or all].")] = None,
    device: Device = "auto",
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(
        help="Of weights and input, and of the autocast of the score.")] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="Of PyTorch on the CPU; its choice by default.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Time the models through torch.compile.")] = False,
    batch: Annotated[int | None, typer.Option(min=1, help="Of the throughput; the best that fits by default.")] = None,
    max_batch: Annotated[int | None, typer.Option(min=1, help=(
        "Where the search for it ends; at 64 on the CPU and 1024 on CUDA by default."))] = None,
    img_size: Annotated[int | None, typer.Option(min=1, help="Pixels; each model's own by default.")] = None,
    repeats: Annotated[int, typer.Option(min=2, help="Timed passes of one image.")] = 30,
    seed: Annotated[int, typer.Option(help="Of random weights and images.")] = 0,
    eval_batch: Annotated[int, typer.Option(min=1, help="Images at a time when scoring.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images when scoring.")] = 0,
    plain: Annotated[bool, typer.Option("--plain/--no-plain", help=(
        "Also measure the plain twins of the models with masks, as rows of their own."))] = True,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Measure failed rows again.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Measure all of them again.")] = False,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds for each model; no limit by default.")] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Measures models, each in a process of its own: accuracy, GMACs, parameters, latency, throughput and memory.

    A model with masks is timed in turns with itself without them; latency_ratio is the median of those pairs. The exit
    code is 1 where a row failed; the row says why.
    """
    import torch

    from lamzoo.evaluation import resolve_device
    from lamzoo.profiling.bench import bench, checkout_commit
    from lamzoo.profiling.candidates import select_models
    from lamzoo.profiling.job import BenchJob
    from lamzoo.profiling.latency import device_label

    target = resolve_device(device)
    if target.type not in ("cpu", "cuda"):
        raise ConfigError(f"models are timed on cpu and cuda devices, not on {target}; say --device cpu")
    job = BenchJob(
        "",
        data=data,
        split=_split(data, split),
        resize=img_size,
        dtype=dtype,
        device=str(target),
        device_name=device_label(target),
        threads=threads or torch.get_num_threads(),
        mode="compiled" if compiled else "eager",
        batch=batch,
        max_batch=max_batch,
        repeats=repeats,
        seed=seed,
        eval_batch=eval_batch,
        workers=workers,
        commit=checkout_commit(),
    )
    jobs = [
        dataclasses.replace(
            job, model=c.model, tag=c.tag, plain=c.plain, img_size=str(img_size) if img_size else c.img_size
        )
        for c in select_models(patterns, weights=data is not None, plain=plain)
    ]
    with out.progress_bar("bench", hidden=json) as advance:
        result = bench(jobs, output, retry_failed=retry_failed, force=force, timeout=timeout, progress=advance)
    if json:
        out.print_json([dataclasses.asdict(row) for row in result.rows])
    else:
        _print(result.rows, output, result.kept)
    if result.failed:
        raise typer.Exit(1)


def _split(data: str | None, split: str | None) -> str | None:
    """Opens the data, so that what is wrong with it is said before anything is measured; returns its split's name."""
    if data is None:
        return None
    from lamzoo.data import create_dataset
    from lamzoo.data.retrieval import VIDEO_KINDS, create_retrieval_dataset
    from lamzoo.data.splits import WHOLE, open_default

    create: Any = create_retrieval_dataset if data.partition(":")[0] in VIDEO_KINDS else create_dataset
    opener = partial(create, data)
    return (open_default(opener, "test") if split is None else opener(split)).split or WHOLE


def _print(rows: Sequence[BenchRow], output: Path, kept: int) -> None:
    columns: dict[str, Any] = {
        "model": lambda row: row.name,
        "top-1 (%)": lambda row: row.value,
        "params (M)": lambda row: row.params_m,
        "GMACs": lambda row: _decimals(row.gmacs, 4),
        "masks' GMACs": lambda row: _decimals(row.lam_gmacs, 4),
        "ms": lambda row: row.latency_ms,
        "ratio to plain": lambda row: _decimals(row.latency_ratio, 3),
        "images/s": lambda row: row.images_per_s,
        "batch": lambda row: row.batch,
        "peak MiB": lambda row: row.peak_mib,
    }
    good = [row for row in rows if row.ok]
    if not any(row.value is not None for row in good):
        del columns["top-1 (%)"]
    if good:
        row = good[0]
        title = f"{row.device}, {row.threads} threads, {row.dtype}, {row.mode}"
        cells = [[get(row) for get in columns.values()] for row in good]
        out.print_table(tuple(columns), cells, title=title, numbers=range(1, len(columns)))
    failed = [(row.name, row.error) for row in rows if not row.ok]
    if failed:
        out.print_table(("model", "reason"), failed, title="failed")
    out.print_line(f"{out.printable(output)}: {len(rows) - kept} measured, {kept} kept, {len(failed)} failed")


def _decimals(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"
