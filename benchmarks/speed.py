"""Times a whole backbone with masks, token pruning or ToMe, alternating with the plain backbone.

    python -m benchmarks.speed                                   measures what benchmarks/results/speed.csv lacks
    python -m benchmarks.speed --variants "zoo default" --modes forward --batches 1 --results try.csv
    python -m benchmarks.speed --table                           prints the table of stored results

A step of training with merging and with ToMe, at the same GMACs:

    python -m benchmarks.speed --modes forward train --variants "merged to 0.63 of the GMACs" \
        "without masks, merged to 0.63 of the GMACs" "with masks, ToMe to 0.63 of the GMACs" \
        "without masks, ToMe to 0.63 of the GMACs"

Weights are random, because only times are measured. ``forward`` is inference, ``train`` a forward and a backward pass,
``compile`` the first call of the model under ``torch.compile`` with an empty cache, in a process that has compiled
before. ToMe is its official variant. Existing rows are not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

import lamzoo
from benchmarks.methods import METHODS, Variants
from benchmarks.peers import applied
from benchmarks.peers.tome import ToMe
from benchmarks.rows import STORED, measured_on, read_rows, with_quartiles, write_rows
from lamzoo import LamConfig
from lamzoo.profiling.inputs import default_input
from lamzoo.profiling.latency import device_label, time_call

RESULTS = STORED / "speed.csv"


@dataclass(frozen=True)
class Row:
    """A variant compared with the plain backbone.

    Attributes:
        model: the backbone, by the name of the masked model.
        variant: name of the variant.
        mode: ``"forward"``, ``"train"`` or ``"compile"``.
        batch: batch size.
        gmacs_ratio: ratio of the GMACs of one image to plain.
        ratio: median ratio of times to plain, over neighbouring runs.
        ratio_q1: first quartile of the ratio.
        ratio_q3: third quartile of the ratio.
        ms: median time of the variant in milliseconds.
        pairs: number of timed pairs.
        device: label of the device.
        threads: number of PyTorch's CPU threads.
        torch: version of torch.
    """

    model: str
    variant: str
    mode: str
    batch: int
    gmacs_ratio: float
    ratio: float
    ratio_q1: float
    ratio_q3: float
    ms: float
    pairs: int
    device: str
    threads: int
    torch: str


def _masked(change: Callable[[LamConfig], LamConfig]) -> Callable[[str, ExitStack], Any]:
    def build(name: str, stack: ExitStack) -> Any:
        card = lamzoo.model_info(name).lam
        assert card is not None
        return lamzoo.create_model(name, lam=change(card))

    return build


def _reduced(
    method: Variants, share: float, *, masked: bool, quarters: Sequence[int] = (1, 2, 3)
) -> Callable[[str, ExitStack], Any]:
    def build(name: str, stack: ExitStack) -> Any:
        model = lamzoo.create_model(name, **({} if masked else {"lam": False}))  # type: ignore[arg-type]
        depth = len(model.blocks)  # type: ignore[arg-type]
        at = tuple(depth * i // 4 for i in quarters)
        budget = share * lamzoo.profile(lamzoo.create_model(name, lam=False)).gmacs
        reduce = next(iter(method(model).values()))
        if stack.enter_context(reduce(model, budget, at, None)) is None:
            raise lamzoo.LamzooError(f"No setting meets {share:.2f} of the GMACs of {name}.")
        return model

    return build


def _tome(r: int) -> Callable[[str, ExitStack], Any]:
    return lambda name, stack: stack.enter_context(applied(lamzoo.create_model(name, lam=False), ToMe(r)))


#: Functions from the model's name, and an exit stack for cleanup, to the model.
VARIANTS: dict[str, Callable[[str, ExitStack], Any]] = {
    "zoo default": _masked(lambda lam: lam),
    "zoo default, fused": lambda name, stack: lamzoo.fuse(lamzoo.create_model(name)),
    "additive, rank 16": _masked(lambda lam: replace(lam, op="add", rank=16)),
    "additive, content keys": _masked(lambda lam: replace(lam, op="add", keys="content", max_length=None)),
    "additive, shared by the heads": _masked(lambda lam: replace(lam, op="add", heads="shared")),
    "multiplicative": _masked(lambda lam: replace(lam, op="mul")),
    "the paper's": _masked(lambda lam: LamConfig(keys="position", op="mul", heads="shared", rank=lam.rank)),
    **{
        f"{name} to {share} of the GMACs": _reduced(METHODS[method], share, masked=masked)
        for share in (0.59, 0.47)
        for name, method, masked in (
            ("mask, drop", "mask, drop", True),
            ("mask, merge", "mask, merge", True),
            ("redundancy, nearest", "redundancy, nearest", True),
            ("ToMe", "ToMe", False),
        )
    },
    "mask, drop once, to 0.59 of the GMACs": _reduced(METHODS["mask, drop"], 0.59, masked=True, quarters=(1,)),
    "ToMe, r = 13": _tome(13),
    "merged to 0.63 of the GMACs": _reduced(METHODS["merged"], 0.63, masked=True),
    "without masks, merged to 0.63 of the GMACs": _reduced(METHODS["merged"], 0.63, masked=False),
    "with masks, ToMe to 0.63 of the GMACs": _reduced(METHODS["ToMe"], 0.63, masked=True),
    "without masks, ToMe to 0.63 of the GMACs": _reduced(METHODS["ToMe"], 0.63, masked=False),
}


def measure(name: str, variant: str, mode: str, batch: int, seconds: float, device: torch.device) -> Row:
    """Times one variant.

    Args:
        name: name of the masked model.
        variant: a key of :data:`VARIANTS`.
        mode: ``"forward"``, ``"train"`` or ``"compile"``.
        batch: batch size.
        seconds: approximate duration of the timed pairs of variant and plain model; at least six run, and two for
            ``"compile"``.
        device: a torch device.
    """
    torch.manual_seed(0)
    with ExitStack() as stack:
        plain = lamzoo.create_model(name, lam=False)
        model = VARIANTS[variant](name, stack)
        gmacs = [lamzoo.profile(each).gmacs for each in (model, plain)]
        for each in (model, plain):
            each.to(device).train(mode == "train")
        images = default_input(plain, batch)
        runs = [_PASSES[mode](each, images) for each in (model, plain)]
        for run in runs[1:] if mode == "compile" else runs:
            run()
        times: list[tuple[float, float]] = []
        begun = time.perf_counter()
        enough, most = (2, 2) if mode == "compile" else (6, 100)
        while len(times) < enough or (time.perf_counter() - begun < seconds and len(times) < most):
            order = (1, 0) if len(times) % 2 else (0, 1)
            found = {which: time_call(runs[which], device) for which in order}
            times.append((found[0], found[1]))
    ratios = [mine / other for mine, other in times]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return Row(
        model=name, variant=variant, mode=mode, batch=batch, gmacs_ratio=round(gmacs[0] / gmacs[1], 3),
        ratio=round(median, 3), ratio_q1=round(low, 3), ratio_q3=round(high, 3),
        ms=round(statistics.median(mine for mine, _ in times), 1), pairs=len(times), device=device_label(device),
        threads=torch.get_num_threads(), torch=torch.__version__,
    )  # fmt: skip


def _forward(model: nn.Module, images: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.inference_mode():
            model(images)

    return run


def _train(model: nn.Module, images: Tensor) -> Callable[[], None]:
    def run() -> None:
        model(images).sum().backward()
        model.zero_grad(set_to_none=True)

    return run


def _compile(model: nn.Module, images: Tensor) -> Callable[[], None]:
    def run() -> None:
        torch._dynamo.reset()
        with fresh_cache(), torch.inference_mode():  # otherwise shared kernels would be compiled only once
            torch.compile(model)(images)

    return run


_PASSES: dict[str, Callable[[nn.Module, Tensor], Callable[[], None]]] = {
    "forward": _forward,
    "train": _train,
    "compile": _compile,
}


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as Markdown: one line per variant, one column per mode and batch, ratios with quartiles."""
    columns = sorted({(row.mode, row.batch) for row in rows}, key=lambda each: (list(_PASSES).index(each[0]), each[1]))
    heads = [f"{mode}, {batch} image{'s' if batch > 1 else ''}" for mode, batch in columns]
    lines = [f"| | GMACs | {' | '.join(heads)} |", "|---" * (len(columns) + 2) + "|"]
    for variant in dict.fromkeys(row.variant for row in rows):
        found = {(row.mode, row.batch): row for row in rows if row.variant == variant}
        cells = [_cell(found[each]) if each in found else "" for each in columns]
        gmacs = next(iter(found.values())).gmacs_ratio
        lines.append(f"| {variant} | {gmacs:.2f} | {' | '.join(cells)} |")
    conditions = {f"{row.model}, {row.device}, {row.threads} threads, float32, torch {row.torch}" for row in rows}
    return "\n".join(lines) + "\n" + measured_on(conditions)


def _cell(row: Row) -> str:
    return with_quartiles(row.ratio, row.ratio_q1, row.ratio_q3) if row.pairs > 1 else f"{row.ratio:.2f}"


def main() -> None:
    """Measures missing rows and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lam_vit_base", help="model with masks, on a timm VisionTransformer")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--modes", nargs="+", default=["forward", "train"], choices=list(_PASSES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument(
        "--seconds", type=float, default=20, help="duration of the timed passes of a row; at least six pairs run"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    rows = read_rows(args.results, Row)
    if not args.table:
        done = {(row.model, row.variant, row.mode, row.batch) for row in rows}
        wanted = [
            (args.model, variant, mode, batch)
            for mode, batch, variant in itertools.product(args.modes, args.batches, args.variants)
        ]
        for each in track([each for each in wanted if each not in done], description="lines"):
            rows.append(measure(*each, seconds=args.seconds, device=torch.device(args.device)))
            write_rows(args.results, rows)
    print(table([row for row in rows if row.model == args.model]))


if __name__ == "__main__":
    main()
