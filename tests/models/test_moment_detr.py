"""Moment-DETR and QD-DETR: what they compute, at any length, and what masks change in them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.ops import generalized_box_iou

import lamzoo
from lamzoo import LamConfig
from lamzoo.errors import ConfigError
from lamzoo.layers.attention import DENSE_TOKENS
from lamzoo.models.moment_detr.layers import sine_positions
from lamzoo.models.moment_detr.model import MomentOutput
from lamzoo.models.moment_detr.qd_detr import peaks, propose
from lamzoo.models.moment_detr.spans import generalized_span_iou, span_iou, to_centres, to_edges
from lamzoo.profiling.memory import peak_growth

PLACES = {"moment_detr_micro": ("encoder", "decoder"), "qd_detr_micro": ("cross", "encoder", "decoder")}
each_model = pytest.mark.parametrize("name", PLACES)


def model(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return lamzoo.create_model(name, **{"video_dim": 66, "text_dim": 64, **options}).eval()


def batch(clips: int = 9, words: int = 5, size: int = 2, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and masks; but for the first sample, the last half of the clips and the last word are padding."""
    generator = torch.Generator().manual_seed(seed)
    video, text = (torch.randn(size, n, d, generator=generator) for n, d in ((clips, 66), (words, 64)))
    video_mask, text_mask = (torch.ones(x.shape[:2], dtype=torch.bool) for x in (video, text))
    video_mask[1:, math.ceil(clips / 2) :] = False
    text_mask[1:, max(1, words - 1) :] = False
    return video, text, video_mask, text_mask


def equal(one: MomentOutput, other: MomentOutput, mask: Tensor) -> bool:
    pairs = [(one.spans, other.spans), (one.logits, other.logits), (one.saliency[mask], other.saliency[mask])]
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("op", ["add", "mul"])
@pytest.mark.parametrize("layers", ["multi", "single"])
@pytest.mark.parametrize("clips", [1, 2, 9, 75])
@each_model
def test_a_fresh_mask_changes_no_bit(name: str, clips: int, layers: Any, op: Any) -> None:
    plain = model(name)
    masked = model(f"lam_{name}", lam=LamConfig(layers=layers, op=op, rank=3), lam_in=PLACES[name])
    masked.load_state_dict(masked.state_dict() | plain.state_dict())
    inputs = batch(clips)
    assert equal(masked(*inputs), plain(*inputs), inputs[2])


@each_model
def test_a_trained_mask_does(name: str) -> None:
    for place in PLACES[name]:
        masked = model(f"lam_{name}", lam=LamConfig(init="paper"), lam_in=[place])
        plain = model(name)
        plain.load_state_dict({key: value for key, value in masked.state_dict().items() if ".lam." not in key})
        assert not torch.allclose(masked(*batch()).spans, plain(*batch()).spans)


class Restated(nn.Module):
    """Moment-DETR once more, from its paper, with torch's own attention and everything written out for one sample."""

    def __init__(self, detr: Any) -> None:
        super().__init__()
        self.detr = detr

    def attend(self, attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention.norm(query[0] + attention.attn(query[1], key, value, need_weights=False)[0])

    def forward(self, video: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        detr, width = self.detr, self.detr.width
        clips, words = detr.video_projection(video), detr.text_projection(text)
        places = detr.position_turns * 2 * math.pi * torch.arange(1, len(clips) + 1) / (len(clips) + 1e-6)
        positions = torch.zeros(len(clips) + len(words), width)
        for wave in range(width // 2):
            angle = places / 10_000 ** (2 * wave / width)
            positions[: len(clips), 2 * wave], positions[: len(clips), 2 * wave + 1] = angle.sin(), angle.cos()
        tokens = torch.cat([clips, words])
        for layer in detr.encoder:
            placed = tokens + positions
            tokens = self.attend(layer.attention, (tokens, placed), placed, tokens)
            tokens = self.feed_forward(layer.feed_forward, tokens)
        queries, places = torch.zeros_like(detr.query_embedding.weight), detr.query_embedding.weight
        for layer in detr.decoder:
            placed = queries + places
            queries = self.attend(layer.self_attention, (queries, placed), placed, queries)
            queries = self.attend(layer.cross_attention, (queries, queries + places), tokens + positions, tokens)
            queries = self.feed_forward(layer.feed_forward, queries)
        out = detr.decoder_norm(queries)
        return detr.span_head(out).sigmoid(), detr.class_head(out), detr.saliency_head(tokens[: len(clips)])[:, 0]

    def feed_forward(self, part: Any, tokens: Tensor) -> Tensor:
        first, _, _, second, _ = part.layers
        hidden = F.relu(F.linear(tokens, first.weight, first.bias))
        return part.norm(tokens + F.linear(hidden, second.weight, second.bias))


def test_moment_detr_is_its_papers() -> None:
    detr = model("moment_detr_micro")
    video, text, video_mask, text_mask = batch()
    found = detr(video, text, video_mask, text_mask)
    for sample in range(2):
        seen, read = video[sample][video_mask[sample]], text[sample][text_mask[sample]]
        spans, logits, saliency = Restated(detr)(seen, read)
        assert_close(found.spans[sample], spans)
        assert_close(found.logits[sample], logits)
        assert_close(found.saliency[sample][video_mask[sample]], saliency)


@each_model
def test_padding_is_not_seen(name: str) -> None:
    masked = model(f"lam_{name}", lam=LamConfig(init="paper"), lam_in=PLACES[name])
    video, text, video_mask, text_mask = batch()
    found = masked(video, text, video_mask, text_mask)
    video[~video_mask], text[~text_mask] = 1e3, -1e3
    assert_close(masked(video, text, video_mask, text_mask).spans, found.spans)
    alone = masked(video[1:, video_mask[1]], text[1:, text_mask[1]])
    assert_close(alone.spans, found.spans[1:], atol=1e-5, rtol=1e-5)
    assert_close(alone.saliency, found.saliency[1:, video_mask[1]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("clips", [1, 100, DENSE_TOKENS - 5, DENSE_TOKENS + 1, 2000])
@pytest.mark.parametrize("keys", ["content", "position"])
@each_model
def test_any_length_works(name: str, keys: Any, clips: int) -> None:
    masked = model(f"lam_{name}", lam=LamConfig(keys=keys, init="paper"), lam_in=PLACES[name])
    found = masked(*batch(clips, size=1))
    assert found.saliency.shape == (1, clips)
    assert all(x.isfinite().all() for x in (found.spans, found.logits, found.saliency))


@each_model
def test_fused_and_written_out_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    masked, inputs = model(f"lam_{name}", lam=LamConfig(init="paper"), lam_in=PLACES[name]), batch(40)
    dense = masked(*inputs)
    monkeypatch.setattr("lamzoo.layers.attention.DENSE_TOKENS", 0)
    assert_close(masked(*inputs).spans, dense.spans, atol=1e-5, rtol=1e-5)
    plain = model(name)
    fused = plain(*inputs)
    monkeypatch.undo()
    assert_close(plain(*inputs).spans, fused.spans, atol=1e-5, rtol=1e-5)


@each_model
def test_training_computes_what_evaluation_does(name: str) -> None:
    for masks in ({}, {"lam": LamConfig(init="paper"), "lam_in": PLACES[name]}):
        one, inputs = model(f"lam_{name}" if masks else name, dropout=0.0, input_dropout=0.0, **masks), batch(40)
        evaluated, trained = one(*inputs), one.train()(*inputs)
        assert_close(trained.spans, evaluated.spans, atol=1e-5, rtol=1e-5)
        assert_close(trained.saliency, evaluated.saliency, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shift", [0.0, 200.0, -200.0])
@each_model
def test_spans_are_exact_in_bfloat16_and_learn_where_they_end(name: str, shift: float) -> None:
    one = model(name).train()
    refined = one.decoder.refinement if name == "qd_detr_micro" else one.span_head
    nn.init.constant_(refined[-1].bias, shift)
    with torch.autocast("cpu", torch.bfloat16):
        found = one(*batch())
    assert found.spans.dtype == torch.float32
    assert shift or not torch.equal(found.spans, found.spans.bfloat16().float())
    (found.spans.square().sum() + found.logits.float().square().sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in one.parameters() if parameter.grad is not None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lam_moment_detr", "lam_qd_detr"])
def test_two_hours_of_video_fit_into_bounded_memory(name: str) -> None:
    masked = model(name)
    inputs = [torch.randn(1, n, d) for n, d in ((3600, masked.video_dim), (20, masked.text_dim))]

    def run() -> None:
        with torch.inference_mode():
            masked(*inputs)

    run()
    assert peak_growth(run)[1] < 200 * 2**20  # the dense mask of one layer alone would be 400 MiB


@each_model
def test_everything_is_trained(name: str) -> None:
    masked = model(f"lam_{name}", lam_in=PLACES[name]).train()
    found = masked(*batch())
    parts = [found.spans, found.logits, found.saliency, *(x for layer in found.layers for x in layer)]
    parts += [part for part in (found.unrelated, found.words, found.proposals) if part is not None]
    sum(part.square().sum() for part in parts).backward()
    assert [key for key, parameter in masked.named_parameters() if parameter.grad is None] == []
    assert len(found.layers) == 1


def test_qd_detr_scores_videos_for_the_next_samples_sentence_in_training() -> None:
    detr = model("qd_detr_micro")
    video, text, video_mask, text_mask = batch(size=3)
    assert detr(video, text, video_mask, text_mask).unrelated is None
    for module in detr.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    found = detr.train()(video, text, video_mask, text_mask)
    others = detr.eval()(video, text[[1, 2, 0]], video_mask, text_mask[[1, 2, 0]])
    assert_close(found.unrelated, others.saliency)


def test_qd_detr_scores_videos_for_the_samples_that_it_is_told() -> None:
    detr = model("qd_detr_micro", input_dropout=0.0, dropout=0.0)
    video, text, video_mask, text_mask = batch(size=3)
    rows = torch.tensor([2, 0, 0])
    found = detr.train()(video, text, video_mask, text_mask, rows)
    others = detr.eval()(video, text[rows], video_mask, text_mask[rows])
    assert_close(found.unrelated, others.saliency)


@each_model
def test_words_are_told_apart_in_training_alone(name: str) -> None:
    told = model(name, words=7)
    video, text, video_mask, text_mask = batch()
    assert told(video, text, video_mask, text_mask).words is None
    assert told.train()(video, text, video_mask, text_mask).words.shape == (*video.shape[:2], 8)
    assert model(name, words=0).train()(video, text, video_mask, text_mask).words is None


def test_windows_are_sorted_and_inside_the_video() -> None:
    spans = torch.tensor([[[0.5, 0.2], [0.1, 0.4], [0.9, 0.6]]])
    logits = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [1.0, 0.0]]])
    windows = MomentOutput(spans, logits, torch.zeros(1, 4)).windows()
    assert_close(windows[0, :, :2], torch.tensor([[0.0, 0.3], [0.6, 1.0], [0.4, 0.6]]))
    assert windows[0, :, 2].tolist() == sorted(windows[0, :, 2].tolist(), reverse=True)
    assert_close(windows[0, 0, 2], torch.tensor(2.0).sigmoid())


def test_good_windows_do_not_tie_in_half_precision() -> None:
    logits = torch.tensor([[[8.0, 0.0], [9.0, 0.0]]], dtype=torch.bfloat16)
    windows = MomentOutput(torch.tensor([[[0.2, 0.1], [0.7, 0.1]]]), logits, torch.zeros(1, 4)).windows()
    assert windows[0, 0, 2] > windows[0, 1, 2]
    assert_close(windows[0, :, 0], torch.tensor([0.65, 0.15]))


@pytest.mark.parametrize("places", [(), ("cross",), ("head",)])
def test_masks_go_where_there_is_attention(places: Any) -> None:
    with pytest.raises(ConfigError, match=r"for lamzoo\.[a-z_.]+\.MomentDetr it must name some of encoder, decoder"):
        lamzoo.create_model("lam_moment_detr_micro", lam_in=places)


def test_spans_are_boxes_one_unit_high() -> None:
    edges, others = (torch.rand(n, 2).sort(dim=-1).values for n in (5, 7))
    assert_close(to_edges(to_centres(edges)), edges)
    iou, generalized = span_iou(edges, others), generalized_span_iou(edges, others)
    for i, (start, end) in enumerate(edges.tolist()):
        for j, (other_start, other_end) in enumerate(others.tolist()):
            shared = max(0.0, min(end, other_end) - max(start, other_start))
            union = end - start + other_end - other_start - shared
            hull = max(end, other_end) - min(start, other_start)
            assert iou[i, j].item() == pytest.approx(shared / union, abs=1e-6)
            assert generalized[i, j].item() == pytest.approx(shared / union - (hull - union) / hull, abs=1e-5)
    boxes = [torch.stack([x[:, 0], x[:, 0] * 0, x[:, 1], x[:, 0] * 0 + 1], dim=1) for x in (edges, others)]
    assert_close(generalized, generalized_box_iou(*boxes))


@each_model
def test_faster_positions_tell_neighbours_among_hundreds_of_clips_apart(name: str) -> None:
    slow, fast = (sine_positions(torch.ones(1, 250, dtype=torch.bool), 64, turns) for turns in (1.0, 32.0))
    near, nearer = ((x[0, 1:] - x[0, :-1]).norm(dim=-1) for x in (fast, slow))
    assert (near > 10 * nearer).all()
    inputs = batch(40)
    one, other = (model(name, position_turns=turns)(*inputs) for turns in (1.0, 32.0))
    assert not torch.allclose(one.spans, other.spans)


def test_peaks_are_the_highest_clips_of_their_neighbourhood() -> None:
    saliency = torch.zeros(2, 30)
    saliency[0, [4, 5, 20]] = torch.tensor([3.0, 2.9, 1.0])
    saliency[1, [2, 25]] = torch.tensor([1.0, 9.0])
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1, 10:] = False  # and the highest of the second sample is padding
    found = peaks(saliency, mask, 2)
    assert found[0].tolist() == [4, 20]
    assert found[1, 0] == 2
    assert mask.gather(1, found).all()


@pytest.mark.parametrize("clips", [1, 3, 40])
def test_there_are_as_many_peaks_as_are_asked_for(clips: int) -> None:
    saliency = torch.rand(2, clips, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, clips, dtype=torch.bool)
    mask[1, 1:] = False
    found = peaks(saliency, mask, 10)
    assert found.shape == (2, 10)
    assert (found[1] == 0).all()
    assert len(found[0].unique()) == min(clips, 10)


def test_proposals_are_around_their_clips_and_inside_the_video() -> None:
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, 4:] = False
    distances = torch.tensor([0.1, 0.3]).logit().expand(2, 10, 2)
    start, end = to_edges(propose(distances, mask)).unbind(-1)
    for sample, clips in ((0, 10), (1, 4)):
        numbers = torch.arange(clips)
        assert_close(start[sample, :clips], (numbers / clips - 0.1).clamp_min(0), atol=1e-6, rtol=0.0)
        assert_close(end[sample, :clips], ((numbers + 1) / clips + 0.3).clamp_max(1), atol=1e-6, rtol=0.0)
    nothing = propose(torch.full((2, 10, 2), -1e3), mask)
    assert_close(nothing[0, :, 1], torch.full((10,), 0.1))  # a clip, where a decoder divides by the width


def test_the_decoder_may_begin_at_salient_clips() -> None:
    detr = model("qd_detr_micro", anchors="salient").train()
    inputs = batch(60)
    found = detr(*inputs)
    assert found.spans.shape == (2, 10, 2)
    parts = (found.spans, found.logits, found.saliency, found.unrelated, found.words, found.proposals)
    sum(part.sum() for part in parts).backward()
    assert all(p.grad is not None for name, p in detr.named_parameters())
    chosen = peaks(found.saliency.detach(), inputs[2], 10)
    begun = found.proposals.detach().take_along_dim(chosen.unsqueeze(-1), dim=1)
    assert_close(found.layers[0][0].detach(), begun, atol=0.1, rtol=0.0)
    assert detr.eval()(*inputs).proposals is None
    with pytest.raises(ConfigError, match="anchors is 'random'; it must be one of 'learned', 'salient'"):
        model("qd_detr_micro", anchors="random")
