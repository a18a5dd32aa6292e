"""Paired t-tests of the ablations' differences to plain, with Holm's correction for their number.

    python -m benchmarks.significance

Each row with at least three seeds is compared with its reference in the ablation's first metric. Seeds are the samples:
the test items are the same for all.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from scipy import stats

from benchmarks.ablation.run import HERE, RESULTS, read_ablation
from benchmarks.ablation.table import differences
from benchmarks.rows import markdown

LEVEL = 0.05
_SEEDS = 3  # a row needs


@dataclass(frozen=True)
class Comparison:
    """A row of an ablation and its reference.

    Attributes:
        ablation: name of the ablation.
        about: description of the row.
        differences: of each seed, in the unit of the ablation's first metric.
        p: of a two-sided paired t-test.
        corrected: the same after Holm's correction for all comparisons.
    """

    ablation: str
    about: str
    differences: tuple[float, ...]
    p: float
    corrected: float = 1.0

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the mean difference."""
        half = stats.t.ppf(1 - LEVEL / 2, len(self.differences) - 1) * stats.sem(self.differences)
        mean = statistics.mean(self.differences)
        return mean - float(half), mean + float(half)


def holm(values: Sequence[float]) -> list[float]:
    """Returns p-values corrected for their number by Holm's step-down method, in their order."""
    corrected, largest = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=lambda place: values[place])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = largest
    return corrected


def comparisons() -> list[Comparison]:
    """Returns all comparisons of the stored results, by their p-values."""
    found = []
    for path in sorted(HERE.glob("*.toml")):
        if not (RESULTS / f"{path.stem}.csv").exists() or "towers" in path.stem:  # which have intervals of their own
            continue
        rows = read_ablation(path).rows
        for row, values in differences(path).items():
            if len(values) >= _SEEDS:
                p = float(stats.ttest_1samp(values, 0.0).pvalue)
                found.append(Comparison(path.stem, rows[row].about, tuple(values), p))
    corrected = holm([each.p for each in found])
    found = [replace(each, corrected=value) for each, value in zip(found, corrected, strict=True)]
    return sorted(found, key=lambda each: each.p)


def summary() -> str:
    """Returns a clause that counts them."""
    found = comparisons()
    each, after = sum(one.p <= LEVEL for one in found), sum(one.corrected <= LEVEL for one in found)
    return (
        f"of {len(found)} rows with three seeds or more, {each} differ from their reference at a level of {LEVEL:.0%} "
        f"in a paired t-test, where {LEVEL * len(found):.0f} do by chance, and {after} after Holm's correction"
    )


def table() -> str:
    """Returns the comparisons with a p-value of at most 5 % as Markdown."""
    lines = [
        (
            each.ablation,
            each.about,
            f"{statistics.mean(each.differences):+.2f} ({each.interval[0]:+.2f} to {each.interval[1]:+.2f})",
            str(len(each.differences)),
            f"{each.p:.4f}",
            f"{each.corrected:.2f}",
        )
        for each in comparisons()
        if each.p <= LEVEL
    ]
    heads = ("ablation", "row", "difference (95 % interval)", "seeds", "p", "p, corrected")
    return markdown(heads, lines) + f"\n{summary()[0].upper()}{summary()[1:]}.\n"


if __name__ == "__main__":
    print(table(), end="")
