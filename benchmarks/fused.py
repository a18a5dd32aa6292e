"""Times models with masks, unfused and fused (``lamzoo.fuse``), in turns with the plain backbone.

    python -m benchmarks.fused            measures what lamzoo/lam/fused.csv and the table of training steps lack
    python -m benchmarks.fused --models lam_vit_tiny --batches 1 --seconds 5 --results try.csv --steps steps.csv
    python -m benchmarks.fused --device cuda --dtype bfloat16 --ranks 7 --batches 1 128 --step-batches --seconds 0.6 \
        --models lam_vit_tiny_patch8_64 lam_vit_tiny lam_vit_base
    python -m benchmarks.fused --table    prints the tables of stored rows

Weights are random, because only times are measured: in evaluation and inference mode, on the threads of PyTorch
(``OMP_NUM_THREADS``). Ratios are medians over rounds, in which the plain backbone runs before and after the others.
Training steps, a forward and a backward pass, are measured by :mod:`benchmarks.speed`. Existing rows are not measured
again. Use a machine on which nothing else runs: fused models choose their form by the rows.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn

import lamzoo
from benchmarks import speed
from benchmarks.rows import STORED, markdown, measured_on, read_rows, with_quartiles, write_rows
from lamzoo import LamConfig
from lamzoo.lam.fused import MEASURED, FusedAttention, pinned_form
from lamzoo.profiling.inputs import as_arguments, default_input
from lamzoo.profiling.latency import device_label, time_call

MODELS = ("lam_vit_tiny_patch8_64", "lam_vit_tiny", "lam_vit_small", "lam_vit_base")
RANKS = (7, 8)  # the cards' of today, and that of the weights at 64 pixels
ON_GPU = STORED / "fused.gpu.csv"
STEPS = STORED / "training_steps.csv"
_ROUNDS = 6  # at least
_STEP = "zoo default"  # the variant whose training steps are timed


@dataclass(frozen=True)
class Row:
    """A model in both forms, compared with the plain backbone; :mod:`lamzoo.lam.fused` reads the sizes and ratios.

    Attributes:
        model: name of the masked model.
        rank: of its masks.
        width: of its tokens.
        columns: by which its heads grow in the fused form.
        tokens: number of tokens.
        batch: batch size.
        unfused: median ratio of the time of the unfused model to that of the plain backbone.
        unfused_q1: first quartile of the ratio.
        unfused_q3: third quartile of the ratio.
        fused: likewise of the fused model.
        fused_q1: first quartile of the ratio.
        fused_q3: third quartile of the ratio.
        form: the one that ``lamzoo.fuse`` takes by this row.
        ms: median time of that form in milliseconds.
        rounds: number of timed rounds.
        device: label of the device.
        threads: number of PyTorch's CPU threads.
        torch: version of torch.
        dtype: of weights and images.
    """

    model: str
    rank: int
    width: int
    columns: int
    tokens: int
    batch: int
    unfused: float
    unfused_q1: float
    unfused_q3: float
    fused: float
    fused_q1: float
    fused_q3: float
    form: str
    ms: float
    rounds: int
    device: str
    threads: int
    torch: str
    dtype: str = "float32"


def measure(
    name: str, rank: int, batch: int, seconds: float, device: torch.device, dtype: torch.dtype = torch.float32
) -> Row:
    """Times one model.

    Args:
        name: name of the masked model.
        rank: of its masks.
        batch: batch size.
        seconds: approximate duration; at least six rounds run.
        device: a torch device.
        dtype: of weights and images.
    """
    torch.manual_seed(0)
    plain = lamzoo.create_model(name, lam=False)
    unfused = lamzoo.create_model(name, lam=replace(_card(name), rank=rank))
    models = [each.to(device, dtype).eval() for each in (plain, unfused)]
    models.append(lamzoo.fuse(copy.deepcopy(unfused)))
    sizes, images = _sizes(models[-1]), as_arguments(default_input(plain, batch))[0].to(device, dtype)

    @torch.inference_mode()
    def spent(model: nn.Module) -> float:
        return time_call(lambda: model(images), device)

    with pinned_form(True):
        for model in models * 2:
            spent(model)
        times: list[tuple[float, float, float]] = []
        begun = time.perf_counter()
        while len(times) < _ROUNDS or time.perf_counter() - begun < seconds:
            order = (1, 2) if len(times) % 2 else (2, 1)
            before = spent(models[0])
            found = {which: spent(models[which]) for which in order}
            times.append(((before + spent(models[0])) / 2, found[1], found[2]))
    spreads = [_spread([each[which] / each[0] for each in times]) for which in (1, 2)]
    form = 2 if spreads[1][1] <= spreads[0][1] else 1
    return Row(
        model=name, rank=rank, **sizes, batch=batch,
        unfused=spreads[0][1], unfused_q1=spreads[0][0], unfused_q3=spreads[0][2],
        fused=spreads[1][1], fused_q1=spreads[1][0], fused_q3=spreads[1][2],
        form=("unfused", "fused")[form - 1], ms=round(statistics.median(each[form] for each in times), 2),
        rounds=len(times), device=device_label(device), threads=torch.get_num_threads(), torch=torch.__version__,
        dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip


def _card(name: str) -> LamConfig:
    lam = lamzoo.model_info(name).lam
    assert lam is not None
    return lam


def _sizes(model: Any) -> dict[str, int]:
    layer = next(module for module in model.modules() if isinstance(module, FusedAttention))
    tokens = model.num_prefix_tokens + model.patch_embed.num_patches
    return {"width": layer.width, "columns": layer.columns, "tokens": tokens}


def _spread(ratios: Sequence[float]) -> list[float]:
    return [round(each, 3) for each in statistics.quantiles(ratios, n=4, method="inclusive")]


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as Markdown: ratios to the plain backbone with quartiles, and the form that is taken."""
    lines = []
    for row in rows:
        forms = (
            with_quartiles(row.unfused, row.unfused_q1, row.unfused_q3),
            with_quartiles(row.fused, row.fused_q1, row.fused_q3),
        )
        lines.append((f"`{row.model}`", row.rank, row.batch, *forms, row.form, f"{row.ms:.1f}"))
    heads = ("model", "rank", "batch", "unfused", "fused", "form taken", "ms")
    return markdown(heads, lines) + measured_on(_conditions(rows))


def step_table(rows: Sequence[speed.Row]) -> str:
    """Returns rows of training steps as Markdown: ratios to the plain backbone with quartiles."""
    lines = []
    for row in rows:
        ratio = with_quartiles(row.ratio, row.ratio_q1, row.ratio_q3)
        lines.append((f"`{row.model}`", row.batch, ratio, f"{row.ms:.1f}"))
    return markdown(("model", "batch", "training step", "ms"), lines) + measured_on(_conditions(rows))


def _conditions(rows: Sequence[Row] | Sequence[speed.Row]) -> set[str]:
    return {
        f"{row.device}, {row.threads} threads, {getattr(row, 'dtype', 'float32')}, torch {row.torch}" for row in rows
    }


def main() -> None:
    """Measures missing rows and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="models with masks that have a fused form")
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS), help="ranks of the masks; 0: the card's")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 32])
    parser.add_argument("--step-batches", nargs="*", type=int, default=[16], help="batches of the training steps")
    parser.add_argument("--seconds", type=float, default=30, help="duration of the timed passes of a row")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of inference")
    parser.add_argument(
        "--results", type=Path, help="fused.csv in lamzoo/lam; on a GPU benchmarks/results/fused.gpu.csv"
    )
    parser.add_argument("--steps", type=Path, default=STEPS, help="results of training steps")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    args.results = args.results or (MEASURED if args.device == "cpu" else ON_GPU)
    rows, steps = read_rows(args.results, Row), read_rows(args.steps, speed.Row)
    if not args.table:
        device = torch.device(args.device)
        here = (device_label(device), torch.get_num_threads(), torch.__version__)
        same = [row for row in rows if (row.device, row.threads, row.torch, row.dtype) == (*here, args.dtype)]
        done = {(row.model, row.rank, row.batch) for row in same}
        wanted = [
            (name, rank or _card(name).rank, batch)
            for name, rank, batch in itertools.product(args.models, args.ranks, args.batches)
        ]
        for each in track([each for each in dict.fromkeys(wanted) if each not in done], description="inference"):
            rows.append(measure(*each, seconds=args.seconds, device=device, dtype=getattr(torch, args.dtype)))
            write_rows(args.results, rows)
        stepped = {(row.model, row.batch) for row in steps if (row.device, row.threads, row.torch) == here}
        ahead = [each for each in itertools.product(args.models, args.step_batches) if each not in stepped]
        for name, batch in track(ahead, description="training steps"):
            steps.append(speed.measure(name, _STEP, "train", batch, seconds=args.seconds, device=device))
            write_rows(args.steps, steps)
    print(table(rows))
    print(step_table(steps))


if __name__ == "__main__":
    main()
