"""Tests of :mod:`benchmarks.significance`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from benchmarks import significance
from benchmarks.ablation.run import HERE
from benchmarks.ablation.table import differences

P = st.floats(0, 1, allow_nan=False)


@given(st.lists(P, min_size=1, max_size=30))
def test_holms_correction_never_rejects_less_than_bonferronis(values: list[float]) -> None:
    corrected = significance.holm(values)
    assert all(p <= found <= min(1.0, len(values) * p) for p, found in zip(values, corrected, strict=True))
    places = sorted(range(len(values)), key=lambda place: values[place])
    assert [corrected[place] for place in places] == sorted(corrected)  # the order stays


@pytest.mark.parametrize(
    ("values", "corrected"),
    [((0.01, 0.04, 0.03), (0.03, 0.06, 0.06)), ((0.5,), (0.5,)), ((0.6, 0.7), (1.0, 1.0)), ((), ())],
)
def test_holms_correction_of_known_values(values: Sequence[float], corrected: Sequence[float]) -> None:
    assert significance.holm(values) == pytest.approx(list(corrected))


def test_rows_are_compared_with_their_reference_in_a_paired_test() -> None:
    found = significance.comparisons()
    assert [one.p for one in found] == sorted(one.p for one in found)
    (first,) = [one for one in found if one.ablation == "ablation" and one.about == "additive, position keys"]
    stored = differences(HERE / "ablation.toml")["add-position"]
    assert list(first.differences) == stored
    assert len(stored) == 3
    t = statistics.mean(stored) / (statistics.stdev(stored) / 3**0.5)
    assert first.p == pytest.approx(2 * stats.t.sf(abs(t), 2))
    low, high = first.interval
    assert low < statistics.mean(stored) < high
    assert (low > 0) == (first.p < 0.05)
    assert all(len(one.differences) >= 3 for one in found)
    assert f"of {len(found)} rows" in significance.summary()
