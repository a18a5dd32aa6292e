"""Accuracy, GMACs and latency of pruning by the mask and of its peers, on trained models at equal budgets.

    python -m benchmarks.reduction lam_vit_tiny_patch8_64.tinyimagenet100 vit_tiny_patch8_64.tinyimagenet100 \
        --data npz:../shared/data/tinyimagenet100 --split val
    python -m benchmarks.reduction lam_vit_micro.cifar10 vit_micro.cifar10 --at 0 1 2 \
        --data npz:../shared/data/cifar10 --split test --methods "all tokens" "mask, drop" "redundancy, nearest" ToMe random stride
    python -m benchmarks.reduction --table                   prints the table of stored results
    python -m benchmarks.reduction --figure FILE.svg         draws the figure

Pruning by the mask runs on the masked model, and the peers on it and on its plain twin. A budget is a share of the
plain twin's GMACs, and the GMACs of masks and scoring count towards it; every method uses its largest setting within
the budget. Latency is that of the reduced model, alternating with the unreduced plain twin. Existing rows are not
measured again.
"""

from __future__ import annotations

import argparse
import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from torch import nn

import lamzoo
from benchmarks.peers import applied
from benchmarks.peers.selection import EViT, Random, Stride
from benchmarks.peers.tome import ToMe
from benchmarks.rows import read_rows, write_rows
from lamzoo.data import create_dataset
from lamzoo.evaluation import evaluate
from lamzoo.profiling.inputs import as_arguments, default_input
from lamzoo.profiling.latency import compare_latency
from lamzoo.reduction.config import Rest, Score
from lamzoo.registry.refs import ModelRef, display_name, split_name
from lamzoo.report.compare.plots import encode
from lamzoo.report.mpl import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "reduction.csv"


@dataclass(frozen=True)
class Row:
    """One method at one budget.

    Attributes:
        model: the reduced model.
        plain: the plain twin, which defines GMACs and time of 1.
        method: the method.
        share: the budget, as a share of the twin's GMACs.
        setting: setting of the method: the share kept at each stage, or ToMe's r.
        gmacs: GMACs at this setting.
        top1: top-1 accuracy in percent, on ``split`` of ``data``.
        latency_ratio: median ratio of the latency of one image to the twin.
        latency_ratio_q1: first quartile of the ratio.
        latency_ratio_q3: third quartile of the ratio.
        throughput_ratio: ratio of the time of 16 images to the twin.
        data: data set of the score.
        split: split of the data.
        device: label of the device.
        threads: number of PyTorch's threads.
        torch: version of torch.
    """

    model: str
    plain: str
    method: str
    share: float
    setting: float
    gmacs: float
    top1: float
    latency_ratio: float
    latency_ratio_q1: float
    latency_ratio_q3: float
    throughput_ratio: float
    data: str
    split: str
    device: str
    threads: int
    torch: str


@dataclass(frozen=True)
class Method:
    """A token-reduction method.

    Attributes:
        settings: settings in order of increasing GMACs, up to no reduction.
        open: given a model, a setting and the stages, reduces the model's tokens inside the context.
    """

    settings: Sequence[float]
    open: Callable[[nn.Module, float, tuple[int, ...]], AbstractContextManager[Any]]


@contextmanager
def _pruned(model: nn.Module, keep: float, at: tuple[int, ...], score: Score, rest: Rest) -> Iterator[nn.Module]:
    lamzoo.prune_tokens(model, keep, at, score=score, rest=rest)
    try:
        yield model
    finally:
        lamzoo.remove_pruning(model)


def _by_mask(score: Score, rest: Rest) -> Method:
    return Method(_KEEPS, lambda model, keep, at: _pruned(model, keep, at, score, rest))


_KEEPS = [thousandths / 1000 for thousandths in range(1, 1001)]
_OURS: dict[str, Method] = {
    f"{score}, {rest}": _by_mask(score, rest)
    for score, rest in (
        ("mask", "drop"),
        ("mask", "merge"),
        ("mask", "nearest"),
        ("attention", "drop"),
        ("attention", "merge"),
        ("redundancy", "nearest"),
    )
}
_PEERS = {
    "ToMe": Method(range(200, -1, -1), lambda model, r, at: applied(model, ToMe(int(r)))),
    "EViT": Method(_KEEPS, lambda model, keep, at: applied(model, EViT(keep, at))),
    "random": Method(_KEEPS, lambda model, keep, at: applied(model, Random(keep, at))),
    "stride": Method(_KEEPS, lambda model, keep, at: applied(model, Stride(keep, at))),
}
_WHOLE = "all tokens"
METHODS = {_WHOLE: Method([1.0], lambda model, keep, at: nullcontext(model)), **_OURS, **_PEERS}


def largest(method: Method, model: nn.Module, at: tuple[int, ...], budget: float) -> float | None:
    """Returns the largest setting that costs at most ``budget`` GMACs, or None if there is none."""

    def gmacs(setting: float) -> float:
        with method.open(model, setting, at):
            return lamzoo.profile(model).gmacs

    fitting = bisect_right(method.settings, budget, key=gmacs)
    return method.settings[fitting - 1] if fitting else None


def measure(
    name: str, plain_name: str, how: str, share: float, data: str, split: str, at: tuple[int, ...]
) -> Row | None:
    """Measures one method at one budget; returns None if no setting of the method fits the budget."""
    model, plain = (lamzoo.create_model(each, pretrained=True).eval() for each in (name, plain_name))
    lamzoo.remove_pruning(model)  # of weights trained with pruning, which have their own setting
    method, budget = METHODS[how], math.inf if how == _WHOLE else share * lamzoo.profile(plain).gmacs
    setting = largest(method, model, at, budget)
    if setting is None:
        return None
    (image,) = as_arguments(default_input(model))
    with method.open(model, setting, at):
        gmacs = lamzoo.profile(model).gmacs
        one = compare_latency(model, plain, image, repeats=40)
        many = compare_latency(model, plain, image.repeat(16, 1, 1, 1), repeats=10, warmup=2)
        score = evaluate(model, create_dataset(data, split), batch_size=100, workers=1)
    return Row(
        model=name, plain=plain_name, method=how, share=share, setting=setting, gmacs=round(gmacs, 4),
        top1=round(score.top1, 2), latency_ratio=round(one.ratio, 3), latency_ratio_q1=round(one.ratio_quartiles[0], 3),
        latency_ratio_q3=round(one.ratio_quartiles[1], 3), throughput_ratio=round(many.ratio, 3),
        data=data.rpartition("/")[2], split=split, device=one.device, threads=one.threads, torch=torch.__version__,
    )  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as Markdown: a line per method, a column per budget, top-1 (time ratios at 1 and 16 images)."""
    shares = sorted({row.share for row in rows}, reverse=True)
    lines = [
        "| model | tokens | " + " | ".join(f"{share:.0%} of the GMACs" for share in shares) + " |",
        "|---|---|" + "---|" * len(shares),
    ]
    for model, method in dict.fromkeys((row.model, row.method) for row in rows):
        found = {row.share: row for row in rows if (row.model, row.method) == (model, method)}
        cells = [_cell(found[share]) if share in found else "" for share in shares]
        lines.append(f"| `{model}` | {method} | " + " | ".join(cells) + " |")
    conditions = {
        f"{row.data}, {row.split} split; {row.device}, {row.threads} threads, torch {row.torch}" for row in rows
    }
    return "\n".join(lines) + "\n\nMeasured on: " + "; ".join(sorted(conditions)) + ".\n"


def _cell(row: Row) -> str:
    return f"{row.top1:.2f} ({row.latency_ratio:.2f}, {row.throughput_ratio:.2f})"


def figure(rows: Sequence[Row]) -> Figure:
    """Draws accuracy against GMACs and latency of one image, a line per model and method, by data set."""
    scored = list(dict.fromkeys((row.data, row.split) for row in rows))
    drawing = new_figure((12.5, 5.2 * len(scored)))
    panels = drawing.subplots(len(scored), 2, sharey="row", squeeze=False)
    for (left, right), (data, split) in zip(panels, scored, strict=True):
        here = [row for row in rows if (row.data, row.split) == (data, split)]
        styles = itertools.cycle(itertools.product(("-", "--", ":"), "osD^vPX"))
        lines = dict.fromkeys((row.model, row.method) for row in here)
        for (model, method), (line, marker) in zip(lines, styles, strict=False):
            found = sorted(
                (row for row in here if (row.model, row.method) == (model, method)), key=lambda row: row.gmacs
            )
            for axis, of in ((left, "gmacs"), (right, "latency_ratio")):
                axis.plot(
                    [getattr(row, of) for row in found], [row.top1 for row in found],
                    line, marker=marker, markersize=5, label=f"{_short(model)}, {method}",
                )  # fmt: skip
        left.set_xlabel("GMACs of one image")
        right.set_xlabel("time of one image, to the plain twin with all tokens")
        left.set_ylabel(f"top-1 (%), {data}, {split} split")
        right.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=7)
    return drawing


def _short(model: str) -> str:
    """Returns a model's name in the legend: without its tag, or that of its run."""
    return display_name(model) if ModelRef.parse(model).is_saved else split_name(model)[0]


def main() -> None:
    """Measures missing rows and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="model with masks and weights")
    parser.add_argument("plain", nargs="?", help="its twin without masks")
    parser.add_argument("--data", help="data set, as for `lamzoo eval`")
    parser.add_argument("--split", default="val")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.9, 0.8, 0.7, 0.63, 0.5])
    parser.add_argument("--at", nargs="+", type=int, default=[3, 6, 9], help="layers after which tokens are reduced")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--figure", type=Path, metavar="FILE.svg", help="draw stored results without measuring")
    args = parser.parse_args()
    rows = read_rows(args.results, Row)
    if args.figure:
        args.figure.write_bytes(encode(figure(rows), "svg"))
        return
    if not args.table:
        if not (args.model and args.plain and args.data):
            parser.error("give a model, its plain twin and --data, or --table")
        wanted = [
            (name, how, share)
            for share, how, name in itertools.product(args.shares, args.methods, (args.model, args.plain))
            if how != _WHOLE and (name == args.model or how in _PEERS)
        ]
        wanted = [(name, _WHOLE, 1.0) for name in (args.model, args.plain)] + wanted
        done = {(row.model, row.method, row.share) for row in rows}
        for name, how, share in track([each for each in wanted if each not in done], description="points"):
            row = measure(name, args.plain, how, share, args.data, args.split, tuple(args.at))
            if row is None:
                print(f"no setting of {how} takes {name} down to {share:.0%} of the GMACs; its cell stays empty")
                continue
            rows.append(row)
            write_rows(args.results, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
