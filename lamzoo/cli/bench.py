"""The command ``lamzoo bench``: measures the models that match patterns, one row of a results table each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lamzoo.cli import _output as out
from lamzoo.cli._options import MOST_PIXELS, Device, Json, Merge, check_share
from lamzoo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from lamzoo.data.trained import TrainedData
    from lamzoo.profiling.candidates import Candidate
    from lamzoo.profiling.results import BenchRow, Form
    from lamzoo.tasks import MetricSpec


def bench(
    patterns: Annotated[list[str], typer.Argument(metavar="PATTERN...", help=(
        "Model names: wildcards, parts of names, arch, arch.tag, timm/NAME, hf-hub:REPO or a folder."))],
    output: Annotated[Path, typer.Option("--out", metavar="FILE.csv", help=(
        "Results table; existing rows are kept, so a stopped run can be continued."))],
    data: Annotated[str | None, typer.Option(metavar="SPEC", help=(
        "Also score the models with their weights on this data set, specified as for eval; "
        "without it, weights are random."))] = None,
    split: Annotated[str | None, typer.Option(help="Split of the data [test, or all].")] = None,
    device: Device = "auto",
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(
        help="Dtype of weights and input, and of autocast in scoring.")] = "float32",
    threads: Annotated[int | None, typer.Option(
        min=1, max=1024, help="CPU threads; PyTorch's default if omitted.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Time the models with torch.compile.")] = False,
    batch: Annotated[int | None, typer.Option(min=1, help="Batch size of the throughput; the best by default.")] = None,
    max_batch: Annotated[int | None, typer.Option(min=1, help=(
        "Limit of the search for the best batch size [64 on the CPU, 1024 on CUDA]."))] = None,
    img_size: Annotated[int | None, typer.Option(
        min=1, max=MOST_PIXELS, help="Image size; each model's own by default.")] = None,
    repeats: Annotated[int, typer.Option(min=2, max=100_000, help="Number of timed passes of one image.")] = 30,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of random weights and images.")] = 0,
    eval_batch: Annotated[int, typer.Option(min=1, help="Batch size in scoring.")] = 64,
    workers: Annotated[int, typer.Option(min=0, max=1024, help="Worker processes that read images in scoring.")] = 0,
    plain: Annotated[bool, typer.Option("--plain/--no-plain", help=(
        "Also measure the plain twins of masked models, in separate rows."))] = True,
    merge: Merge = None,
    fuse: Annotated[bool, typer.Option("--fuse", help=(
        "Also measure models with additive masks in their fused form, in separate rows."))] = False,
    rerank: Annotated[int | None, typer.Option(min=1, metavar="K", help=(
        "Also measure retrieval models with a tight head in two stages, in separate rows: the first stage alone, and "
        "with K candidates per query, which the head orders."))] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Measure failed rows again.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Measure all rows again.")] = False,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds per model; no limit by default.")] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Measures models in separate processes: score, GMACs, parameters, latency, throughput and memory.

    A model with masks is timed alternately with the same model without them; latency_ratio is the median ratio. With
    --merge, every model is also measured with merged tokens, in a row of its own whose ratio is to the model without
    masks and with all tokens; with --fuse, models with additive masks also in their form for inference; with --rerank,
    retrieval models with a tight head also in two stages. The exit code is 1 if a row failed; the row contains the
    reason.
    """
    import torch

    from lamzoo.evaluation import resolve_device
    from lamzoo.files import check_target
    from lamzoo.profiling.bench import bench, checkout_commit
    from lamzoo.profiling.candidates import select_models
    from lamzoo.profiling.job import BenchJob
    from lamzoo.profiling.latency import device_label

    check_share(merge)
    check_target(output, "table", makes_folder=True)
    found = select_models(patterns, weights=data is not None, plain=plain)
    target = resolve_device(device)
    if target.type not in ("cpu", "cuda"):
        raise ConfigError(f"models are timed on cpu and cuda devices, not on {target}; use --device cpu")
    job = BenchJob(
        "",
        data=data,
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
    splits = _splits(data, split, found)
    forms: list[Form | None] = [None, "fused"] if fuse else [None]
    jobs = [
        dataclasses.replace(
            job, model=c.model, tag=c.tag, plain=c.plain, img_size=str(img_size) if img_size else c.img_size,
            task=c.task, split=splits[c.name], merge=share, form=form, rerank=count,
        )
        for c in found
        for share in ([None] if merge is None else [None, round(merge, 4)])  # as tables write it
        for form in (forms if c.fusible else forms[:1])
        for count in ([None, 0, rerank] if rerank and c.reranks and share is None and form is None else [None])
    ]  # fmt: skip
    with out.progress_bar("bench", hidden=json) as advance:
        result = bench(jobs, output, retry_failed=retry_failed, force=force, timeout=timeout, progress=advance)
    if json:
        out.print_json([dataclasses.asdict(row) for row in result.rows])
    else:
        _print(result.rows, output, result.kept)
    if result.failed:
        raise typer.Exit(1)


def _splits(data: str | None, split: str | None, models: Sequence[Candidate]) -> dict[str, str | None]:
    """Opens the data as each model is scored on it, so that an error ends the command early.

    If some of the tasks can open the data, the rows of the others fail.

    Returns:
        The split's name by model. A training run that made its own validation split of this data is scored on that, as
        by ``lamzoo eval``.
    """
    from lamzoo.data.splits import WHOLE
    from lamzoo.registry.catalog import trained_data_of
    from lamzoo.tasks import find_task

    if data is None:
        return dict.fromkeys(model.name for model in models)
    kinds = {model.name: (model.task, trained_data_of(model.name)) for model in models}
    splits: dict[tuple[str, TrainedData | None], str] = {}
    errors = []
    for task, trained in dict.fromkeys(kinds.values()):
        try:
            splits[task, trained] = find_task(task).open_for_scoring(data, split, trained).split or WHOLE
        except DataError as error:
            splits[task, trained] = split or "test"
            errors.append(error)
    if len(errors) == len(splits):
        raise errors[0]
    return {name: splits[kind] for name, kind in kinds.items()}


def _print(rows: Sequence[BenchRow], output: Path, kept: int) -> None:
    columns: dict[str, Any] = {"model": lambda row: row.label}
    for metric in dict.fromkeys(row.spec for row in rows if row.ok and row.value is not None):
        heading = "score" if metric is None else metric.heading
        columns[heading] = partial(_value, metric)
    columns |= {
        "params (M)": lambda row: row.params_m,
        "GMACs": lambda row: _decimals(row.gmacs, 4),
        "masks' GMACs": lambda row: _decimals(row.lam_gmacs, 4),
        "ms": lambda row: row.latency_ms,
        "ratio to plain": lambda row: _decimals(row.latency_ratio, 3),
        f"{_items(rows)}/s": lambda row: row.images_per_s,
        "batch": lambda row: row.batch,
        "peak MiB": lambda row: row.peak_mib,
    }
    good = [row for row in rows if row.ok]
    if good:
        row = good[0]
        title = f"{row.device}, {row.threads} threads, {row.dtype}, {row.mode}"
        cells = [[get(row) for get in columns.values()] for row in good]
        out.print_table(tuple(columns), cells, title=title, numbers=range(1, len(columns)))
    failed = [(row.label, row.error) for row in rows if not row.ok]
    if failed:
        out.print_table(("model", "reason"), failed, title="failed")
    out.print_line(f"{out.path_text(output)}: {len(rows) - kept} measured, {kept} kept, {len(failed)} failed")


def _value(metric: MetricSpec | None, row: BenchRow) -> str | None:
    if row.value is None or row.spec != metric:
        return None
    return f"{row.value:g}" if metric is None else metric.text(row.value)


def _items(rows: Sequence[BenchRow]) -> str:
    """Returns the plural of the inputs of all rows' tasks, or "inputs" if they differ; images in tables of 0.1."""
    from lamzoo.tasks import TASKS

    items = {TASKS[row.task].items if row.task in TASKS else "images" for row in rows}
    return items.pop() if len(items) == 1 else "inputs"


def _decimals(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"
