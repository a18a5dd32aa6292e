"""Trains the rows of an ablation, one process a run, and notes each result; what was noted before is not run again.

    python -m benchmarks.ablation.run --jobs 2
    python -m benchmarks.ablation.run --ablation benchmarks/ablation/grid.toml --jobs 2
    python -m benchmarks.ablation.run --rows plain base --seeds 0 --set schedule.epochs=1 --results try.csv --out try

The results stand in ``benchmarks/results`` under the ablation's name. Runs go seed by seed, so that every row has as
many seeds as the time allowed. A run that was killed goes on from its last checkpoint; one that fails is reported at
the end, with the path of its log, and the others go on.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import threading
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from operator import getitem
from pathlib import Path
from typing import Any

import timm
import torch

import lamzoo
from lamzoo.files import atomic_files
from lamzoo.profiling.bench import checkout_commit
from lamzoo.profiling.latency import device_label
from lamzoo.training import load_recipe
from lamzoo.training.config_reader import override, read_recipe
from lamzoo.training.recipe import AnyRecipe

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "benchmarks" / "results"
#: Of each task: the results' column of each score and where the run's report has it, for one split. The first counts.
SCORES: dict[str, dict[str, tuple[str, ...]]] = {
    "classification": {"top1": ("top1",), "eval_loss": ("loss",)},
    "retrieval": {f"{way}_{key}": (way, key) for way in ("t2v", "v2t") for key in ("R1", "R5", "R10", "MedianR")},
    "moments": {
        "R1_07": ("brief", "MR-full-R1@0.7"),
        "R1_05": ("brief", "MR-full-R1@0.5"),
        "mAP": ("brief", "MR-full-mAP"),
    },
    "captions": {name: (name,) for name in ("WER", "sentence_accuracy", "CIDEr", "Bleu_4", "ROUGE_L")},
}


@dataclass(frozen=True)
class Run:
    """One row with one seed.

    Attributes:
        row: its name in the ablation's file.
        recipe: the whole recipe, its output folder included; the scores are those of its test split, if it has one.
        overrides: what turns the ablation's recipe into this one.
        sha256: of the ablation's recipe and of the overrides, the output folder left out.
    """

    row: str
    recipe: AnyRecipe
    overrides: tuple[str, ...]
    sha256: str


def read_ablation(path: Path) -> dict[str, Any]:
    """Returns the ablation's tables ``recipe``, ``rows``, ``seeds`` and ``reference``; the first may be in a file.

    What the ablation's own ``set`` changes is part of its recipe. A row may have its own ``reference`` and ``seeds``.
    """
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    if isinstance(tables["recipe"], str):
        tables["recipe"] = read_recipe(path.parent / tables["recipe"])
    override(tables["recipe"], tables.get("set", ()))
    return tables


def plan(
    ablation: Path, out: Path, rows: Sequence[str], seeds: Sequence[int] | None, settings: Sequence[str]
) -> list[Run]:
    """Lists the runs, seed by seed, every recipe checked; the seeds are the file's where none are given."""
    tables = read_ablation(ablation)
    unknown = set(rows) - set(tables["rows"])
    if unknown:
        sys.exit(f"{ablation} has no rows {', '.join(sorted(unknown))}; it has {', '.join(tables['rows'])}.")
    out.mkdir(parents=True, exist_ok=True)
    base = out / "recipe.json"
    base.write_text(json.dumps(tables["recipe"], indent=2) + "\n", encoding="utf-8")
    runs = []
    own = {row: seeds or tables["rows"][row].get("seeds", tables["seeds"]) for row in rows}
    for seed in dict.fromkeys(chain(*own.values())):  # each once, in the order given
        for row in (row for row in rows if seed in own[row]):
            folder = json.dumps(str(out / f"{row}.seed{seed}"))
            changes = (*tables["rows"][row].get("set", ()), *settings, f"run.seed={seed}")
            overrides = (*changes, f"run.output={folder}")
            runs.append(Run(row, load_recipe(base, overrides), overrides, recipe_digest(tables["recipe"], changes)))
    return runs


def train(run: Run, out: Path, threads: int) -> dict[str, Any]:
    """Trains one run in a process of its own and returns its line of the results."""
    folder = Path(run.recipe.run.output)
    command = [sys.executable, "-m", "lamzoo", "train", str(out / "recipe.json"), *run.overrides, "--resume"]
    with folder.with_suffix(f"{folder.suffix}.log").open("a", encoding="utf-8") as log:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "COLUMNS": "120"}
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]
    report = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    cost = lamzoo.profile(lamzoo.create_model(f"local-dir:{folder / 'model'}", pretrained=True))
    return {
        "row": run.row,
        "seed": run.recipe.run.seed,
        **final_scores(report, run.recipe.task),
        "train_loss": round(float(last["train_loss"]), 4),
        "params_m": round(cost.params_m, 6),
        "lam_params_m": round(cost.lam_params_m, 6),
        "gmacs": round(cost.gmacs, 6),
        "lam_gmacs": round(cost.lam_gmacs, 6),
        "epochs": run.recipe.schedule.total_epochs,
        "train_seconds": round(float(last["train_seconds"])),
        "device": _device(run.recipe),
        "precision": run.recipe.run.precision,
        "threads": threads,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "data": run.recipe.data.source.rpartition("/")[2],
        "recipe_sha256": run.sha256,
        "commit": checkout_commit(),
    }


def final_scores(report: dict[str, Any], task: str) -> dict[str, float]:
    """Returns the scores of a run's report by column: of its last split, which is the test split where there is one."""
    *_, scores = report["scores"].values()
    return {column: round(reduce(getitem, way, scores), 4) for column, way in SCORES[task].items()}


def read_results(path: Path) -> list[dict[str, str]]:
    """Returns the lines of a results file; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def add_result(path: Path, line: dict[str, Any]) -> None:
    """Adds one line to a results file, which is replaced as a whole."""
    lines = [*read_results(path), line]
    with atomic_files(lamzoo.LamzooError) as stage, stage(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(line), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ablation", type=Path, default=HERE / "ablation.toml", help="the rows and their recipe")
    parser.add_argument("--rows", nargs="+", help="only these (all)")
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the file's")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="settings", help="for every row")
    parser.add_argument("--out", type=Path, help="folder of the runs (runs/NAME)")
    parser.add_argument("--results", type=Path, help="CSV to add to (benchmarks/results/NAME.csv)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; they share the CPU's cores")
    args = parser.parse_args()

    tables = read_ablation(args.ablation)
    out = (args.out or ROOT / "runs" / args.ablation.stem).resolve()
    results = args.results or RESULTS / f"{args.ablation.stem}.csv"
    runs = plan(args.ablation, out, args.rows or list(tables["rows"]), args.seeds, args.settings)
    done = {line["recipe_sha256"] for line in read_results(results)}
    missing = [run for run in runs if run.sha256 not in done]
    print(f"{len(runs)} runs, {len(runs) - len(missing)} of them done", flush=True)
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    lock, failed = threading.Lock(), []

    def work(run: Run) -> None:
        name = f"{run.row}, seed {run.recipe.run.seed}"
        try:
            line = train(run, out, threads)
        except (subprocess.CalledProcessError, lamzoo.LamzooError, OSError) as error:
            failed.append(name)
            print(f"{name}: failed ({error}); see {run.recipe.run.output}.log", flush=True)
            return
        with lock:
            add_result(results, line)
        score = next(iter(SCORES[run.recipe.task]))
        print(f"{name}: {score} {line[score]:.2f} in {line['train_seconds']} s", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, missing))
    if failed:
        sys.exit(f"{len(failed)} runs failed: {'; '.join(failed)}.")


def recipe_digest(recipe: dict[str, Any], changes: Sequence[str]) -> str:
    """Returns what tells a run from others in the results: a hash of the recipe and of what changes it."""
    if recipe["run"].get("keep") == "last":  # as every run did before a recipe could say so
        recipe = {**recipe, "run": {key: value for key, value in recipe["run"].items() if key != "keep"}}
    return hashlib.sha256(json.dumps([recipe, changes], sort_keys=True).encode()).hexdigest()[:16]


def _device(recipe: AnyRecipe) -> str:
    cpu = recipe.run.device == "cpu" or not torch.cuda.is_available()
    return device_label(torch.device("cpu" if cpu else "cuda"))


if __name__ == "__main__":
    main()
