r"""Times an attention layer on every backend, alternating with the plain layer, and stores the ratios.

    python -m benchmarks.kernels                     the problems behind `lamzoo.lam.kernels.RULES`
    python -m benchmarks.kernels --lengths 4097 --ranks 1 9 17 --backends sdpa chunked
    python -m benchmarks.kernels --device cuda       the same for a GPU, in some 90 seconds, into kernels.gpu.csv
    python -m benchmarks.kernels --table             prints the table of stored long sequences
    python -m benchmarks.kernels --rules             prints the fastest backends of stored rows, for `RULES`

The layer is ViT-B's (width 768, 12 heads) with its projections. The mask's factors are given rather than computed, to
measure only the kernels (`lamzoo bench` times whole models, including mask networks). ``forward`` is inference,
``train`` a forward and a backward pass. Memory is the growth at the peak of a pass; on a CPU it is measured from 2,049
tokens on, in a fresh process for each layer. Existing rows are not measured again.

On a GPU, a batch has 32,768 tokens, and every backend and mask gets a process, in which all its kernels are compiled,
at the same time as those of the others; then one layer after another is timed. A backend that takes ten times as long
as the plain layer at one length is not timed at longer ones. Layers that fail are named, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass, fields, replace
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import lamzoo
from benchmarks.rows import STORED, markdown, measured_on, read_rows, with_quartiles, write_rows
from lamzoo.lam import available_backends
from lamzoo.lam.config import Heads
from lamzoo.lam.ops import OPS, Op
from lamzoo.profiling.latency import device_label, time_call
from lamzoo.profiling.memory import free_bytes, peak_growth

_WIDTH, _HEADS = 768, 12
_BATCH_TOKENS = 32768  # tokens of a batch on a GPU, which are to keep it busy
_HOPELESS = 10.0  # ratio to the plain layer from which a backend is not timed at longer lengths
_PLANS: dict[str, dict[str, list[Any]]] = {
    "cpu": {
        "lengths": [197, 577, 1025], "ranks": [1, 2, 9, 17, 33], "backends": ["eager", "sdpa", "chunked"],
        "dtype": ["float32"],
    },
    "cuda": {
        "lengths": [1024, 4096, 16384], "ranks": [1, 9, 17], "backends": ["sdpa", "triton", "flex", "eager"],
        "dtype": ["bfloat16"],
    },
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """A layer with a mask.

    Attributes:
        backend: backend of the masked layer.
        op: operation by which the mask acts.
        rank: columns of the mask's factors: ``LamConfig.rank`` plus one for the constant.
        heads: whether the heads share the mask.
        tokens: number of tokens per sample.
        batch: batch size.
        mode: ``"forward"`` or ``"train"``.
        dtype: dtype of tokens and weights.
        device: ``"cpu"`` or ``"cuda"``.
    """

    backend: str
    op: Op
    rank: int
    heads: Heads
    tokens: int
    batch: int
    mode: str
    dtype: str
    device: str


@dataclass(frozen=True)
class Row(Problem):
    """Measurements of a problem.

    Attributes:
        ratio: median ratio masked / plain over neighbouring runs.
        first_quartile: first quartile of the ratios.
        third_quartile: third quartile of the ratios.
        ms: median time of the masked layer in milliseconds.
        peak_mib: memory growth at the peak of a pass of the masked layer in MiB; None for short sequences.
        plain_peak_mib: memory growth of the plain layer, likewise.
        hardware: name of the device.
        threads: number of PyTorch's CPU threads.
        torch: version of torch.
        flash_ratio: median time of the masked layer relative to that of the plain layer on FlashAttention-2; None on a
            CPU.
    """

    ratio: float
    first_quartile: float
    third_quartile: float
    ms: float
    peak_mib: float | None
    plain_peak_mib: float | None
    hardware: str
    threads: int
    torch: str
    flash_ratio: float | None = None


def measure(problem: Problem, seconds: float, peaks: tuple[float | None, float | None]) -> Row:
    """Times one problem in this process.

    Args:
        problem: the problem.
        seconds: approximate duration of the timed pairs; at least six run.
        peaks: peak memory of the masked and of the plain layer in MiB.
    """
    device = torch.device(problem.device)
    masked, plain = (_pass(problem, which) for which in (True, False))
    for run in (masked, plain):
        run()
    pairs: list[tuple[float, float]] = []
    begun = time.perf_counter()
    while len(pairs) < 6 or (time.perf_counter() - begun < seconds and len(pairs) < 200):
        if len(pairs) % 2:
            first = time_call(plain, device)
            pairs.append((time_call(masked, device), first))
        else:
            pairs.append((time_call(masked, device), time_call(plain, device)))
    ms = statistics.median(mine for mine, _ in pairs)
    flash_ratio = None
    if problem.device == "cuda":
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            plain()
            flash_ratio = round(ms / statistics.median(time_call(plain, device) for _ in range(10)), 3)
    low, median, high = statistics.quantiles([mine / other for mine, other in pairs], n=4, method="inclusive")
    return Row(
        **asdict(problem),
        ratio=round(median, 3),
        first_quartile=round(low, 3),
        third_quartile=round(high, 3),
        ms=round(ms, 3),
        peak_mib=peaks[0],
        plain_peak_mib=peaks[1],
        hardware=device_label(device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        flash_ratio=flash_ratio,
    )


def peak_mib(problem: Problem, masked: bool) -> float:
    """Returns the memory growth at the peak of one pass of a layer in MiB; on a CPU, call it in a fresh process."""
    if problem.device == "cpu":
        _pass(replace(problem, batch=1, tokens=32), masked)()  # loads libraries, which are not counted
        return round(peak_growth(_pass(problem, masked))[1] / 2**20, 1)
    run = _pass(problem, masked)
    run()  # compiles, and allocates the workspaces of libraries
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def fits(problem: Problem) -> bool:
    """Returns whether the eager backend's dense mask, with the tensors for its backward pass, fits into memory."""
    if problem.backend != "eager":
        return True
    copies = 8 if problem.mode == "train" else 4
    itemsize = getattr(torch, problem.dtype).itemsize
    need = copies * problem.batch * _HEADS * problem.tokens**2 * itemsize
    have = torch.cuda.mem_get_info()[0] if problem.device == "cuda" else free_bytes()
    return have is None or need < 0.8 * have


class Layer(nn.Module):
    """ViT-B's self-attention, plain or with the mask of a problem."""

    def __init__(self, problem: Problem, masked: bool) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)
        self.problem = problem if masked else None
        if masked:
            shape = (problem.batch, _HEADS if problem.heads == "per-head" else 1, problem.tokens, problem.rank)
            self.left, self.right = nn.Parameter(torch.rand(shape)), nn.Parameter(torch.rand(shape))

    def forward(self, x: Tensor) -> Tensor:
        """Self-attention of ``x (B, N, 768)``."""
        query, key, value = self.qkv(x).unflatten(-1, (3, _HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.problem is None:
            out = F.scaled_dot_product_attention(query, key, value)
        else:
            mask = lamzoo.FactoredMask(self.left, self.right)
            out = lamzoo.lam_attention(query, key, value, mask, op=self.problem.op, backend=self.problem.backend)
        return self.proj(out.transpose(1, 2).flatten(2))


def _pass(problem: Problem, masked: bool) -> Callable[[], None]:
    """Builds a layer and its tokens, and returns a function that runs one pass."""
    torch.manual_seed(0)
    dtype = getattr(torch, problem.dtype)
    with torch.device(problem.device):
        layer = Layer(problem, masked).to(dtype)
        tokens = torch.randn(problem.batch, problem.tokens, _WIDTH).to(dtype)

    def run() -> None:
        if problem.mode == "forward":
            with torch.inference_mode():
                layer(tokens)
        else:
            layer(tokens.detach().requires_grad_()).sum().backward()
            layer.zero_grad(set_to_none=True)

    return run


def table(rows: Sequence[Row]) -> str:
    """Returns the rows with memory figures as Markdown: time ratio to plain with quartiles, and peak memory."""
    rows = [row for row in rows if row.peak_mib is not None]
    columns = sorted({(row.tokens, row.batch, row.mode) for row in rows})
    heads = [f"{mode}, {tokens:,} tokens{f' x {batch}' if batch > 1 else ''}" for tokens, batch, mode in columns]
    lines = [f"| mask | factors' columns | backend | {' | '.join(heads)} |", "|---" * (len(columns) + 3) + "|"]
    plain = {(row.tokens, row.batch, row.mode): f"{row.plain_peak_mib:.0f} MiB" for row in rows}
    lines.append(f"| none | | | {' | '.join(plain[column] for column in columns)} |")
    for op, rank, heads_, backend in dict.fromkeys((row.op, row.rank, row.heads, row.backend) for row in rows):
        of_line = [row for row in rows if (row.op, row.rank, row.heads, row.backend) == (op, rank, heads_, backend)]
        found = {
            (row.tokens, row.batch, row.mode): with_quartiles(row.ratio, row.first_quartile, row.third_quartile)
            + f", {row.peak_mib:.0f} MiB"
            for row in of_line
        }
        cells = " | ".join(found.get(column, "") for column in columns)
        lines.append(f"| {op}, {heads_} | {rank} | `{backend}` | {cells} |")
    conditions = {f"{row.hardware}, {row.threads} threads, {row.dtype}, torch {row.torch}" for row in rows}
    return "\n".join(lines) + "\n" + measured_on(conditions)


def rules(rows: Sequence[Row]) -> str:
    """Returns for every mask and length the backends from the fastest on, with their ratios to the plain layer.

    A rule of ``lamzoo.lam.kernels.RULES`` applies to inference and training alike: the backends are sorted by the
    product of both ratios.
    """
    lines = []
    found: dict[tuple[str, str, int, str, int, int], dict[str, dict[str, float]]] = {}
    for row in rows:
        key = (row.device, row.op, row.rank, row.heads, row.tokens, row.batch)
        found.setdefault(key, {}).setdefault(row.backend, {})[row.mode] = row.ratio
    for (device, op, rank, heads, tokens, batch), ratios in sorted(found.items()):
        complete = [backend for backend, modes in ratios.items() if len(modes) == 2]
        order = sorted(complete, key=lambda backend: math.prod(ratios[backend].values()))
        cells = [f"`{name}` {ratios[name]['forward']:.2f}, {ratios[name]['train']:.2f}" for name in order]
        lines.append((device, f"{op}, {heads}", rank, f"{tokens}**2 x {batch}", "; ".join(cells)))
    return markdown(("device", "mask", "factors' columns", "scores", "backends: forward, train"), lines)


def _in_fresh_process(context: BaseContext, problem: Problem, masked: bool) -> float:
    with ProcessPoolExecutor(1, context) as pool:  # ends before timing starts
        return pool.submit(peak_mib, problem, masked).result()


def _measure_on_cpu(todo: Sequence[Problem], seconds: float) -> Iterator[Row]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as timing:
        for problem in todo:
            peaks: tuple[float | None, float | None] = (None, None)
            if problem.tokens > 2048:
                mine, other = (_in_fresh_process(context, problem, masked) for masked in (True, False))
                peaks = mine, other
            yield timing.submit(measure, problem, seconds, peaks).result()


def _measure_on_gpu(todo: Sequence[Problem], done: Sequence[Row], seconds: float) -> Iterator[Row | str]:
    """Yields a row for each problem, or the name and error of one that failed."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # not a pool of processes for each process
    context = multiprocessing.get_context("spawn")
    rows = list(done)
    with ExitStack() as stack:
        pools: dict[tuple[str, ...], ProcessPoolExecutor] = {}
        for problem in todo:
            if (key := _process(problem)) not in pools:
                pools[key] = stack.enter_context(ProcessPoolExecutor(1, context))
        compiling = [
            pool.submit(_compile, [problem for problem in todo if _process(problem) == key])
            for key, pool in pools.items()
        ]
        wait(compiling)  # an error in there comes up again below, with its problem
        for problem in todo:
            shorter = [row for row in rows if _differs_in_length(row, problem)]
            if any(row.ratio > _HOPELESS for row in shorter):
                continue
            try:
                future = pools[_process(problem)].submit(_measure_with_peaks, problem, seconds)
                error = future.exception()
            except BrokenProcessPool as broken:  # by an earlier problem
                error = broken
            if error is not None:
                yield f"{problem}: {type(error).__name__}: {error}"
                continue
            rows.append(future.result())
            yield rows[-1]


def _process(problem: Problem) -> tuple[str, ...]:
    """Returns the process that times a problem on a GPU; backends that compile nothing share one."""
    return (problem.backend, problem.op, str(problem.rank)) if problem.backend in ("flex", "triton") else ("",)


def _compile(problems: Sequence[Problem]) -> None:
    """Runs layers whose kernels have to be compiled, at their shortest lengths: two, from which flex learns all."""
    lengths = sorted({problem.tokens for problem in problems})[:2]
    for problem in problems:
        if problem.backend in ("flex", "triton") and problem.tokens in lengths:
            _pass(problem, masked=True)()
    torch.cuda.empty_cache()


def _measure_with_peaks(problem: Problem, seconds: float) -> Row:
    torch.cuda.empty_cache()  # for the other processes
    row = measure(problem, seconds, (peak_mib(problem, True), peak_mib(problem, False)))
    torch.cuda.empty_cache()
    return row


def _differs_in_length(row: Row, problem: Problem) -> bool:
    same = replace(problem, tokens=row.tokens, batch=row.batch)
    return row.tokens < problem.tokens and Problem(*astuple(row)[: len(fields(Problem))]) == same


def main() -> None:
    """Measures missing rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="float32, bfloat16 on a GPU")
    parser.add_argument("--lengths", nargs="+", type=int, help="tokens")
    parser.add_argument("--batches", nargs="+", type=int, help="1; on a GPU as many as have 32,768 tokens")
    parser.add_argument("--modes", nargs="+", default=["forward", "train"], choices=["forward", "train"])
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=list(OPS))
    parser.add_argument("--ranks", nargs="+", type=int, help="columns of the mask's factors")
    parser.add_argument("--heads", nargs="+", default=["per-head"], choices=["per-head", "shared"])
    parser.add_argument("--backends", nargs="+", choices=available_backends())
    parser.add_argument("--seconds", type=float, help="duration of the timed passes of a problem: 0.7, 0.06 on a GPU")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--rules", action="store_true", help="measure nothing")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    plan = _PLANS[args.device]
    path = args.results or STORED / ("kernels.gpu.csv" if on_gpu else "kernels.csv")
    rows = read_rows(path, Row)
    if args.table or args.rules:
        print(table(rows) if args.table else rules(rows))
        return
    done = {Problem(*astuple(row)[: len(fields(Problem))]) for row in rows}
    wanted = [
        Problem(backend, op, rank, heads, tokens, batch, mode, args.dtype or plan["dtype"][0], args.device)
        for tokens, mode, op, rank, heads, backend in itertools.product(
            args.lengths or plan["lengths"], args.modes, args.ops, args.ranks or plan["ranks"], args.heads,
            args.backends or plan["backends"],
        )
        for batch in args.batches or [max(1, _BATCH_TOKENS // tokens) if on_gpu else 1]
    ]  # fmt: skip
    todo = [problem for problem in wanted if problem not in done and fits(problem)]
    failed = []
    seconds = args.seconds or (0.06 if on_gpu else 0.7)
    measured = _measure_on_gpu(todo, rows, seconds) if on_gpu else _measure_on_cpu(todo, seconds)
    for row in track(measured, description="problems", total=len(todo)):
        if isinstance(row, str):
            print(row, file=sys.stderr)
            failed.append(row)
            continue
        rows.append(row)
        write_rows(path, rows)
    if on_gpu:
        print(rules(rows))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
