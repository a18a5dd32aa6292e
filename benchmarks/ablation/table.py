"""Formats an ablation's results as a Markdown table: mean and standard deviation over the seeds of each row.

python -m benchmarks.ablation.table [--ablation benchmarks/ablation/grid.toml] [--results FILE.csv]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.ablation.run import HERE, RESULTS, Ablation, read_ablation, read_results
from lamzoo.registry.catalog import task_of
from lamzoo.tasks import MetricSpec, find_task


def table(ablation: Path = HERE / "ablation.toml", results: Path | None = None) -> str:
    """Returns the table, with one line per row of the ablation that has a result.

    Metrics are the ablation's ``columns``, or all in the results. Differences are those of the ablation's ``score``, or
    of the first metric, to the row's reference, a plain model, for each seed; their spread is computed over these
    differences. Standard deviations are sample standard deviations (n - 1).

    Args:
        ablation: the ablation's file.
        results: results of ``run.py``; the default file if None.

    Raises:
        ValueError: there are no results, or two for the same row and seed, from different recipes.
    """
    tables, lines = _stored(ablation, results)
    metrics = {metric.column: metric for metric in find_task(_task(tables)).metrics}
    first, *others = _columns(tables, lines)
    heads = ["parameters", "GMACs", "mask GMACs", metrics[first].short, "vs. plain"]
    heads += [*(metrics[column].short for column in others), "seeds"]
    page = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for row, entry in tables.rows.items():
        if row not in lines:
            continue
        of_row = lines[row]
        cost = next(iter(of_row.values()))
        cells = [
            entry.about,
            f"{1e6 * float(cost['params_m']):,.0f}",
            f"{float(cost['gmacs']):.4f}",
            f"{float(cost['lam_gmacs']):.4f}",
            _spread(metrics[first], [float(line[first]) for line in of_row.values()]),
            _spread(metrics[first], _against(tables, lines, row, first), sign="+"),
            *(_spread(metrics[column], [float(line[column]) for line in of_row.values()]) for column in others),
            str(len(of_row)),
        ]
        page.append(f"| {' | '.join(cells)} |")
    return "\n".join(page) + "\n"


def differences(ablation: Path, results: Path | None = None) -> dict[str, list[float]]:
    """Returns the differences of :func:`table`, seed by seed, of the rows that have some; as there."""
    tables, lines = _stored(ablation, results)
    first, *_ = _columns(tables, lines)
    found = {row: _against(tables, lines, row, first) for row in tables.rows}
    return {row: each for row, each in found.items() if each}


Lines = Mapping[str, Mapping[int, Mapping[str, str]]]  # of the results, by row and seed


def _stored(ablation: Path, results: Path | None) -> tuple[Ablation, Lines]:
    results = results or RESULTS / f"{ablation.stem}.csv"
    lines: dict[str, dict[int, dict[str, str]]] = {}
    for line in read_results(results):
        of_row, seed = lines.setdefault(line["row"], {}), int(line["seed"])
        if seed in of_row:
            raise ValueError(f"{results} has row {line['row']}, seed {seed} twice; keep the one of the current recipe.")
        of_row[seed] = line
    if not lines:
        raise ValueError(f"{results} has no results; run python -m benchmarks.ablation.run.")
    return read_ablation(ablation), lines


def _columns(tables: Ablation, lines: Lines) -> list[str]:
    """Returns the columns of the metrics, that of the differences first."""
    every = [each for of_row in lines.values() for each in of_row.values()]
    metrics = {metric.column for metric in find_task(_task(tables)).metrics}
    there = [column for column in every[0] if column in metrics and all(each[column] for each in every)]
    columns = [column for column in tables.columns or there if column in there]
    first = tables.score or columns[0]
    return [first, *(column for column in columns if column != first)]


def _against(tables: Ablation, lines: Lines, row: str, column: str) -> list[float]:
    """Returns the differences of a row to its reference in a column, seed by seed; none of the reference itself."""
    name = tables.rows[row].reference or tables.reference
    mine, reference = lines.get(row, {}), lines.get(name, {}) if row != name else {}
    seeds = sorted(mine.keys() & reference.keys())
    return [float(mine[seed][column]) - float(reference[seed][column]) for seed in seeds]


def _task(ablation: Ablation) -> str:
    task: str = ablation.recipe.get("task") or task_of(ablation.recipe["model"]["name"]).name
    return task


def _spread(metric: MetricSpec, values: Sequence[float], sign: str = "") -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):{sign}z.{metric.decimals}f}"  # z: no negative zero
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{metric.decimals}f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ablation", type=Path, default=HERE / "ablation.toml")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    print(table(args.ablation, args.results), end="")
