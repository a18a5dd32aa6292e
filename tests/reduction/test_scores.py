"""Choosing tokens and reducing what belongs to them, in tensors."""

import json
import math
from dataclasses import replace
from functools import partial
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lamzoo.errors import ConfigError
from lamzoo.lam import FactoredMask, lam_attention
from lamzoo.lam.kernels.eager import attention_weights
from lamzoo.lam.ops import Op
from lamzoo.lam.token_map import TokenMap
from lamzoo.reduction.config import PruneConfig, Rest, Score
from lamzoo.reduction.decisions import attend_to_kept, decide, select
from lamzoo.reduction.matching import match
from lamzoo.reduction.scores import (
    SCORERS,
    AttentionInputs,
    mask_importance,
    redundancy,
    summary_attention,
    summary_contribution,
)
from tests.lam.cases import OPS, Case, make

each_op = pytest.mark.parametrize("op", OPS)


@settings(derandomize=True, max_examples=80)
@given(
    batch=st.integers(1, 3),
    patches=st.integers(1, 12),
    prefix=st.integers(0, 2),
    keep=st.floats(0.01, 1.0),
    rest=st.sampled_from(["drop", "merge", "nearest"]),
    seed=st.integers(0, 2**20),
)
def test_the_highest_scores_and_the_prefix_stay(
    batch: int, patches: int, prefix: int, keep: float, rest: Rest, seed: int
) -> None:
    scores = torch.randn(batch, prefix + patches, generator=torch.Generator().manual_seed(seed))
    reduction = select(scores, keep, rest, prefix, torch.randn(batch, prefix + patches, 4))
    size = max(1, math.ceil(round(keep * patches, 6)))
    merges = rest == "merge" and size < patches
    assert reduction.kept.shape == (batch, prefix + size + merges)
    stay = reduction.kept[:, : prefix + size]
    for sample, kept in zip(scores, stay.tolist(), strict=True):
        assert kept == sorted(set(kept)) and kept[:prefix] == list(range(prefix))
        gone = [token for token in range(prefix + patches) if token not in kept]
        if gone:
            assert sample[kept[prefix:]].min() >= sample[gone].max()
    assert (reduction.weights is None) == (rest == "drop" or size == patches)
    if reduction.into is not None and reduction.weights is not None:
        places = torch.arange(prefix + size).expand(batch, -1)
        assert torch.equal(reduction.into.gather(1, stay), places)
        total = torch.zeros(reduction.kept.shape).scatter_add(1, reduction.into, reduction.weights)
        torch.testing.assert_close(total, torch.ones_like(total) if reduction.totals is None else reduction.totals)
        if rest == "merge":
            torch.testing.assert_close(reduction.weights.gather(1, stay), torch.ones(stay.shape))
            assert sorted(set(reduction.into.flatten().tolist())) == list(range(prefix + size + 1))


def test_shares_round_up_but_not_by_rounding_errors() -> None:
    assert select(torch.rand(1, 10), 0.7, "drop", 0).kept.shape[1] == 7  # 0.7 * 10 is 7.000000000000001
    assert select(torch.rand(1, 10), 0.71, "drop", 0).kept.shape[1] == 8


def test_merging_weighs_by_the_softmax_of_the_scores() -> None:
    scores = torch.tensor([[0.0, 5.0, math.log(3.0), 4.0, 0.0]])
    reduction = select(scores, 0.5, "merge", 1)
    assert reduction.kept.tolist() == [[0, 1, 3, 2]]
    torch.testing.assert_close(reduction.weights, torch.tensor([[1.0, 1.0, 0.75, 1.0, 0.25]]))
    tokens = torch.randn(1, 5, 7)
    expected = torch.cat([tokens[:, [0, 1, 3]], 0.75 * tokens[:, 2:3] + 0.25 * tokens[:, 4:5]], dim=1)
    torch.testing.assert_close(reduction(tokens), expected)


def test_tokens_are_averaged_into_the_nearest_that_stays() -> None:
    tokens = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.8], [1.1, 0.1]]).unsqueeze(0)
    reduction = select(torch.tensor([[0.0, 5.0, 1.0, 4.0, 2.0, 3.0]]), 0.4, "nearest", 1, tokens)
    assert reduction.kept.tolist() == [[0, 1, 3]]
    (first, one, other) = reduction(tokens)[0]
    torch.testing.assert_close(first, tokens[0, 0])  # takes nothing in, though it is as near
    torch.testing.assert_close(one, tokens[0, [1, 2, 5]].mean(dim=0))
    torch.testing.assert_close(other, tokens[0, [3, 4]].mean(dim=0))
    factor = torch.randn(1, 2, 6, 3)
    rows = torch.stack([factor[:, :, 0], factor[:, :, [1, 2, 5]].mean(dim=2), factor[:, :, [3, 4]].mean(dim=2)], dim=2)
    torch.testing.assert_close(reduction.factor(factor), rows)


@pytest.mark.parametrize("rest", ["drop", "merge", "nearest"])
def test_a_reduced_factor_gives_the_reduced_mask(rest: Rest) -> None:
    case = make(queries=6, keys=6, right_shape=(False, True))
    reduction = select(torch.randn(2, 6), 0.5, rest, 1, torch.randn(2, 6, 4))
    mask = FactoredMask(case.left, case.right)
    few = FactoredMask(reduction.factor(mask.left), reduction.factor(mask.right))
    dense = mask.dense().flatten(0, 1)  # rows, then columns
    parts = (reduction.kept, reduction.into, reduction.weights, reduction.totals)
    both = type(reduction)(6, *(x if x is None else x.repeat_interleave(2, 0) for x in parts))
    torch.testing.assert_close(few.dense().flatten(0, 1), both(both(dense).mT).mT)


@settings(derandomize=True, max_examples=30, deadline=None)
@given(kinds=st.lists(st.sampled_from(["order", "drop", "merge", "nearest", "by sizes"]), min_size=2, max_size=4))
def test_maps_in_a_row_are_one_map(kinds: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 12, 5, generator=generator)
    few, whole, sizes, origins = tokens, None, None, torch.arange(12).expand(2, -1)
    for kind in kinds:
        length = few.shape[1]
        if kind == "order":
            places = torch.randperm(length, generator=generator).argsort().expand(2, -1)
            token_map = TokenMap(length, places.argsort(), places)
            sizes = None if sizes is None else token_map(sizes.unsqueeze(-1)).squeeze(-1)
        elif kind == "by sizes":
            token_map, sizes = match(few, 1, 1, sizes)
        else:
            scores = torch.randn(2, length, generator=generator)
            token_map, sizes = select(scores, 0.8, cast(Rest, kind), 1, few), None
        few, origins = token_map(few), origins.gather(1, token_map.kept)
        whole = token_map if whole is None else whole.then(token_map)
    assert whole is not None
    torch.testing.assert_close(whole(tokens), few)
    assert torch.equal(whole.kept, origins)
    if "drop" not in kinds and whole.into is not None:
        assert torch.equal(whole.places(), whole.into)


def score(scorer: Score, case: Case, has_class_token: bool = True, present: Tensor | None = None) -> Tensor:
    layer = AttentionInputs(*case.args, op=case.op, scale=0.5, present=present)
    return SCORERS[scorer](layer, has_class_token=has_class_token)


@each_op
def test_the_scores_are_what_they_are_called(op: Op) -> None:
    case = make(op=op, queries=6, keys=6, left_shape=(True, False))
    mask = FactoredMask(case.left, case.right)
    weights = attention_weights(
        case.query, case.key, mask, op=op, allowed=None, bias=None, is_causal=False, scale=0.5
    )[:, :, 0]  # fmt: skip
    norms = case.value.square().sum(-1).sqrt()
    torch.testing.assert_close(score("mask", case), mask.dense().mean(dim=(1, 2)))
    torch.testing.assert_close(score("attention", case).exp(), weights.mean(1))
    torch.testing.assert_close(score("attention-value", case).exp(), (weights * norms).mean(1))
    assert set(SCORERS.values()) == {mask_importance, summary_attention, summary_contribution, redundancy}


@pytest.mark.parametrize("has_class_token", [True, False])
def test_redundant_tokens_leave_first_and_every_second_one_last(has_class_token: bool) -> None:
    case, first = make(queries=9, keys=9), int(has_class_token)
    case = replace(case, right=torch.zeros_like(case.right))  # a mask that has nothing to say
    case.value[:, :, first + 3] = 2 * case.value[:, :, first + 4]  # the second of those that may leave has a double
    scores = score("redundancy", case, has_class_token)
    others = scores[:, first + 1 :: 2]
    assert (others.argmin(dim=1) == 1).all()
    assert others.max() < scores[:, first::2].min()
    absent = torch.ones(2, 9)
    absent[:, first + 4] = 0.0  # the double has left
    assert (score("redundancy", case, has_class_token, absent)[:, first + 1 :: 2].argmin(dim=1) != 1).any()


def test_equal_scores_have_a_gradient() -> None:
    case = make(queries=9, keys=9)
    silent = replace(case, right=torch.zeros_like(case.right).requires_grad_())
    score("redundancy", silent).sum().backward()
    assert silent.right.grad is not None
    assert silent.right.grad.isfinite().all()


@pytest.mark.parametrize("scorer", ["attention", "attention-value"])
def test_a_sample_without_tokens_passes_finite_gradients(scorer: Score) -> None:
    query, key, value = (torch.randn(2, 2, 6, 4, requires_grad=True) for _ in range(3))
    mask = FactoredMask(torch.randn(2, 1, 6, 3), torch.randn(2, 1, 6, 3))
    present = torch.tensor([[True] * 6, [False] * 6])
    layer = AttentionInputs(query, key, value, mask, "add", 0.5, present)
    SCORERS[scorer](layer, has_class_token=False)[0].sum().backward()
    for each in (query, key, value) if scorer == "attention-value" else (query, key):
        assert each.grad is not None and each.grad.isfinite().all()
        assert each.grad[0].any()


def test_masks_near_one_are_ranked_in_full_precision() -> None:
    left, right = (torch.ones(1, 1, 64, 2, dtype=torch.bfloat16) for _ in range(2))
    right[..., 1] = 1e-4 * torch.arange(64)
    query = torch.randn(1, 1, 64, 4, dtype=torch.bfloat16)
    layer = AttentionInputs(query, query, query, FactoredMask(left, right), "mul", 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        scores = mask_importance(layer, has_class_token=False)
    assert scores[0].argsort().tolist() == sorted(range(64), key=lambda key: right[0, 0, key, 1].item())
    assert len(scores.unique()) == len(right[..., 1].unique())


def test_the_mask_has_a_say_in_what_is_redundant() -> None:
    case = make(queries=9, keys=9)
    silent = replace(case, right=torch.zeros_like(case.right))
    assert not torch.equal(score("redundancy", case), score("redundancy", silent))


def test_without_a_class_token_the_mean_query_asks() -> None:
    case = make(queries=6, keys=6)
    asked = make(queries=6, keys=6)
    for name in ("query", "left"):
        tokens = getattr(case, name)
        getattr(asked, name).copy_(tokens.mean(2, keepdim=True).expand_as(tokens))
    torch.testing.assert_close(score("attention", case, has_class_token=False), score("attention", asked))


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("has_class_token", [True, False])
def test_tokens_that_have_left_have_no_say(scorer: Score, has_class_token: bool) -> None:
    whole, few = make(queries=6, keys=6), make(queries=6, keys=6)
    present = torch.tensor([[1, 1, 0, 1, 0, 0]] * 2, dtype=torch.bool)
    for name in ("query", "key", "value", "left", "right"):
        tokens = getattr(few, name)
        tokens[:, :, ~present[0]] = torch.randn_like(tokens[:, :, ~present[0]])
    before, after = (score(scorer, case, has_class_token, present)[present] for case in (whole, few))
    torch.testing.assert_close(before, after)


@settings(derandomize=True, max_examples=80)
@given(
    batch=st.integers(1, 4),
    patches=st.integers(1, 12),
    prefix=st.integers(0, 2),
    keep=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**20),
)
def test_decisions_keep_the_share_of_those_still_there(
    batch: int, patches: int, prefix: int, keep: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = batch * patches
    before = None
    for _ in range(3):
        scores = torch.randn(batch, prefix + patches, generator=generator)
        decisions = decide(scores, keep, prefix, before)
        assert set(decisions.unique().tolist()) <= {0.0, 1.0}
        assert decisions[:, :prefix].all()
        if before is not None:
            assert not decisions[before == 0].any()
        there = torch.ones(batch, patches, dtype=torch.bool) if before is None else before[:, prefix:] > 0
        standing = torch.stack([standardised(*row) for row in zip(scores[:, prefix:], there, strict=True)])
        lowest = standing[decisions[:, prefix:] > 0].min()
        least = max(1, math.ceil(keep * left - 1e-6))
        left = int(decisions[:, prefix:].sum())
        assert left >= least > (standing > lowest + 1e-5).sum()  # more stay only where scores are equal
        assert (decisions[:, prefix:] > 0)[standing > lowest + 1e-5].all()
        before = decisions


def standardised(scores: Tensor, there: Tensor) -> Tensor:
    """Scores ``(N,)`` in standard deviations from the mean of those that are there; the others far below."""
    among = scores[there] - scores[there].mean()
    return torch.full_like(scores, -1e3).masked_scatter(there, among / (among.square().mean() + 1e-4).sqrt())


def test_how_high_a_samples_scores_are_as_a_whole_decides_nothing() -> None:
    scores = torch.randn(3, 12)
    decisions = decide(scores, 0.5, 1)
    shifted = scores * torch.tensor([[1.0], [3.0], [0.5]]) + torch.tensor([[0.0], [9.0], [-4.0]])
    assert torch.equal(decide(shifted, 0.5, 1), decisions)


def test_for_one_sample_the_decisions_are_the_selection() -> None:
    scores = torch.randn(1, 11)
    kept = select(scores, 0.4, "drop", 1).kept
    assert decide(scores, 0.4, 1).nonzero()[:, 1].tolist() == kept[0].tolist()


def test_equal_scores_all_stay_and_have_finite_gradients() -> None:
    scores = torch.zeros(2, 7, requires_grad=True)
    decisions = decide(scores, 0.5, 1)
    decisions.sum().backward()
    assert decisions.all()
    assert scores.grad is not None and scores.grad.isfinite().all()


def test_the_gradient_of_a_decision_is_that_of_a_sigmoid_around_the_threshold() -> None:
    scores = torch.tensor([[9.0, 1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    (mine,) = torch.autograd.grad(decide(scores, 0.5, 1)[0, 2], scores)
    known = (scores[:, 1:] - scores[:, 1:].mean()) / (scores[:, 1:].var(correction=0) + 1e-4).sqrt()
    (expected,) = torch.autograd.grad((known[0, 1] - known[0, 2].detach()).sigmoid(), scores)  # 3.0 is the last to stay
    torch.testing.assert_close(mine, expected)
    assert mine[0, 2] > 0
    torch.testing.assert_close(mine.sum(), torch.tensor(0.0))  # a higher level of all is no better


@each_op
@pytest.mark.parametrize("backend", ["eager", "sdpa", "chunked"])
def test_attention_among_what_stays_is_attention_with_the_others_forbidden(op: Op, backend: str) -> None:
    case = make(op=op, queries=6, keys=6)
    kept = torch.tensor([[1.0, 0, 1, 1, 0, 1], [1, 1, 0, 0, 0, 1]], dtype=case.query.dtype, requires_grad=True)
    value = case.value.clone().requires_grad_()
    mask = FactoredMask(case.left, case.right)
    seen = kept[:, None, None, :] > 0
    attention = partial(lam_attention, op=op, scale=0.5, backend=backend)
    out = attend_to_kept(attention, kept, case.query, case.key, value, mask)
    among = attention(case.query, case.key, value, mask, allowed=seen)
    torch.testing.assert_close(out, among)
    cotangent = torch.randn_like(out)
    mine, of_values = torch.autograd.grad(out, (kept, value), cotangent)
    weights = attention_weights(
        case.query, case.key, mask, op=op, allowed=None, bias=None, is_causal=False, scale=0.5
    )  # fmt: skip
    changes = value.unsqueeze(2) - out.unsqueeze(3)  # (B, H, Nq, Nk, dv)
    torch.testing.assert_close(mine, torch.einsum("bhqk,bhqkd,bhqd->bk", weights, changes, cotangent))
    torch.testing.assert_close(of_values, torch.autograd.grad(among, value, cotangent)[0])
    first = torch.tensor([True] * 5 + [False])
    both = attention(case.query, case.key, value, mask, allowed=seen & first)
    torch.testing.assert_close(attend_to_kept(attention, kept, case.query, case.key, value, mask, allowed=first), both)


def test_a_configuration_survives_as_plain_values() -> None:
    config = PruneConfig(0.6, (1, 3), "attention", "merge", "top-k")
    assert PruneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match="PruneConfig has no field 'kept'; did you mean 'keep'"):
        PruneConfig.from_dict({"kept": 0.5})
    with pytest.raises(ConfigError, match="PruneConfig cannot be made of .*at"):
        PruneConfig.from_dict({"keep": 0.5})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": 0.0}, r"keep=0\.0: .* above 0 and at most 1"),
        ({"keep": 1.2}, r"keep=1\.2"),
        ({"at": ()}, r"at=\(\): name at least one layer"),
        ({"at": (3, 1)}, r"at=\(3, 1\): .* ascending"),
        ({"at": (1, 1)}, r"at=\(1, 1\)"),
        ({"at": (-1, 1)}, r"at=\(-1, 1\): .* from 0"),
        ({"score": "norm"}, r"score='norm': it must be one of 'mask', 'attention', 'attention-value'"),
        ({"rest": "average"}, r"rest='average': it must be one of 'drop', 'merge'"),
        ({"training": "soft"}, r"training='soft': it must be one of 'straight-through', 'top-k'"),
    ],
)
def test_values_that_mean_nothing_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PruneConfig(**{"keep": 0.5, "at": (1, 2), **fields})
