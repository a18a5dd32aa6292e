"""Fine-tunes a model with masks and its plain twin in every mode, and tabulates the results.

    python -m benchmarks.finetuning lam_vit_tiny vit_tiny --data npz:../shared/data/clothing10

Completed runs are skipped, and interrupted ones continue. Arguments after ``--`` are added to every command line.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rows import ROOT, STORED, markdown, read_rows, write_rows
from lamzoo import records

RESULTS = STORED / "finetuning.csv"


@dataclass(frozen=True)
class Row:
    """One fine-tuned model; ``top1`` is in percent, on the last split that was scored."""

    model: str
    tune: str
    seed: int
    data: str
    split: str
    top1: float
    trained_params: int
    params: int
    train_seconds: int
    epochs: int
    device: str
    threads: int
    torch: str
    timm: str
    command: str


def train(model: str, tune: str, seed: int, data: str, out: Path, more: Sequence[str]) -> Row:
    """Runs one line, unless its report is there, and returns a row."""
    output = out / f"{re.sub(r'[^A-Za-z0-9.]+', '-', model).strip('-')}.{tune}.seed{seed}"
    line = ["train", "--model", model, "--pretrained", "--data", data, "--tune", tune, "--seed", str(seed)]
    line += ["run.keep=last", *more]  # as in the existing rows
    report = output / "report" / "report.json"
    if not report.exists():
        subprocess.run([sys.executable, "-m", "lamzoo", *line, "--output", str(output), "--resume"], check=True)
    content = records.read_table(report, what="Report")
    split, score = list(content["scores"].items())[-1]
    return Row(
        model=model,
        tune=tune,
        seed=seed,
        data=data.rpartition("/")[2],
        split=split,
        top1=round(score["top1"], 2),
        trained_params=content["parameters"]["trained"],
        params=content["parameters"]["all"],
        train_seconds=round(content["train_seconds"]),
        epochs=content["epochs"],
        device=content["device"],
        threads=content["threads"],
        torch=content["versions"]["torch"],
        timm=content["versions"]["timm"],
        command=" ".join(["lamzoo", *line]),
    )


def read_results(path: Path = RESULTS) -> list[Row]:
    """Returns the rows of a results file."""
    return read_rows(path, Row)


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as Markdown, the seeds of a line averaged."""
    lines = []
    for model, tune in dict.fromkeys((row.model, row.tune) for row in rows):
        group = [row for row in rows if (row.model, row.tune) == (model, tune)]
        scores = [row.top1 for row in group]
        spread = f" ± {statistics.stdev(scores):.2f} ({len(scores)} seeds)" if len(scores) > 1 else ""
        minutes = statistics.mean(row.train_seconds for row in group) / 60
        trained, top1 = f"{group[0].trained_params / 1e6:.3f}", f"{statistics.mean(scores):.2f}{spread}"
        lines.append((f"`{model}`", tune, trained, top1, f"{minutes:.1f}"))
    return markdown(("model", "tuned", "trained parameters (M)", "top-1 (%)", "minutes"), lines)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model with masks; tuned all, lam and head")
    parser.add_argument("plain", help="its plain twin; tuned all and head")
    parser.add_argument(
        "--data", required=True, help="data set, as for `lamzoo train`; the test split is scored if it exists"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "finetuning", help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    args, more = parser.parse_args(given[:end]), given[end + 1 :]

    lines = [(args.model, tune) for tune in ("all", "lam", "head")] + [(args.plain, tune) for tune in ("all", "head")]
    rows = [train(name, tune, seed, args.data, args.out, more) for name, tune in lines for seed in args.seeds]
    write_rows(args.results, rows)
    print(table(rows), end="")


if __name__ == "__main__":
    main()
