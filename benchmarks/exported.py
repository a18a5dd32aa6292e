"""Accuracy and latency of exported programs compared with their models: plain, masked and pruned, float32 and int8.

    python -m benchmarks.exported lam_vit_tiny_patch8_64.tinyimagenet100 vit_tiny_patch8_64.tinyimagenet100 \
        --data npz:../shared/data/tinyimagenet100 --split val
    python -m benchmarks.exported --table      prints the table of stored results

Pruning uses the mask, to a share of the plain twin's GMACs. Latency is for one image, alternating with the same model
in PyTorch. Existing rows are not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from torch import nn

import lamzoo
from benchmarks.rows import STORED, markdown, measured_on, read_rows, with_quartiles, write_rows
from lamzoo.data import create_dataset
from lamzoo.evaluation import evaluate
from lamzoo.profiling.inputs import default_input
from lamzoo.profiling.latency import compare_latency, device_label

RESULTS = STORED / "exported.csv"
#: Programs by name in the table: suffix, and whether the linear layers are quantised.
PROGRAMS = {"PyTorch": None, "torch.export": (".pt2", False), "ONNX": (".onnx", False), "ONNX, int8": (".onnx", True)}


@dataclass(frozen=True)
class Row:
    """One program.

    Attributes:
        model: name of the model.
        tokens: ``"all"``, or the target of pruning.
        program: one of :data:`PROGRAMS`.
        gmacs: GMACs of one image.
        mib: size of the file in MiB; of the float32 weights for PyTorch.
        max_difference: largest difference of a logit from the model; None for PyTorch.
        top1: top-1 accuracy in percent, on ``split`` of ``data``.
        ratio: median ratio of the latency of one image to the model in PyTorch; None for PyTorch.
        ratio_q1: first quartile of the ratio.
        ratio_q3: third quartile of the ratio.
        ms: median latency in milliseconds.
        data: data set of the score.
        split: split of the data.
        device: label of the device.
        threads: number of threads of PyTorch and onnxruntime.
        torch: version of torch.
    """

    model: str
    tokens: str
    program: str
    gmacs: float
    mib: float
    max_difference: float | None
    top1: float
    ratio: float | None
    ratio_q1: float | None
    ratio_q3: float | None
    ms: float
    data: str
    split: str
    device: str
    threads: int
    torch: str


def measure(model: nn.Module, name: str, tokens: str, what: str, data: str, split: str, folder: Path) -> Row:
    """Exports a model and measures the program.

    Args:
        model: a model, pruned or not.
        name: the row's ``model``.
        tokens: the row's ``tokens``.
        what: a key of :data:`PROGRAMS`.
        data: data set, as for ``lamzoo eval``.
        split: split of the data.
        folder: folder for the exported file.
    """
    program, image = PROGRAMS[what], default_input(model)
    runs, mib, difference = model, sum(p.numel() * 4 for p in model.parameters()) / 2**20, None
    if program is not None:
        suffix, int8 = program
        written = lamzoo.export_model(model, folder / f"model{suffix}", int8=int8)
        runs, mib, difference = lamzoo.load_exported(written.path), written.mib, written.max_difference
    times = compare_latency(runs, model, image, repeats=50)
    low, high = times.ratio_quartiles
    return Row(
        model=name, tokens=tokens, program=what, gmacs=round(lamzoo.profile(model).gmacs, 4), mib=round(mib, 1),
        max_difference=difference, top1=round(evaluate(runs, create_dataset(data, split), batch_size=100).top1, 2),
        ratio=round(times.ratio, 3) if program else None, ratio_q1=round(low, 3) if program else None,
        ratio_q3=round(high, 3) if program else None, ms=round(times.model.median_ms, 2),
        data=data.rpartition("/")[2], split=split, device=device_label(torch.device("cpu")),
        threads=torch.get_num_threads(), torch=torch.__version__,
    )  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as Markdown."""
    heads = ["model", "tokens", "program", "GMACs", "MiB", "top-1 (%)", "time of one image to PyTorch"]
    lines = []
    for row in rows:
        tokens = row.tokens if row.tokens == "all" else f"pruned to {row.tokens}"
        ratio = "" if row.ratio is None else with_quartiles(row.ratio, row.ratio_q1, row.ratio_q3)
        difference = "" if row.max_difference is None else f"{row.max_difference:.1g}"
        costs = (f"{row.gmacs:.4f}", f"{row.mib:.1f}")
        lines.append((f"`{row.model}`", tokens, row.program, *costs, f"{row.top1:.2f}", ratio, difference))
    conditions = {
        f"{row.data}, {row.split} split; {row.device}, {row.threads} threads, torch {row.torch}" for row in rows
    }
    return markdown([*heads, "largest difference"], lines) + measured_on(conditions)


def main() -> None:
    """Measures missing rows and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="model with masks and weights")
    parser.add_argument("plain", nargs="?", help="its twin without masks")
    parser.add_argument("--data", help="data set, as for `lamzoo eval`")
    parser.add_argument("--split", default="val")
    parser.add_argument("--share", type=float, default=0.63, help="share of the plain twin's GMACs after pruning")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    rows = read_rows(args.results, Row)
    if not args.table:
        if not (args.model and args.plain and args.data):
            parser.error("give a model, its plain twin and --data, or --table")
        few = f"{args.share:.0%} of the GMACs"
        budget = args.share * lamzoo.profile(lamzoo.create_model(args.plain)).gmacs
        models = [(args.plain, "all"), (args.model, "all"), (args.model, few)]
        done = {(row.model, row.tokens, row.program) for row in rows}
        wanted = [(*each, what) for each, what in itertools.product(models, PROGRAMS) if (*each, what) not in done]
        with tempfile.TemporaryDirectory() as folder:
            for name, tokens, what in track(wanted, description="programs"):
                model = lamzoo.create_model(name, pretrained=True).eval()
                if tokens == few:
                    lamzoo.prune_tokens(model, target_gmacs=budget)
                rows.append(measure(model, name, tokens, what, args.data, args.split, Path(folder)))
                write_rows(args.results, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
