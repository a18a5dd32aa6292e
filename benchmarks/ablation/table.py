"""Writes an ablation's results as a Markdown table: mean and standard deviation over the seeds of each row.

python -m benchmarks.ablation.table [--ablation benchmarks/ablation/grid.toml] [--results FILE.csv]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ablation.run import HERE, RESULTS, read_ablation, read_results

HEADINGS = {
    "top1": "top-1 (%)", "t2v_R1": "R@1", "t2v_R5": "R@5", "t2v_R10": "R@10", "t2v_MedianR": "MedR",
    "v2t_R1": "video to text: R@1", "v2t_R10": "R@10", "R1_07": "R1@0.7", "R1_05": "R1@0.5", "mAP": "mAP",
    "WER": "word error rate (%)", "sentence_accuracy": "sentences right (%)", "CIDEr": "CIDEr",
    "Bleu_4": "BLEU-4", "ROUGE_L": "ROUGE-L",
}  # fmt: skip
_DECIMALS = {"CIDEr": 3, "Bleu_4": 3, "ROUGE_L": 3}  # not in percent, as the others are, which have 2


def table(ablation: Path = HERE / "ablation.toml", results: Path | None = None) -> str:
    """Returns the table, a line for each row of the ablation that has a result.

    The scores are those of the ablation's ``columns``, or all that the results have. The difference, of the ablation's
    ``score``, or of the first one, is taken seed by seed from a row's reference, a plain model; its spread is that of
    the differences. Standard deviations are those of a sample (n - 1).

    Args:
        ablation: the rows.
        results: what ``run.py`` wrote; by default where it does.

    Raises:
        ValueError: there are no results, or two of one row and seed, which are of different recipes.
    """
    tables = read_ablation(ablation)
    results = results or RESULTS / f"{ablation.stem}.csv"
    lines: dict[str, dict[int, dict[str, str]]] = {}
    for line in read_results(results):
        of_row, seed = lines.setdefault(line["row"], {}), int(line["seed"])
        if seed in of_row:
            raise ValueError(f"{results} has row {line['row']}, seed {seed} twice; keep the one of today's recipe.")
        of_row[seed] = line
    if not lines:
        raise ValueError(f"{results} has no results; python -m benchmarks.ablation.run makes them.")
    columns = tables.get("columns", [column for column in line if column in HEADINGS])
    first = tables.get("score", columns[0])
    others = [column for column in columns if column != first]
    heads = ["parameters", "GMACs", "mask GMACs", HEADINGS[first], "vs. plain"]
    heads += [*(HEADINGS[column] for column in others), "seeds"]
    page = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for row, entry in tables["rows"].items():
        if row not in lines:
            continue
        of_row, its_reference = lines[row], entry.get("reference", tables["reference"])
        reference = lines.get(its_reference, {})
        cost = next(iter(of_row.values()))
        common = of_row.keys() & reference.keys()
        against = [float(of_row[seed][first]) - float(reference[seed][first]) for seed in sorted(common)]
        cells = [
            entry["about"],
            f"{1e6 * float(cost['params_m']):,.0f}",
            f"{float(cost['gmacs']):.4f}",
            f"{float(cost['lam_gmacs']):.4f}",
            _spread(first, [float(line[first]) for line in of_row.values()]),
            "" if row == its_reference else _spread(first, against, sign="+"),
            *(_spread(column, [float(line[column]) for line in of_row.values()]) for column in others),
            str(len(of_row)),
        ]
        page.append(f"| {' | '.join(cells)} |")
    return "\n".join(page) + "\n"


def _spread(column: str, values: Sequence[float], sign: str = "") -> str:
    if not values:
        return ""
    decimals = _DECIMALS.get(column, 2)
    mean = f"{statistics.mean(values):{sign}z.{decimals}f}"  # z: no negative zero
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{decimals}f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ablation", type=Path, default=HERE / "ablation.toml")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    print(table(args.ablation, args.results), end="")
