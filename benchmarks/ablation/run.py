"""Trains the rows of an ablation, one process per run, and stores the results; completed runs are skipped.

    python -m benchmarks.ablation.run --jobs 2
    python -m benchmarks.ablation.run --ablation benchmarks/ablation/grid.toml --jobs 2
    python -m benchmarks.ablation.run --rows plain base --seeds 0 --set schedule.epochs=1 --results try.csv --out try

Results are stored in ``benchmarks/results`` under the ablation's name. Runs are ordered by seed, so that all rows have
the same number of seeds if time runs out. An interrupted run continues from its last checkpoint; a failed one is
reported at the end, with the path of its log, and the others continue.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import timm
import torch

import lamzoo
from lamzoo import records
from lamzoo.files import atomic_files, file_lock
from lamzoo.profiling.bench import checkout_commit
from lamzoo.profiling.latency import device_label
from lamzoo.reading import to_json
from lamzoo.tasks import find_task
from lamzoo.training import load_recipe
from lamzoo.training.build import attention_kernels
from lamzoo.training.config_reader import override, read_recipe
from lamzoo.training.recipe import AnyRecipe

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_MACHINE = ("run.device", "run.precision", "run.checkpoint_interval", "data.workers")
_profiling = threading.Lock()  # the choice of kernels is one for all threads


@dataclass(frozen=True)
class Row:
    """A row of an ablation.

    Attributes:
        about: description in the table.
        set: overrides of the ablation's recipe.
        seeds: seeds of this row, instead of the ablation's.
        reference: row to compare this one with, instead of the ablation's.
        module: module that trains it from a recipe, instead of ``lamzoo train``, such as ``"benchmarks.train_lora"``.
    """

    about: str
    set: list[str] = field(default_factory=list)
    seeds: list[int] | None = None
    reference: str | None = None
    module: str | None = None


@dataclass(frozen=True)
class Ablation:
    """Contents of an ablation file.

    Attributes:
        recipe: nested values, or the path of a recipe file relative to this one.
        rows: the rows by name.
        seeds: seeds of each row.
        reference: row to compare others with.
        set: overrides common to all rows.
        columns: metrics in the table, by their columns in the results; the first is the main one. None for all.
        score: the metric to compare, instead of the first one.
    """

    recipe: Any
    rows: dict[str, Row]
    seeds: list[int]
    reference: str
    set: list[str] = field(default_factory=list)
    columns: list[str] | None = None
    score: str | None = None


@dataclass(frozen=True)
class Run:
    """One row with one seed.

    Attributes:
        row: name of the row in the ablation file.
        recipe: the complete recipe with its output folder; scores are those of its test split, if it has one.
        overrides: overrides of the ablation's recipe.
        sha256: hash of the ablation's recipe and of the overrides, without the output folder.
        module: that of the :class:`Row`.
    """

    row: str
    recipe: AnyRecipe
    overrides: tuple[str, ...]
    sha256: str
    module: str | None = None


def read_ablation(path: Path) -> Ablation:
    """Reads an ablation file and returns it with its recipe as nested values, after the overrides of ``set``.

    Raises:
        DataError: the file can't be read, or a key is unknown, missing or mistyped.
    """
    ablation = records.build(Ablation, records.read_table(path, what="Ablation"), source=f"{path}:")
    if isinstance(ablation.recipe, str):
        ablation = replace(ablation, recipe=read_recipe(path.parent / ablation.recipe))
    override(ablation.recipe, ablation.set)
    return ablation


def plan(
    ablation: Path,
    out: Path,
    rows: Sequence[str],
    seeds: Sequence[int] | None,
    settings: Sequence[str],
    machine: Sequence[str] = (),
) -> list[Run]:
    """Lists the runs by seed, with validated recipes.

    Args:
        ablation: the ablation file.
        out: folder of the runs.
        rows: names of rows.
        seeds: seeds of each row; those of the file if None.
        settings: overrides for every row.
        machine: further ones that only say where and how it is computed, and are no part of a run's identity.
    """
    tables = read_ablation(ablation)
    unknown = set(rows) - set(tables.rows)
    if unknown:
        sys.exit(f"{ablation} has no rows {', '.join(sorted(unknown))}; use {', '.join(tables.rows)}.")
    out.mkdir(parents=True, exist_ok=True)
    base = out / "recipe.json"
    with atomic_files() as stage:  # another call may read it
        stage(base).write_text(to_json(tables.recipe, indent=2) + "\n", encoding="utf-8")
    runs = []
    own = {row: seeds or tables.rows[row].seeds or tables.seeds for row in rows}
    for seed in dict.fromkeys(chain(*own.values())):  # without duplicates, in the given order
        for row in (row for row in rows if seed in own[row]):
            folder = json.dumps(str(out / f"{row}.seed{seed}"))
            changes = (*tables.rows[row].set, *settings, f"run.seed={seed}")
            overrides = (*changes, *machine, f"run.output={folder}")
            digest, module = recipe_digest(tables.recipe, changes), tables.rows[row].module
            runs.append(Run(row, load_recipe(base, overrides), overrides, digest, module))
    return runs


def train(run: Run, out: Path, threads: int) -> dict[str, Any]:
    """Trains one run in a separate process and returns its line of the results."""
    folder = Path(run.recipe.run.output)
    trainer = ["lamzoo", "train"] if run.module is None else [run.module]
    command = [sys.executable, "-m", *trainer, str(out / "recipe.json"), *run.overrides, "--resume"]
    with folder.with_suffix(f"{folder.suffix}.log").open("a", encoding="utf-8") as log:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "COLUMNS": "120"}
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)
    *_, last = read_results(folder / "metrics.csv")
    report = records.read_table(folder / "report" / "report.json", what="Report")
    with _profiling, attention_kernels(fused=False):  # torch 2.11 counts the fused ones of a CPU as zero
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
    """Returns the scores of a run's report by column, for its last split, the test split if there is one."""
    *_, scores = report["scores"].values()
    found = {metric.column: metric.of(scores) for metric in find_task(task).metrics}
    return {column: round(value, 4) for column, value in found.items() if value is not None}


def read_results(path: Path) -> list[dict[str, str]]:
    """Returns the lines of a results file; none if the file does not exist."""
    if not path.exists():
        return []
    columns, lines = records.read_lines(path, what="results file")
    return [dict(zip(columns, cells, strict=True)) for _, cells in lines]


def add_result(path: Path, line: dict[str, Any]) -> None:
    """Appends a line to a results file atomically; a new column is empty in the other lines."""
    with file_lock(path.parent / f".{path.name}.lock", wait=True):  # another call may add to it, too
        lines = [*read_results(path), line]
        records.write_csv(path, list(dict.fromkeys(column for each in lines for column in each)), lines)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ablation", type=Path, default=HERE / "ablation.toml", help="file with the rows and their recipe"
    )
    parser.add_argument("--rows", nargs="+", help="names of rows to run (all)")
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds, instead of the file's")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", dest="settings", help="overrides for every row"
    )
    parser.add_argument("--out", type=Path, help="folder of the runs (runs/NAME)")
    parser.add_argument("--results", type=Path, help="CSV to add to (benchmarks/results/NAME.csv)")
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel runs, which share the CPU cores")
    add_machine_options(parser)
    args = parser.parse_args()

    tables = read_ablation(args.ablation)
    out = (args.out or ROOT / "runs" / args.ablation.stem).resolve()
    results = args.results or RESULTS / f"{args.ablation.stem}.csv"
    runs = plan(args.ablation, out, args.rows or list(tables.rows), args.seeds, args.settings, machine_of(args))
    done = {line["recipe_sha256"] for line in read_results(results)}
    missing = [run for run in runs if run.sha256 not in done]
    print(f"{len(runs)} runs, {len(runs) - len(missing)} done", flush=True)
    threads = args.threads or max(1, (os.cpu_count() or 1) // args.jobs)
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
        score = tables.score or (tables.columns or [find_task(run.recipe.task).metrics[0].column])[0]
        print(f"{name}: {score} {line[score]:.2f} in {line['train_seconds']} s", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, missing))
    if failed:
        sys.exit(f"{len(failed)} runs failed: {'; '.join(failed)}.")


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of :func:`machine_of`, and ``--threads``."""
    parser.add_argument(
        "--machine",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help=f"overrides for this machine, no part of a run's identity: {', '.join(_MACHINE)}",
    )
    parser.add_argument("--threads", type=int, help="threads of a run")


def machine_of(args: argparse.Namespace) -> list[str]:
    """Returns the overrides that only say where and how a run is computed; exits with a message for another key."""
    for setting in args.machine:
        if setting.partition("=")[0] not in _MACHINE:
            sys.exit(f"--machine {setting}: it takes {', '.join(_MACHINE)}; use --set.")
    return list(args.machine)


def recipe_digest(recipe: dict[str, Any], changes: Sequence[str]) -> str:
    """Returns the identity of a run in the results: a hash of the recipe and its overrides."""
    if recipe["run"].get("keep") == "last":  # the only behaviour before this setting existed
        recipe = {**recipe, "run": {key: value for key, value in recipe["run"].items() if key != "keep"}}
    return hashlib.sha256(json.dumps([recipe, changes], sort_keys=True).encode()).hexdigest()[:16]


def _device(recipe: AnyRecipe) -> str:
    cpu = recipe.run.device == "cpu" or not torch.cuda.is_available()
    return device_label(torch.device("cpu" if cpu else "cuda"))


if __name__ == "__main__":
    main()
