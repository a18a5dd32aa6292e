"""Breakdown of inference time by operator type, for a backbone with masks or token reduction and the plain backbone.

    python -m benchmarks.breakdown                   measures what benchmarks/results/breakdown.csv lacks
    python -m benchmarks.breakdown --table           prints the table of stored results

torch's profiler times the operators of both models alternately on one batch of random images. The share of an operator
type is its self time divided by the total time of the plain backbone in the neighbouring pass, as the median over
passes. Existing rows are not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import lamzoo
from benchmarks.rows import STORED, measured_on, read_rows, write_rows
from benchmarks.speed import VARIANTS
from lamzoo.lam import Lam
from lamzoo.profiling.inputs import default_input
from lamzoo.profiling.latency import device_label

RESULTS = STORED / "breakdown.csv"

#: Variants that exceed a latency target, and token merging for comparison.
CHOSEN = ("additive, rank 16", "mask, drop to 0.59 of the GMACs", "ToMe to 0.59 of the GMACs")
_MASKS = "mask networks"
_PARTS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear"),
    "attention": ("scaled_dot_product", "softmax"),
    "copies, gathers, sorting": (
        "copy_", "cat", "pad", "gather", "scatter", "index", "topk", "sort", "clone", "contiguous", "empty", "to",
    ),
}  # fmt: skip
_REST = "norms, activations, sums"
ORDER = (*_PARTS, _REST, _MASKS)


@dataclass(frozen=True)
class Row:
    """One operator type in an inference.

    Attributes:
        model: the backbone, by the name of the masked model.
        variant: the variant; a key of :data:`benchmarks.speed.VARIANTS`.
        batch: batch size.
        part: operator type, one of :data:`ORDER`.
        share: time in the variant, as a share of the plain backbone's total time.
        plain_share: time in the plain backbone, likewise.
        gflops: GFLOP/s of the variant; 0 if the profiler counts none.
        plain_gflops: GFLOP/s of the plain backbone, likewise.
        device: label of the device.
        threads: number of PyTorch's CPU threads.
        torch: version of torch.
    """

    model: str
    variant: str
    batch: int
    part: str
    share: float
    plain_share: float
    gflops: float
    plain_gflops: float
    device: str
    threads: int
    torch: str


def measure(name: str, variant: str, batch: int, passes: int) -> list[Row]:
    """Profiles one variant over a number of passes; other arguments as of :func:`benchmarks.speed.measure`."""
    torch.manual_seed(0)
    with ExitStack() as stack:
        plain = lamzoo.create_model(name, lam=False).eval()
        model = VARIANTS[variant](name, stack).eval()
        images = default_input(plain, batch)
        stack.enter_context(_named_masks(model))
        found: list[list[tuple[Counter[str], Counter[str]]]] = [[], []]
        for number in range(passes + 1):
            for which, each in enumerate((model, plain)):
                spent = _spent(each, images)
                if number:  # the first pass warms up
                    found[which].append(spent)
    rows = []
    for part in ORDER:
        shares = [
            statistics.median(
                spent[part] / plain_spent.total() for (spent, _), (plain_spent, _) in zip(passed, found[1], strict=True)
            )
            for passed in found
        ]
        rates = [statistics.median(_rate(spent, flops, part) for spent, flops in passed) for passed in found]
        rows.append(
            Row(
                name, variant, batch, part, *(round(share, 4) for share in shares), *(round(rate) for rate in rates),
                device_label(torch.device("cpu")), torch.get_num_threads(), torch.__version__,
            )
        )  # fmt: skip
    return rows


@contextmanager
def _named_masks(model: nn.Module) -> Any:
    """Marks the mask networks in the profiler's trace."""
    open_records: list[Any] = []

    def enter(*_: Any) -> None:
        open_records.append(record_function(_MASKS))
        open_records[-1].__enter__()

    def leave(*_: Any) -> None:
        open_records.pop().__exit__(None, None, None)

    masks = [module for module in model.modules() if isinstance(module, Lam)]
    hooks = [
        hook for each in masks for hook in (each.register_forward_pre_hook(enter), each.register_forward_hook(leave))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _spent(model: nn.Module, images: Tensor) -> tuple[Counter[str], Counter[str]]:
    """Returns a pass's time in microseconds and floating-point operations by part."""
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
        model(images)
    times: Counter[str] = Counter()
    flops: Counter[str] = Counter()
    for event in profiler.events() or ():
        part = _part(event)
        times[part] += event.self_cpu_time_total
        flops[part] += event.flops or 0
    return times, flops


def _part(event: Any) -> str:
    above = event
    while above is not None:
        if above.name == _MASKS:
            return _MASKS
        above = above.cpu_parent
    operator = event.name.removeprefix("aten::").lstrip("_")
    for part, names in _PARTS.items():
        if any(operator == name or (len(name) > 3 and operator.startswith(name)) for name in names):
            return part
    return _REST


def _rate(times: Counter[str], flops: Counter[str], part: str) -> float:
    return flops[part] / times[part] / 1e3 if times[part] else 0.0


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as Markdown: one line per part, with times as shares of the plain backbone's total time."""
    columns = sorted(
        {(row.batch, row.variant) for row in rows}, key=lambda each: (each[0], list(VARIANTS).index(each[1]))
    )
    heads = [f"{variant}, {batch} image{'s' if batch > 1 else ''}" for batch, variant in columns]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"]
    of_column = {each: [row for row in rows if (row.batch, row.variant) == each] for each in columns}
    for part in ORDER:
        cells = []
        for found in of_column.values():
            row = next(row for row in found if row.part == part)
            rate = f", {row.gflops:.0f} for {row.plain_gflops:.0f} GFLOP/s" if row.part == "matrix products" else ""
            cells.append(f"{row.share:.3f} for {row.plain_share:.3f}{rate}")
        lines.append(f"| {part} | {' | '.join(cells)} |")
    sums = [sum(row.share for row in found) for found in of_column.values()]
    lines.append(f"| all | {' | '.join(f'{each:.3f}' for each in sums)} |")
    conditions = {f"{row.model}, {row.device}, {row.threads} threads, float32, torch {row.torch}" for row in rows}
    return "\n".join(lines) + "\n" + measured_on(conditions)


def main() -> None:
    """Measures missing rows and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lam_vit_base", help="model with masks, on a timm VisionTransformer")
    parser.add_argument("--variants", nargs="+", default=list(CHOSEN), choices=list(VARIANTS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--passes", type=int, default=15, help="timed passes of each model")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    rows = read_rows(args.results, Row)
    if not args.table:
        done = {(row.model, row.variant, row.batch) for row in rows}
        wanted = [(args.model, variant, batch) for batch, variant in itertools.product(args.batches, args.variants)]
        for each in track([each for each in wanted if each not in done], description="variants"):
            rows += measure(*each, passes=args.passes)
            write_rows(args.results, rows)
    print(table([row for row in rows if row.model == args.model]))


if __name__ == "__main__":
    main()
