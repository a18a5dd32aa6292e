import bisect
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamzoo.data.video.sampling import FrameSampling, Slicing
from lamzoo.errors import ConfigError

SLICINGS = ("head", "middle", "tail", "uniform")
slicings: st.SearchStrategy[Slicing] = st.sampled_from(SLICINGS)
limits = st.none() | st.integers(1, 50)
rates = st.floats(0.05, 60)
durations = st.floats(0, 500)


@st.composite
def videos(draw: st.DrawFn) -> tuple[list[float], float]:
    """The times of a video's frames, at a variable rate, and its duration."""
    steps = draw(st.lists(st.floats(0.001, 3), max_size=60))
    times = [0.0, *np.cumsum(steps).tolist()]
    return times, times[-1] + draw(st.floats(0.001, 3))


@given(slicings, limits, st.integers(0, 5000))
def test_kept_candidates_rise_and_are_as_many_as_allowed(slicing: Slicing, limit: int | None, count: int) -> None:
    kept = FrameSampling(max_frames=limit, slicing=slicing).keep(count)
    assert len(kept) == (count if limit is None else min(count, limit))
    assert all(0 <= index < count for index in kept)
    assert all(earlier < later for earlier, later in pairwise(kept))


@given(st.integers(1, 50), st.integers(0, 5000))
def test_the_three_runs_are_the_start_the_centre_and_the_end(limit: int, count: int) -> None:
    head, middle, tail = (FrameSampling(max_frames=limit, slicing=slicing).keep(count) for slicing in SLICINGS[:3])
    everything = list(range(count))
    assert head == everything[:limit]
    assert tail == everything[-limit:]
    assert middle in [everything[start : start + limit] for start in range(max(1, count - limit + 1))]
    if middle:
        before, after = middle[0], count - 1 - middle[-1]
        assert after - before in (0, 1)


@given(st.integers(2, 50), st.integers(2, 5000))
def test_uniform_keeps_the_first_and_the_last_as_numpys_linspace_does(limit: int, count: int) -> None:
    kept = FrameSampling(max_frames=limit).keep(count)
    assert (kept[0], kept[-1]) == (0, count - 1)
    if count > limit:
        exact = [index * (count - 1) / (limit - 1) for index in range(limit)]
        assert kept == [math.floor(value + 1e-9) for value in exact]
        spaced = np.linspace(0, count - 1, limit)
        whole = np.abs(spaced - np.round(spaced)) < 1e-9  # there NumPy's own rounding may fall one short
        assert kept == np.where(whole, np.round(spaced), np.floor(spaced)).astype(int).tolist()


@given(st.integers(2, 24), st.integers(2, 300))
def test_uniform_is_within_one_of_clip4clips_own_indices(limit: int, count: int) -> None:
    kept = FrameSampling(max_frames=limit).keep(count)
    if count > limit:
        assert np.abs(np.array(kept) - np.linspace(0, count - 1, num=limit, dtype=int)).max() <= 1


def test_a_single_uniform_candidate_is_the_first() -> None:
    assert FrameSampling(max_frames=1).keep(7) == [0]


@given(rates, limits, slicings, durations)
def test_times_are_candidates_within_the_video(
    rate: float, limit: int | None, slicing: Slicing, duration: float
) -> None:
    times = FrameSampling(rate, limit, slicing).times(duration)
    assert times[0] >= 0 and (times[-1] < duration or times == [0])
    assert all(earlier < later for earlier, later in pairwise(times))
    assert all(abs(time * rate - round(time * rate)) < 1e-6 for time in times)
    count = max(1, math.ceil(duration * rate - 1e-6))
    assert len(times) == (count if limit is None else min(count, limit))


@pytest.mark.parametrize(("duration", "count"), [(0, 1), (0.4, 1), (1, 1), (1.01, 2), (10, 10), (10.5, 11)])
def test_a_started_second_has_its_candidate(duration: float, count: int) -> None:
    assert FrameSampling(max_frames=None).times(duration) == list(range(count))


def test_a_duration_that_floats_round_up_gets_no_further_candidate() -> None:
    assert len(FrameSampling(fps=10, max_frames=None).times(0.1 + 0.2)) == 3


@given(videos(), rates, limits, slicings)
def test_a_pick_is_the_last_frame_that_has_appeared(
    video: tuple[list[float], float], rate: float, limit: int | None, slicing: Slicing
) -> None:
    times, duration = video
    sampling = FrameSampling(rate, limit, slicing)
    picked, wanted = sampling.pick(times, duration), sampling.times(duration)
    assert len(picked) == len(wanted)
    assert all(earlier <= later for earlier, later in pairwise(picked))
    for index, time in zip(picked, wanted, strict=True):
        assert times[index] <= time + 1e-6
        assert index == len(times) - 1 or times[index + 1] > time
    assert picked == [bisect.bisect_right(times, time + 1e-6) - 1 for time in wanted]


@given(videos(), limits, slicings)
def test_without_a_rate_every_frame_is_a_candidate(
    video: tuple[list[float], float], limit: int | None, slicing: Slicing
) -> None:
    times, duration = video
    sampling = FrameSampling(None, limit, slicing)
    assert sampling.pick(times, duration) == sampling.keep(len(times))
    with pytest.raises(ConfigError, match="fps is None"):
        sampling.times(duration)


def test_a_frame_that_stays_is_picked_again() -> None:
    assert FrameSampling(max_frames=None).pick([0, 0.5, 3.2], 4.0) == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("field", "value"),
    [("fps", 0), ("fps", -1.0), ("fps", math.inf), ("fps", math.nan), ("max_frames", 0), ("slicing", "end")],
)
def test_what_means_nothing_is_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"FrameSampling\.{field} is {value!r}"):
        FrameSampling(**{field: value})
