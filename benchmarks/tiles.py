"""Times the Triton kernels with many tile sizes, and PyTorch's fused attention, on a GPU, to select the fastest tiles.

    python -m benchmarks.tiles            measures, in a minute or two, for `tiles` in lamzoo.lam.kernels.triton
    python -m benchmarks.tiles --table    prints the table of stored results

Inputs are two samples of 4,096 tokens, twelve heads of 64, in bfloat16; each figure is the median of Triton's
``do_bench``. Training runs the forward kernel, then the two backward kernels, by queries and by keys.
"""

# triton is untyped, and may be missing
# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import lamzoo.lam.kernels.triton as backend
from benchmarks.rows import measured_on, read_rows, write_rows
from lamzoo.lam.ops import Op
from lamzoo.profiling.latency import device_label

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "tiles.csv"
_SAMPLES, _HEADS, _TOKENS, _DIM = 2, 12, 4096, 64

Kernel = Literal["forward", "queries", "keys"]


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
    """

    kernel: Kernel
    op: Op
    rank: int
    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
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
    """Yields all plausible tile sizes; for the backward pass, only for a multiplicative mask of rank 17."""
    for op, rank in itertools.product(("mul", "add"), (9, 17)):
        for tile in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
            yield Case("forward", op, rank, *tile)
    for short, long, warps, stages in itertools.product((32, 64, 128), (64, 128), (4, 8), (1, 2, 3)):
        yield Case("queries", "mul", 17, long, short, warps, stages)
        yield Case("keys", "mul", 17, short, long, warps, stages)


def launcher(case: Case) -> Callable[[], None]:
    """Creates inputs and returns a function that launches the kernel on them."""
    from lamzoo.lam.kernels import triton_kernels

    torch.manual_seed(0)
    query, key, value, grad_out = (_heads(_DIM) for _ in range(4))
    left, right = 0.3 * _heads(case.rank), 0.3 * _heads(case.rank)
    arguments = (query, key, value, left, right, None, case.op, False, _DIM**-0.5)
    out, logsumexp = backend.lam_attention_forward(*arguments)
    delta = (grad_out.float() * out.float()).sum(-1).contiguous()
    grads = backend._empty_grads(query, key, value, left, right)
    tile = backend.Tiles(case.queries, case.keys, case.warps, case.stages)
    launch = partial(backend._Problem.of(*arguments).launch, tile=tile)
    return {
        "forward": partial(launch, triton_kernels.forward_kernel, "forward", out, logsumexp),
        "queries": partial(
            launch, triton_kernels.backward_queries_kernel, "queries",
            out, logsumexp, grad_out, grads[0], grads[3], delta,
        ),
        "keys": partial(
            launch, triton_kernels.backward_keys_kernel, "keys",
            logsumexp, grad_out, delta, grads[1], grads[2], grads[4],
        ),
    }[case.kernel]  # fmt: skip


def table(rows: list[Row]) -> str:
    """Returns the selected tiles of each kernel and mask as Markdown, with times relative to PyTorch's, and totals."""
    lines = ["| pass | mask | columns | tiles | ms | to PyTorch's choice | to FlashAttention-2 |", "|---" * 7 + "|"]
    taken = {}
    for kernel, op, rank in dict.fromkeys((row.kernel, row.op, row.rank) for row in rows):
        tile = backend.tiles(kernel, _DIM, backend._block(rank), 2)
        row = taken[kernel, op, rank] = next(
            row
            for row in rows
            if (row.kernel, row.op, row.rank) == (kernel, op, rank)
            and (row.queries, row.keys, row.warps, row.stages) == astuple(tile)
        )
        name = {"forward": "forward", "queries": "backward, by queries", "keys": "backward, by keys"}[kernel]
        tiles = f"{row.queries} x {row.keys}, {row.warps} warps, {row.stages} stage{'s' if row.stages > 1 else ''}"
        lines.append(f"| {name} | {op} | {rank} | {tiles} | {_times(row.ms, row.sdpa_ms, row.flash_ms)} |")
    forward, queries, keys = (taken[kernel, "mul", 17] for kernel in ("forward", "queries", "keys"))
    total = forward.ms + queries.ms + keys.ms  # both backward rows hold PyTorch's total backward time
    times = _times(total, forward.sdpa_ms + queries.sdpa_ms, forward.flash_ms + queries.flash_ms)
    lines.append(f"| all three | mul | 17 | | {times} |")
    conditions = {f"{row.hardware}, bfloat16, torch {row.torch}, triton {row.triton}" for row in rows}
    return "\n".join(lines) + "\n" + measured_on(conditions)


def _times(ms: float, sdpa_ms: float, flash_ms: float) -> str:
    return f"{ms:.3f} | {ms / sdpa_ms:.2f} | {ms / flash_ms:.2f}"


def _heads(width: int) -> Tensor:
    return torch.randn(_SAMPLES, _TOKENS, _HEADS, width, device="cuda", dtype=torch.bfloat16).transpose(1, 2)


def _compiles(case: Case) -> bool:
    """Launches a kernel once, which fills Triton's cache; returns False if its tiles are too large for the GPU."""
    from triton.runtime.errors import OutOfResources

    try:
        launcher(case)()
        torch.cuda.synchronize()
    except OutOfResources:
        return False
    return True


def _median_ms(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=10, rep=40, return_mode="median"))


def _peers() -> dict[Kernel, float]:
    """Returns the times of PyTorch's attention in milliseconds: forward pass, and backward pass for both kernels."""
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
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if args.table:
        print(table(read_rows(args.results, Row)))
        return
    import triton

    wanted = list(cases())
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        fitting = [case for case, fits in zip(wanted, pool.map(_compiles, wanted), strict=True) if fits]
    sdpa = _peers()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        flash = _peers()
    rows = [
        Row(
            **asdict(case),
            ms=round(_median_ms(launcher(case)), 4),
            sdpa_ms=round(sdpa[case.kernel], 4),
            flash_ms=round(flash[case.kernel], 4),
            hardware=device_label(torch.device("cuda")),
            torch=torch.__version__,
            triton=triton.__version__,
        )
        for case in fitting
    ]
    write_rows(args.results, rows)


if __name__ == "__main__":
    main()
