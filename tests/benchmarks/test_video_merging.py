"""The bench of merged frames and streams: settings fit the budget, and tables say what was merged."""

from __future__ import annotations

import lamzoo
from benchmarks.video_merging import ALL, Row, TimeRow, gmacs, reduce, settings, table


def test_frames_merge_to_the_largest_number_within_the_budget() -> None:
    model = lamzoo.create_model("clip4clip_micro", max_frames=3)
    whole = gmacs(model)
    assert list(settings(model, [0.7])) == [(ALL, 1.0), ("patches", 0.7), ("frames", 0.7)]
    assert reduce(model, "frames", 0.7, whole)
    assert model.token_reduction == lamzoo.TokenReduction(1, frames=2 / 3)
    assert gmacs(model) <= 0.7 * whole


def test_the_table_names_settings_and_differences() -> None:
    whole = Row("m", ALL, 1.0, 1.0, 1.0, 0.2, "R@1", 50.0, 3.5, 0.0, 0.0, 90.0, "d", "test", "cpu", "2")
    fewer = Row("m", "frames", 0.6, 1.0, 0.5405, 0.12, "R@1", 49.0, 3.5, -1.0, 2.0, 91.0, "d", "test", "cpu", "2")
    lines = table([whole, fewer]).splitlines()
    assert lines[2] == "| `m` | all tokens | 0.2000 | 100.0% | R@1 50.00 ± 3.50 |  | 90 |"
    assert lines[3] == "| `m` | frames, frames=0.5405 | 0.1200 | 60.0% | R@1 49.00 ± 3.50 | -1.00 ± 2.00 | 91 |"


def test_the_table_has_the_time_of_the_full_size_model_at_the_same_budget() -> None:
    whole = Row("lam_m_micro.grid", ALL, 1.0, 1.0, 1.0, 0.2, "R@1", 50.0, 3.5, 0.0, 0.0, 90.0, "d", "test", "cpu", "2")
    frames = Row(
        "lam_m_micro.grid", "frames", 0.6, 1.0, 0.5, 0.12, "R@1", 49.0, 3.5, -1.0, 2.0, 91.0, "d", "s", "c", "2"
    )
    time = TimeRow("lam_m", "frames", 0.6, 1.0, 0.58, 30.0, 90.0, 0.6, 0.59, 0.61, "cpu (X)", 2, "2")
    first, second, _, conditions = table([whole, frames], [time]).splitlines()[2:]
    assert first.endswith("| 90 |  |")  # not timed
    assert second.endswith("| 91 | 0.60 (0.59-0.61) |")
    assert conditions == "Measured on: cpu (X), 2 threads, torch 2 (times)."
