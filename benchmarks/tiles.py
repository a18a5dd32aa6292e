"""Times the Triton kernels with many tile sizes, and PyTorch's fused attention, on a GPU, to select the fastest tiles.

    python -m benchmarks.tiles            measures, in about a minute, for `tiles` in lamzoo.lam.kernels.triton
    python -m benchmarks.tiles --table    prints the table of stored results

Inputs are two samples of 4,096 tokens, twelve heads of 64, in bfloat16; each figure is the median of Triton's
``do_bench``. Training runs the forward kernel, then the two backward kernels, by queries and by keys. A case that fails
is named, and the exit code is 1.
"""

# triton is untyped, and may be missing
# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, astuple, dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import lamzoo.lam.kernels.triton as backend
from benchmarks.rows import STORED, measured_on, read_rows, write_rows
from lamzoo.lam.kernels.triton import KernelName
from lamzoo.lam.ops import Op
from lamzoo.profiling.latency import device_label

RESULTS = STORED / "tiles.csv"
_SAMPLES, _HEADS, _TOKENS, _DIM = 2, 12, 4096, 64
_TOO_LARGE = "too large"

_TILES: dict[KernelName, tuple[tuple[int, ...], ...]] = {  # queries, keys, warps, stages and perhaps registers
    "forward": (
        (128, 64, 8, 2, 128), (128, 64, 8, 3, 128), (128, 64, 8, 4, 128), (128, 64, 8, 3), (128, 64, 4, 3),
        (64, 64, 4, 2, 168), (64, 64, 4, 3, 168), (64, 64, 4, 3, 128), (128, 32, 4, 3, 168),
        (128, 128, 8, 2), (128, 128, 8, 3), (64, 128, 4, 2), (64, 128, 4, 3),
    ),
    "queries": (
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 3, 168), (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 4, 3),
        (128, 32, 8, 3, 128), (64, 32, 4, 3, 168),
    ),
    "keys": (
        (64, 128, 8, 1), (64, 128, 8, 2), (64, 128, 8, 3), (64, 64, 4, 1), (64, 64, 4, 2), (32, 128, 8, 2),
        (32, 128, 8, 3), (32, 64, 4, 3, 168),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A kernel with tile sizes.

    Attributes:
        kernel: one of the three kernels.
        op: operation by which the mask acts.
        rank: columns of the mask's factors.
        queries: queries per tile.
        keys: keys per tile.
        warps: warps per program.
        stages: pipeline stages.
        registers: limit of registers per thread; None for none.
    """

    kernel: KernelName
    op: Op
    rank: int
    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


@dataclass(frozen=True, kw_only=True)
class Row(Case):
    """Measurements of a case.

    Attributes:
        ms: time of the kernel in milliseconds.
        sdpa_ms: time of PyTorch's attention on its default backend: its forward or its whole backward pass.
        flash_ms: time of FlashAttention-2, likewise.
        hardware: name of the device.
        torch: version of torch.
        triton: version of triton.
    """

    ms: float
    sdpa_ms: float
    flash_ms: float
    hardware: str
    torch: str
    triton: str


def cases() -> Iterator[Case]:
    """Yields plausible tile sizes for multiplicative masks of ranks 9 and 17, whose factors are 16 and 32 wide."""
    for kernel, sizes in _TILES.items():
        for rank in (9, 17):
            for size in sizes:
                yield Case(kernel, "mul", rank, *size)


def launcher(case: Case) -> Callable[[], None]:
    """Returns a function that launches the kernel on inputs shared by all cases of a mask."""
    from lamzoo.lam.kernels import triton_kernels

    problem, out, logsumexp, grad_out, delta, grads = _inputs(case.op, case.rank)
    tile = backend.Tiles(case.queries, case.keys, case.warps, case.stages, case.registers)
    launch = partial(problem.launch, tile=tile)
    return {
        "forward": partial(launch, triton_kernels.forward_kernel, "forward", torch.empty_like(out), logsumexp.clone()),
        "queries": partial(
            launch, triton_kernels.backward_queries_kernel, "queries",
            out, logsumexp, grad_out, grads[0], grads[3], delta.clone(),
        ),
        "keys": partial(
            launch, triton_kernels.backward_keys_kernel, "keys",
            logsumexp, grad_out, delta, grads[1], grads[2], grads[4],
        ),
    }[case.kernel]  # fmt: skip


@cache
def _inputs(op: Op, rank: int) -> tuple[backend._Problem, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    query, key, value, grad_out = (_heads(_DIM) for _ in range(4))
    left, right = 0.3 * _heads(rank), 0.3 * _heads(rank)
    problem = backend._Problem.of(query, key, value, left, right, None, op, False, _DIM**-0.5)
    # By PyTorch, so that processes that compile a case do not compile a forward kernel each.
    scores = query[:1, :1].float() @ key[:1, :1].float().mT * _DIM**-0.5
    mask = left[:1, :1].float() @ right[:1, :1].float().mT
    logits = scores * mask if op == "mul" else scores + mask
    logsumexp = (logits.logsumexp(-1) * math.log2(math.e)).expand(*query.shape[:3]).contiguous()
    out = F.scaled_dot_product_attention(query, key, value)
    delta = (grad_out.float() * out.float()).sum(-1).contiguous()
    return problem, out, logsumexp, grad_out, delta, list(backend._empty_grads(query, key, value, left, right))


def table(rows: list[Row]) -> str:
    """Returns the selected tiles of each kernel and mask as Markdown, with times relative to PyTorch's, and totals."""
    lines = ["| pass | mask | columns | tiles | ms | to PyTorch's choice | to FlashAttention-2 |", "|---" * 7 + "|"]
    names = {"forward": "forward", "queries": "backward, by queries", "keys": "backward, by keys"}
    taken: dict[tuple[str, Op, int], Row] = {}
    for kernel, op, rank in dict.fromkeys((row.kernel, row.op, row.rank) for row in rows):
        row = _selected([row for row in rows if (row.kernel, row.op, row.rank) == (kernel, op, rank)])
        taken[kernel, op, rank] = row
        stages = f"{row.stages} stage{'s' if row.stages > 1 else ''}"
        tiles = f"{row.queries} x {row.keys}, {row.warps} warps, {stages}"
        cells = (names[kernel], op, str(rank), tiles)
        lines.append(f"| {' | '.join(cells)} | {_times(row.ms, row.sdpa_ms, row.flash_ms)} |")
    for op, rank in dict.fromkeys((row.op, row.rank) for row in rows):
        forward, queries, keys = (taken[kernel, op, rank] for kernel in names)
        total = forward.ms + queries.ms + keys.ms  # each backward row holds PyTorch's total backward time
        times = _times(total, forward.sdpa_ms + queries.sdpa_ms, forward.flash_ms + queries.flash_ms)
        lines.append(f"| all three | {op} | {rank} | | {times} |")
    conditions = {f"{row.hardware}, bfloat16, torch {row.torch}, triton {row.triton}" for row in rows}
    return "\n".join(lines) + "\n" + measured_on(conditions)


def _selected(rows: list[Row]) -> Row:
    """Returns the row of the tiles that lamzoo uses for a kernel and mask."""
    tile = astuple(backend.tiles(rows[0].kernel, _DIM, backend._block(rows[0].rank), 2))
    return next(row for row in rows if (row.queries, row.keys, row.warps, row.stages, row.registers) == tile)


def fastest(rows: list[Row], count: int = 3) -> str:
    """Returns the fastest tiles of each kernel and mask, one a line, for the eye."""
    lines = []
    for kernel, op, rank in dict.fromkeys((row.kernel, row.op, row.rank) for row in rows):
        same = [row for row in rows if (row.kernel, row.op, row.rank) == (kernel, op, rank)]
        for row in sorted(same, key=lambda row: row.ms)[:count]:
            tile = (row.queries, row.keys, row.warps, row.stages, row.registers)
            lines.append(f"{kernel} {op} {rank} {tile}: {_times(row.ms, row.sdpa_ms, row.flash_ms)}")
    return "\n".join(lines)


def _times(ms: float, sdpa_ms: float, flash_ms: float) -> str:
    return f"{ms:.3f} | {ms / sdpa_ms:.2f} | {ms / flash_ms:.2f}"


def _heads(width: int) -> Tensor:
    return torch.randn(_SAMPLES, _TOKENS, _HEADS, width, device="cuda", dtype=torch.bfloat16).transpose(1, 2)


def _trouble(case: Case, run: Callable[[Case], object]) -> str | None:
    """Runs a function of a case; returns the error of its tiles, None if there is none."""
    from triton.errors import TritonError
    from triton.runtime.errors import OutOfResources

    try:
        run(case)
        torch.cuda.synchronize()
    except OutOfResources:
        return _TOO_LARGE
    except (TritonError, RuntimeError) as error:  # named at the end
        return f"{type(error).__name__}: {error}"
    return None


def _launch(case: Case) -> None:
    launcher(case)()


def _median_ms(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=10, rep=30, return_mode="median"))


def _peers() -> dict[KernelName, float]:
    """Returns the times of PyTorch's attention in milliseconds: forward pass, and backward pass for the others."""
    query, key, value = (_heads(_DIM).requires_grad_() for _ in range(3))
    grad_out = torch.randn_like(query)

    def both() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(query, key, value), (query, key, value), grad_out)

    with torch.no_grad():
        forward = _median_ms(lambda: F.scaled_dot_product_attention(query, key, value))
    backward = _median_ms(both) - forward
    return {"forward": forward, "queries": backward, "keys": backward}


def main() -> None:
    """Measures all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the table of stored results; measure nothing")
    parser.add_argument("--fastest", action="store_true", help="print the fastest stored tiles; measure nothing")
    args = parser.parse_args()
    if args.table:
        print(table(read_rows(args.results, Row)))
        return
    if args.fastest:
        print(fastest(read_rows(args.results, Row)))
        return
    import triton

    wanted = list(cases())
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 16), multiprocessing.get_context("spawn")) as pool:
        troubles = dict(zip(wanted, pool.map(partial(_trouble, run=_launch), wanted), strict=True))  # fills the cache
    sdpa = _peers()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        flash = _peers()
    rows: list[Row] = []

    def measure(case: Case) -> None:
        row = Row(
            **asdict(case),
            ms=round(_median_ms(launcher(case)), 4),
            sdpa_ms=round(sdpa[case.kernel], 4),
            flash_ms=round(flash[case.kernel], 4),
            hardware=device_label(torch.device("cuda")),
            torch=torch.__version__,
            triton=triton.__version__,
        )
        rows.append(row)
        write_rows(args.results, rows)

    for case in [case for case in wanted if troubles[case] is None]:
        troubles[case] = _trouble(case, measure)
    print(fastest(rows))
    failed = {case: trouble for case, trouble in troubles.items() if trouble not in (None, _TOO_LARGE)}
    for case, trouble in failed.items():
        print(f"{case}: {trouble}", file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
