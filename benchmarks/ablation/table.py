"""Writes the ablation's results as a Markdown table: mean and standard deviation over the seeds of each row.

python -m benchmarks.ablation.table [--results benchmarks/results/ablation.csv]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ablation.run import HERE, RESULTS, read_ablation, read_results


def table(results: Path = RESULTS, ablation: Path = HERE / "ablation.toml") -> str:
    """Returns the table, a line for each row of the ablation that has a result.

    The difference is taken seed by seed from the reference row; its spread is that of the differences. Standard
    deviations are those of a sample (n - 1).

    Args:
        results: what ``run.py`` wrote.
        ablation: the rows.

    Raises:
        ValueError: two results of one row and seed, which are of different recipes.
    """
    tables = read_ablation(ablation)
    scores: dict[str, dict[int, float]] = {}
    costs: dict[str, dict[str, str]] = {}
    for line in read_results(results):
        of_row = scores.setdefault(line["row"], {})
        seed = int(line["seed"])
        if seed in of_row:
            raise ValueError(f"{results} has row {line['row']}, seed {seed} twice; keep the one of today's recipe.")
        of_row[seed] = float(line["top1"])
        costs[line["row"]] = line
    reference = scores.get(tables["reference"], {})
    lines = [
        f"| | parameters | GMACs | of them masks | top-1 (%) | against {tables['reference']} | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, entry in tables["rows"].items():
        if row not in scores:
            continue
        cost, of_row = costs[row], scores[row]
        differences = [score - reference[seed] for seed, score in of_row.items() if seed in reference]
        against = "" if row == tables["reference"] else _spread(differences, sign="+")
        lines.append(
            f"| {entry['about']} | {1e6 * float(cost['params_m']):,.0f} | {float(cost['gmacs']):.4f} "
            f"| {float(cost['lam_gmacs']):.4f} | {_spread(list(of_row.values()))} | {against} | {len(of_row)} |"
        )
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float], sign: str = "") -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):{sign}.2f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    print(table(parser.parse_args().results), end="")
