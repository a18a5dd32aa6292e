"""Retrieval scores: by hand, against plain loops, and however often a score occurs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lamzoo.errors import ConfigError
from lamzoo.evaluation import dual_softmax, retrieval_metrics

MATRICES = hnp.arrays(
    np.float64, st.tuples(st.shared(st.integers(1, 12), key="n"), st.shared(st.integers(1, 12), key="n")),
    elements=st.integers(-3, 3).map(float),
)  # fmt: skip


def by_sorting(scores: np.ndarray) -> dict[str, float]:
    """CLIP4Clip's definition for one caption a video, written as a loop: every position of the right one's score."""
    ranks = [
        position
        for row, right in zip(scores, np.diag(scores), strict=True)
        for position, score in enumerate(sorted(row, reverse=True))
        if score == right
    ]
    recalls = {f"R{k}": 100 * np.mean([rank < k for rank in ranks]) for k in (1, 5, 10, 50)}
    return {**recalls, "MedianR": np.median(ranks) + 1, "MeanR": np.mean(ranks) + 1}


def test_a_small_matrix_by_hand() -> None:
    scores = np.array([[0.9, 0.1, 0.2], [0.8, 0.7, 0.1], [0.3, 0.2, 0.15]])
    metrics = retrieval_metrics(scores)
    assert metrics["t2v"]["R1"] == pytest.approx(100 / 3)  # ranks 1, 2, 3
    assert metrics["t2v"]["MedianR"] == 2
    assert metrics["t2v"]["MeanR"] == pytest.approx(2)
    assert metrics["v2t"]["R1"] == pytest.approx(200 / 3)  # ranks 1, 1, 2
    assert metrics["v2t"]["R5"] == 100


@settings(deadline=None)
@given(MATRICES)
def test_ties_count_every_position(scores: np.ndarray) -> None:
    metrics = retrieval_metrics(scores)
    assert metrics["t2v"] == pytest.approx(by_sorting(scores))
    assert metrics["v2t"] == pytest.approx(by_sorting(scores.T))


def test_equal_scores_gain_nothing() -> None:
    metrics = retrieval_metrics(np.zeros((200, 200)))
    assert metrics["t2v"]["R1"] == metrics["v2t"]["R1"] == 0.5
    assert metrics["t2v"]["MeanR"] == 100.5


@settings(deadline=None)
@given(MATRICES)
def test_the_order_of_texts_does_not_matter(scores: np.ndarray) -> None:
    order = np.random.default_rng(len(scores)).permutation(len(scores))
    shuffled, straight = retrieval_metrics(scores[order], order), retrieval_metrics(scores)
    for direction in ("t2v", "v2t"):
        assert shuffled[direction] == pytest.approx(straight[direction])


def test_several_captions_are_queries_of_their_own_and_one_group_as_candidates() -> None:
    scores = np.array([[0.9, 0.0], [0.1, 0.5], [0.2, 0.8], [0.3, 0.6]])  # two captions each
    metrics = retrieval_metrics(scores, [0, 0, 1, 1])
    assert metrics["t2v"]["R1"] == 75  # the second caption prefers the other video
    assert metrics["v2t"]["R1"] == 100  # 0.9 against 0.3, 0.8 against 0.5


def test_a_video_without_text_is_a_distractor() -> None:
    scores = np.array([[0.5, 0.1, 0.9], [0.1, 0.5, 0.2]])
    metrics = retrieval_metrics(scores, torch.tensor([0, 1]))
    assert metrics["t2v"]["R1"] == 50
    assert metrics["v2t"]["R1"] == 100


def test_torch_and_numpy_agree() -> None:
    scores = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
    assert retrieval_metrics(scores) == retrieval_metrics(scores.numpy())
    assert retrieval_metrics(scores.requires_grad_()) == retrieval_metrics(scores.detach())


def test_dual_softmax_puts_right_a_video_that_every_text_likes() -> None:
    scores = torch.tensor([[9.0, 8.0], [5.0, 4.0]]) + torch.tensor([[0.0, 0.5], [0.0, -0.5]])
    assert retrieval_metrics(scores, [1, 0])["t2v"]["R1"] == 50
    to_video, to_text = dual_softmax(scores)
    for matrix, axis in ((to_video, 0), (to_text, 1)):
        expected = scores.numpy() * np.exp(scores.numpy()) / np.exp(scores.numpy()).sum(axis=axis, keepdims=True)
        np.testing.assert_allclose(matrix, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("similarity", "owners", "says"),
    [
        (np.zeros((2, 3)), None, "2 texts and 3 videos"),
        (np.zeros(3), None, r"shape \(3,\)"),
        (np.zeros((0, 0)), None, r"shape \(0, 0\)"),
        (np.array([[0.0, np.nan]]), [0], "text 0 and video 1 is NaN"),
        (np.zeros((2, 2)), [0], "2 integers"),
        (np.zeros((2, 2)), [0.0, 1.0], "2 integers"),
        (np.zeros((2, 2)), [0, 2], "has the index 2; it must be from 0 to 1"),
        (np.zeros((2, 2)), [0, -1], "has the index -1"),
    ],
)
def test_what_is_no_similarity_is_refused(similarity: np.ndarray, owners: list[int] | None, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        retrieval_metrics(similarity, owners)
