r"""Times an attention layer on every backend, alternating with the plain layer, and stores the ratios.

    python -m benchmarks.kernels                     the problems behind `lamzoo.lam.kernels.RULES`
    python -m benchmarks.kernels --lengths 4097 --ranks 1 9 17 --backends sdpa chunked
    python -m benchmarks.kernels --device cuda --dtype bfloat16 --lengths 1024 4096 16384 --ranks 16 \
        --backends sdpa flex triton eager --results benchmarks/results/kernels.gpu.csv
    python -m benchmarks.kernels --table             prints the table of stored long sequences

The layer is ViT-B's (width 768, 12 heads) with its projections. The mask's factors are given rather than computed, to
measure only the kernels (`lamzoo bench` times whole models, including mask networks). ``forward`` is inference,
``train`` a forward and a backward pass. Memory is the growth at the peak of a pass, measured from 2,049 tokens on, and
on a CPU in a fresh process for each layer. Existing rows are not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, astuple, dataclass, fields, replace
from multiprocessing.context import BaseContext
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

import lamzoo
from benchmarks.rows import measured_on, read_rows, with_quartiles, write_rows
from lamzoo.lam import available_backends
from lamzoo.lam.config import Heads
from lamzoo.lam.ops import OPS, Op
from lamzoo.profiling.latency import device_label, time_call
from lamzoo.profiling.memory import free_bytes, peak_growth

ROOT = Path(__file__).resolve().parents[1]
_WIDTH, _HEADS = 768, 12


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
    low, median, high = statistics.quantiles([mine / other for mine, other in pairs], n=4, method="inclusive")
    return Row(
        **asdict(problem),
        ratio=round(median, 3),
        first_quartile=round(low, 3),
        third_quartile=round(high, 3),
        ms=round(statistics.median(mine for mine, _ in pairs), 3),
        peak_mib=peaks[0],
        plain_peak_mib=peaks[1],
        hardware=device_label(device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )


def peak_mib(problem: Problem, masked: bool) -> float:
    """Returns the memory growth at the peak of one pass of a layer in MiB; on a CPU, call it in a fresh process."""
    _pass(replace(problem, batch=1, tokens=32), masked)()  # loads libraries, which are not counted
    run = _pass(problem, masked)
    if problem.device == "cpu":
        return round(peak_growth(run)[1] / 2**20, 1)
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
    layer = Layer(problem, masked).to(problem.device, dtype)
    tokens = torch.randn(problem.batch, problem.tokens, _WIDTH).to(problem.device, dtype)

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


def _in_fresh_process(context: BaseContext, problem: Problem, masked: bool) -> float:
    with ProcessPoolExecutor(1, context) as pool:  # ends before timing starts
        return pool.submit(peak_mib, problem, masked).result()


def main() -> None:
    """Measures missing rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[197, 577, 1025], help="tokens")
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--modes", nargs="+", default=["forward", "train"], choices=["forward", "train"])
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=list(OPS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 9, 17, 33], help="columns of the mask's factors")
    parser.add_argument("--heads", nargs="+", default=["per-head"], choices=["per-head", "shared"])
    parser.add_argument("--backends", nargs="+", default=["eager", "sdpa", "chunked"], choices=available_backends())
    parser.add_argument("--seconds", type=float, default=0.7, help="duration of the timed passes of a problem")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "kernels.csv")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()

    rows = read_rows(args.results, Row)
    if args.table:
        print(table(rows))
        return
    done = {Problem(*astuple(row)[: len(fields(Problem))]) for row in rows}
    wanted = [
        Problem(backend, op, rank, heads, tokens, batch, mode, args.dtype, args.device)
        for tokens, batch, mode, op, rank, heads, backend in itertools.product(
            args.lengths, args.batches, args.modes, args.ops, args.ranks, args.heads, args.backends
        )
    ]
    todo = [problem for problem in wanted if problem not in done and fits(problem)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as timing:
        for problem in track(todo, description="problems"):
            peaks: tuple[float | None, float | None] = (None, None)
            if problem.tokens > 2048:
                mine, other = (
                    _in_fresh_process(context, problem, masked)
                    if problem.device == "cpu"
                    else timing.submit(peak_mib, problem, masked).result()  # torch tracks its allocations there
                    for masked in (True, False)
                )
                peaks = mine, other
            rows.append(timing.submit(measure, problem, args.seconds, peaks).result())
            write_rows(args.results, rows)


if __name__ == "__main__":
    main()
