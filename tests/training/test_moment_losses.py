"""The losses of Moment-DETR and QD-DETR, against their formulas written out and every assignment tried."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import lamzoo
from lamzoo.errors import DivergedError
from lamzoo.models.moment_detr.model import MomentOutput
from lamzoo.models.moment_detr.spans import generalized_span_iou, to_centres, to_edges
from lamzoo.training.moments.losses import (
    MomentTargets,
    contrast_loss,
    margin_loss,
    match,
    moment_losses,
    negative_loss,
)
from lamzoo.training.moments.recipe import MomentWeights

WEIGHTS = MomentWeights()


def centres(count: int) -> Tensor:
    return to_centres(torch.rand(count, 2).sort(dim=-1).values)


def targets(clips: int = 8) -> MomentTargets:
    mask = torch.ones(2, clips, dtype=torch.bool)
    mask[1, 5:] = False
    return MomentTargets(
        spans=(centres(1), centres(3)),
        better=torch.tensor([[0, 2], [1, 3]]),
        worse=torch.tensor([[4, 5], [0, 4]]),
        grades=torch.randint(0, 13, (2, clips)).float() * mask,
        video_mask=mask,
    )


def found(queries: int = 5, clips: int = 8, **changes: object) -> MomentOutput:
    spans = torch.stack([centres(queries), centres(queries)])
    return MomentOutput(spans, torch.randn(2, queries, 2), torch.randn(2, clips), **changes)


def cost(span: Tensor, score: Tensor, truth: Tensor) -> float:
    giou = generalized_span_iou(to_edges(span[None]), to_edges(truth[None])).item()
    return float(10 * (span - truth).abs().sum() - giou - 4 * score)


@pytest.mark.parametrize("seed", range(5))
def test_the_match_is_the_cheapest_of_all(seed: int) -> None:
    torch.manual_seed(seed)
    said, truth = found(), targets()
    scores = said.logits.softmax(dim=-1)[..., 0]
    for sample, (queries, moments) in enumerate(match(said.spans, said.logits, truth.spans, WEIGHTS)):
        spans, wanted = said.spans[sample], truth.spans[sample]

        def total(chosen: tuple[int, ...], spans: Tensor = spans, wanted: Tensor = wanted, n: int = sample) -> float:
            return sum(cost(spans[q], scores[n, q], wanted[m]) for m, q in enumerate(chosen))

        best = min(total(chosen) for chosen in permutations(range(5), len(wanted)))
        mine = tuple(queries[moments.argsort()].tolist())
        assert total(mine) == pytest.approx(best, abs=1e-5)


def test_spans_that_are_no_numbers_are_named() -> None:
    said = found()
    with pytest.raises(DivergedError, match="spans or their scores are not finite"):
        match(said.spans * torch.nan, said.logits, targets().spans, WEIGHTS)


def test_the_losses_of_spans_and_classes_are_those_written_out() -> None:
    said, truth = found(), targets()
    losses = moment_losses(said, truth, WEIGHTS)
    classes, distances, gious = torch.ones(2, 5, dtype=torch.int64), [], []
    for sample, (queries, moments) in enumerate(match(said.spans, said.logits, truth.spans, WEIGHTS)):
        classes[sample, queries] = 0
        for query, moment in zip(queries.tolist(), moments.tolist(), strict=True):
            span, wanted = said.spans[sample, query], truth.spans[sample][moment]
            distances += (span - wanted).abs().tolist()
            gious.append(generalized_span_iou(to_edges(span[None]), to_edges(wanted[None])).item())
    chances = said.logits.log_softmax(dim=-1).gather(-1, classes.unsqueeze(-1)).squeeze(-1)
    assert_close(losses["span"], 10 * torch.tensor(distances).mean())
    assert_close(losses["giou"], 1 - torch.tensor(gious).mean())
    assert_close(losses["label"], -4 * (chances * torch.where(classes == 0, 1.0, 0.1)).mean())
    assert set(losses) == {"span", "giou", "label", "saliency"}


def test_every_decoder_layer_learns() -> None:
    said, other, truth = found(), found(), targets()
    once, twice = (moment_losses(x, truth, WEIGHTS) for x in (said, other))
    both = moment_losses(replace(said, layers=((other.spans, other.logits),)), truth, WEIGHTS)
    for key in ("span", "giou", "label"):
        assert_close(both[key], once[key] + twice[key])
    assert_close(both["saliency"], once["saliency"])


def test_the_saliency_losses_are_those_written_out() -> None:
    said, truth = found(unrelated=torch.randn(2, 8)), targets()
    losses = moment_losses(said, truth, WEIGHTS)
    pairs = [
        max(0.0, 0.2 + float(said.saliency[b, worse] - said.saliency[b, better]))
        for b in range(2)
        for better, worse in zip(truth.better[b], truth.worse[b], strict=True)
    ]
    assert losses["saliency"].item() == pytest.approx(2 * sum(pairs) / 4, abs=1e-6)
    assert said.unrelated is not None
    lost = -(1 - said.unrelated.sigmoid()).log() * truth.video_mask
    assert_close(losses["negative"], lost.sum(dim=1).mean())
    expected = 0.0
    for sample, mask in enumerate(truth.video_mask):
        scores = torch.cat([said.saliency[sample][mask], said.unrelated[sample][mask]]) / 0.5
        grades = torch.cat([truth.grades[sample][mask], torch.zeros(int(mask.sum()))])
        for grade in range(1, 12):
            good = grades >= grade
            if good.any():
                expected -= scores.log_softmax(dim=0)[good].mean().item() / 12 / 2
    assert losses["contrast"].item() == pytest.approx(expected, abs=1e-5)


def test_the_word_loss_is_the_cross_entropy_of_the_clips_that_are_there() -> None:
    said, truth = replace(found(), words=torch.randn(2, 8, 5)), targets()
    assert "words" not in moment_losses(said, truth, WEIGHTS)
    words = torch.randint(0, 5, (2, 8)).masked_fill(~truth.video_mask, -100)
    loss = moment_losses(said, replace(truth, words=words), WEIGHTS)["words"]
    assert said.words is not None
    chances = said.words.log_softmax(dim=-1)
    wanted = [-chances[b, n, words[b, n]] for b, n in truth.video_mask.nonzero().tolist()]
    assert_close(loss, torch.stack(wanted).mean())


def test_clips_propose_the_moments_that_they_lie_in() -> None:
    clips = torch.stack([centres(8), centres(8)])
    spans = torch.tensor([[0.3, 0.2], [0.4, 0.3]]), torch.tensor([[0.5, 0.1]])
    truth = replace(targets(), spans=spans)
    assert "proposal" not in moment_losses(found(), truth, WEIGHTS)
    loss = moment_losses(found(proposals=clips), truth, WEIGHTS)["proposal"]
    # Sample, clip, moment: middles of the first sample's 8 clips are odd sixteenths, of the other's 5 odd tenths.
    inside = [(0, 2, 0), (0, 2, 1), (0, 3, 1), (1, 2, 0)]
    pairs = [(clips[sample, clip], spans[sample][moment]) for sample, clip, moment in inside]
    distances = [(mine - wanted).abs().mean() for mine, wanted in pairs]
    gious = [generalized_span_iou(to_edges(mine[None]), to_edges(wanted[None])).squeeze() for mine, wanted in pairs]
    assert_close(loss, 10 * torch.stack(distances).mean() + 1 - torch.stack(gious).mean())


def test_clips_that_are_not_there_say_nothing() -> None:
    said, truth = found(unrelated=torch.randn(2, 8)), targets()
    assert said.unrelated is not None
    other = replace(said, saliency=said.saliency.clone(), unrelated=said.unrelated.clone())
    for scores in (other.saliency, other.unrelated):
        assert scores is not None
        scores[~truth.video_mask] = 50.0
    for mine, theirs in zip(
        moment_losses(said, truth, WEIGHTS).values(), moment_losses(other, truth, WEIGHTS).values(), strict=True
    ):
        assert_close(mine, theirs)


def test_the_right_answer_costs_least() -> None:
    truth = targets()
    spans = torch.stack([torch.cat([of_sample, centres(5 - len(of_sample))]) for of_sample in truth.spans])
    logits = torch.full((2, 5, 2), 0.0)
    for sample, of_sample in enumerate(truth.spans):
        logits[sample, :, 1] = 20.0
        logits[sample, : len(of_sample), 1] = -20.0
    saliency = truth.grades.clone()
    saliency.scatter_(1, truth.better, 9.0).scatter_(1, truth.worse, -9.0)
    losses = moment_losses(MomentOutput(spans, logits, saliency), truth, WEIGHTS)
    for value in losses.values():
        assert value.item() == pytest.approx(0.0, abs=1e-5)


def test_a_video_without_moments_is_no_obstacle() -> None:
    none = replace(targets(), spans=(torch.zeros(0, 2), torch.zeros(0, 2)))
    losses = moment_losses(found(), none, WEIGHTS)
    assert losses["span"].item() == losses["giou"].item() == 0.0
    assert losses["label"].item() > 0


@pytest.mark.parametrize("name", ["lam_moment_detr_micro", "lam_qd_detr_micro"])
def test_a_few_steps_lower_the_loss(name: str) -> None:
    torch.manual_seed(0)
    model, truth = lamzoo.create_model(name, video_dim=66, text_dim=64).train(), targets()
    video, text = torch.randn(2, 8, 66), torch.randn(2, 4, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = []
    for _ in range(25):
        loss = sum(moment_losses(model(video, text, truth.video_mask), truth, WEIGHTS).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert sum(history[-5:]) < 0.7 * sum(history[:5])


def test_large_saliencies_give_finite_losses() -> None:
    truth = targets()
    large = torch.full((2, 8), 80.0)
    assert negative_loss(large, truth.video_mask).isfinite()
    assert contrast_loss(large, -large, truth, 0.5).isfinite()
    assert margin_loss(large, truth, 0.2).item() == pytest.approx(0.4, abs=1e-4)
