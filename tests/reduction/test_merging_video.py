"""What merge_tokens promises of models of videos: frames and streams mix only where they may, and padding never."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import lamzoo
from lamzoo import LamConfig, TokenReduction, merge_tokens, remove_reduction
from lamzoo.errors import ConfigError, UnsupportedHostError
from lamzoo.models.clip4clip import clip4clip
from lamzoo.models.describer.encoder import StreamBatch
from lamzoo.models.describer.model import describer
from lamzoo.reduction.frames import merge_frames
from lamzoo.reduction.matching import Part, match_padded

TOWERS: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 16, "patch_size": 4, "width": 32, "head_width": 16, "layers": 3},
    "text_cfg": {"context_length": 10, "vocab_size": 600, "width": 32, "heads": 2, "layers": 1},
}
FRAMES = 9


def retriever(places: tuple[str, ...] = (), **kwargs: Any) -> Any:
    torch.manual_seed(0)
    config = {"clip": TOWERS, "max_frames": FRAMES, "head_layers": 1, "lam_in": places or None}
    lam = LamConfig(rank=3, init="paper") if places else None
    return clip4clip(config, lam=lam, **kwargs).eval()


def videos() -> tuple[Tensor, Tensor]:
    frames = torch.randn(3, FRAMES, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, FRAMES, dtype=torch.bool)
    mask[1, 5:] = False
    mask[2, 1:] = False
    return frames, mask


each_place = pytest.mark.parametrize("places", [(), ("head",), ("vision",), ("text", "vision")], ids=str)


@each_place
def test_keeping_all_patches_and_frames_changes_nothing(places: tuple[str, ...]) -> None:
    model, (frames, mask) = retriever(places), videos()
    before = model.encode_video(frames, mask)
    assert_close(merge_tokens(model, keep=1).encode_video(frames, mask), before)
    remove_reduction(merge_tokens(model, keep=0.5, frames=0.5))
    assert torch.equal(model.encode_video(frames, mask), before)


@each_place
def test_a_video_is_merged_as_if_it_were_alone_and_without_padding(places: tuple[str, ...]) -> None:
    model, (frames, mask) = merge_tokens(retriever(places), keep=0.5, frames=0.6), videos()
    together = model.encode_video(frames, mask)
    frames[~mask] = 100.0
    assert torch.equal(model.encode_video(frames, mask), together)
    for video, seen, expected in zip(frames, mask, together, strict=True):
        assert_close(model.encode_video(video[seen].unsqueeze(0))[0], expected)


def test_a_video_without_frames_has_no_embedding() -> None:
    frames, mask = videos()
    mask[2] = False
    merged = merge_tokens(retriever(), frames=0.5)
    assert not merged.encode_frames(frames, mask)[2].any()


def test_patches_merge_within_their_frame() -> None:
    model, (frames, _) = merge_tokens(retriever(), keep=0.4), videos()
    before = model.encode_frames(frames)
    frames[:, 3] += 1.0
    changed = (model.encode_frames(frames) != before).any(dim=-1)
    assert changed[:, 3].all()
    assert changed.sum() == 3


def test_frames_merge_within_their_video_into_their_mean() -> None:
    frames, _ = videos()
    few, token_map = merge_frames(frames, 0.4)
    assert few.shape == (3, 4, 3, 16, 16)
    assert token_map is not None
    assert token_map.into is not None
    for video, into, merged in zip(frames, token_map.into, few, strict=True):
        for place, frame in enumerate(merged):
            assert_close(frame, video[into == place].mean(dim=0))
    model = merge_tokens(retriever(), keep=1, frames=0.4)
    encoded = []
    model.clip.visual.conv1.register_forward_hook(lambda _, args, out: encoded.append(len(out)))
    assert_close(model.encode_frames(frames), token_map.spread(remove_reduction(retriever()).encode_frames(few)))
    assert encoded == [3 * 4]


def test_equal_frames_merge_without_loss() -> None:
    """Also three times in a row, of which one round of matching could only merge two."""
    model, (frames, _) = retriever(), videos()
    frames = frames[:, ::3].repeat_interleave(3, dim=1)
    before = model.encode_video(frames)
    assert_close(merge_tokens(model, keep=1, frames=1 / 3).encode_video(frames), before)
    assert merge_frames(frames, 1)[1] is None


def test_frames_count_towards_the_budget_and_are_saved() -> None:
    model = retriever(("head",))
    target = 0.5 * lamzoo.profile(model).gmacs
    merge_tokens(model, target_gmacs=target, frames=0.7)
    assert 0.9 * target < lamzoo.profile(model).gmacs <= target
    assert model.token_reduction.keep < 1
    assert TokenReduction.from_dict(model.token_reduction.to_dict()) == model.token_reduction


def test_wrong_frames_are_named() -> None:
    model = retriever()
    with pytest.raises(ConfigError, match=r"frames=0: the share of frames to keep must be a number above 0"):
        merge_tokens(model, keep=1, frames=0)
    with pytest.raises(ConfigError, match=r"frames=0.5: open_clip.transformer.VisionTransformer has no frames"):
        merge_tokens(model.clip.visual, keep=1, frames=0.5)
    with pytest.raises(ConfigError, match=r"frames=0.5 is a setting of merging"):
        TokenReduction(0.5, "prune", (0,), frames=0.5)


SIZES = {"video": (10, 12), "audio": (20, 6)}  # features and their width
CONFIGS: list[LamConfig | None] = [None] + [
    LamConfig(layers=layers, op=op, rank=3, init="paper") for layers in ("multi", "single") for op in ("mul", "add")
]
each_config = pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda config: "plain" if config is None else f"{config.layers}-{config.op}"
)


def writer(config: LamConfig | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "features": {name: width for name, (_, width) in SIZES.items()}, "rates": {"audio": 50.0}, "seconds": 0.4,
        "width": 16, "heads": 2, "hidden": 32, "encoder_layers": 3, "text_layers": 1, "decoder_layers": 1,
        "vocabulary": ["bin", "blue"], "context_length": 5, "align": True,
    }  # fmt: skip
    return describer({**sizes, **options}, lam=config).eval()


def clips(padding: int = 4) -> dict[str, StreamBatch]:
    """Three clips: one whole, one whose last features are padding, and one without audio."""
    generator, found = torch.Generator().manual_seed(2), {}
    for name, (count, width) in SIZES.items():
        mask = torch.ones(3, count, dtype=torch.bool)
        mask[1, count - padding :] = False
        mask[2] = name == "video"
        times = torch.arange(count).expand(3, -1) * 0.4 / count
        found[name] = StreamBatch(torch.randn(3, count, width, generator=generator), times, mask)
    return found


TEXT = torch.tensor([[1, 3, 4]]).expand(3, -1)


@each_config
def test_keeping_all_tokens_of_streams_changes_nothing(config: LamConfig | None) -> None:
    model, streams = writer(config), clips()
    before, keys = model(streams, TEXT), model.state_dict().keys()
    after = merge_tokens(model, keep=1)(streams, TEXT)
    assert_close(after.logits, before.logits)
    assert_close(after.words[after.joint.mask], before.words[before.joint.mask])
    merged = merge_tokens(model, keep=0.5)(streams, TEXT)
    assert merged.joint.tokens.shape == before.joint.tokens.shape
    assert not torch.allclose(merged.logits, before.logits)
    assert model.state_dict().keys() == keys
    assert torch.equal(remove_reduction(model)(streams, TEXT).logits, before.logits)


@each_config
def test_a_clip_is_merged_as_if_it_were_alone_and_without_padding(config: LamConfig | None) -> None:
    model, streams = merge_tokens(writer(config), keep=0.5), clips()
    together = model(streams, TEXT)
    for stream in streams.values():
        stream.features[~stream.mask] = 100.0
    assert torch.equal(model(streams, TEXT).logits, together.logits)
    for sample in range(3):
        alone = {
            name: StreamBatch(*(part[sample : sample + 1, stream.mask[sample]] for part in stream))
            for name, stream in streams.items()
            if stream.mask[sample].any()
        }
        found = model(alone, TEXT[:1])
        assert_close(found.logits[0], together.logits[sample])
        assert_close(found.words[0], together.words[sample, together.joint.mask[sample]])


def padded_clips(lengths: list[tuple[int, int]], padding: int) -> dict[str, StreamBatch]:
    """Clips with these numbers of features of video and audio, and padding beyond the longest."""
    generator, found = torch.Generator().manual_seed(3), {}
    for (name, (_, width)), counts in zip(SIZES.items(), zip(*lengths, strict=True), strict=True):
        places = torch.arange(max(counts) + padding).expand(len(counts), -1)
        features = torch.randn(*places.shape, width, generator=generator)
        found[name] = StreamBatch(features, 0.01 * places, places < torch.tensor(counts).unsqueeze(1))
    return found


@settings(derandomize=True, max_examples=40, deadline=None)
@example([(9, 19), (10, 20)], 0, 4, 600, CONFIGS[0])
@example([(9, 19), (10, 20)], 0, 4, 600, CONFIGS[1])
@example([(9, 50), (19, 9)], 1, 6, 500, CONFIGS[0])
@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=2, max_size=4),
    padding=st.integers(0, 9),
    layers=st.integers(1, 6),
    thousandths=st.integers(1, 999),
    config=st.sampled_from(CONFIGS),
)
def test_clips_of_any_lengths_merge_as_if_alone_to_the_share(
    lengths: list[tuple[int, int]], padding: int, layers: int, thousandths: int, config: LamConfig | None
) -> None:
    model = merge_tokens(writer(config, encoder_layers=layers), keep=thousandths / 1000)
    least = max(Fraction(thousandths, 1000), Fraction(1, layers + 1))
    streams = padded_clips(lengths, padding)
    together = model.encode(streams)
    for sample, counts in enumerate(lengths):
        alone = {
            name: StreamBatch(*(part[sample : sample + 1, :count] for part in stream))
            for (name, stream), count in zip(streams.items(), counts, strict=True)
        }
        joint = model.encode(alone)
        assert_close(together.tokens[sample, together.mask[sample]], joint.tokens[0], rtol=1e-5, atol=1e-5)
        for (start, end), count in zip(joint.spans.values(), counts, strict=True):
            assert end - start == count
            assert len(joint.tokens[0, start:end].unique(dim=0)) == math.ceil(count * least)


def test_a_stream_of_one_token_merges_nothing() -> None:
    model, streams = merge_tokens(writer(), keep=0.5), clips()
    one = StreamBatch(*(part[:, :1] for part in streams["video"]))
    joint = model.encode({**streams, "video": one})
    assert len(joint.tokens[0].unique(dim=0)) == 1 + 1 + 10  # 3, 3 and 4 of 20


def test_later_layers_of_the_encoder_have_fewer_keys_and_queries_fewer_still() -> None:
    model = merge_tokens(writer(CONFIGS[1]), keep=0.4)
    with lamzoo.capture_masks(model) as masks:
        model(clips(), TEXT)
    # 2 of 10 tokens of video and 4 of 20 of audio in each layer; the class token stays
    assert [tuple(record.attention.shape[2:]) for record in masks.values()] == [(25, 31), (19, 25), (13, 19)]


@each_config
def test_equal_neighbours_of_a_stream_merge_without_loss(config: LamConfig | None) -> None:
    model = writer(config)
    streams = {
        name: StreamBatch(*(part[:, ::2].repeat_interleave(2, dim=1) for part in stream))
        for name, stream in clips().items()
    }
    before = model(streams, TEXT)
    assert_close(merge_tokens(model, keep=0.5, at=(0,))(streams, TEXT).logits, before.logits)


def test_the_context_and_the_class_token_never_merge() -> None:
    model = merge_tokens(writer(context_tokens=4), keep=0.25, at=(0,))
    joint = model.encode(clips(), torch.tensor([[3, 4, 0, 0]] * 3))
    distinct = [len(sample[seen].unique(dim=0)) for sample, seen in zip(joint.tokens, joint.mask, strict=True)]
    assert distinct == [1 + 5 + 10 + 2, 1 + 3 + 8 + 2, 1 + 5 + 0 + 2]


@each_config
def test_an_encoder_that_lost_layers_gives_every_token_back(config: LamConfig | None) -> None:
    model, streams = merge_tokens(writer(config), keep=0.4), clips()
    model.encoder.layers = model.encoder.layers[:2]
    shorter = merge_tokens(writer(config, encoder_layers=2), keep=0.6)  # 20 % of the tokens in each of two layers
    shorter.load_state_dict(model.state_dict())
    joint, expected = model.encode(streams), shorter.encode(streams)
    assert_close(joint.tokens[joint.mask], expected.tokens[expected.mask])
    assert model.encoder.layers[0].attn.lam.shared.current.token_map is None  # the pass has ended


def test_an_encoder_that_lost_its_first_layers_mixes_no_streams() -> None:
    model = merge_tokens(writer(), keep=0.25)
    model.encoder.layers = model.encoder.layers[1:]
    seen = []
    for layer in model.encoder.layers:
        layer.attn.register_forward_hook(lambda attn, *_: seen.append(attn.lam.shared.current.merge.token_map))
    model.encode(clips(padding=0))
    video, lengths = torch.zeros(31, dtype=torch.bool), []
    video[1:11] = True
    for token_map in seen:  # 2 and 3 of 10 tokens of video, and 5 of 20 of audio in each of two layers
        streams = video[token_map.kept]
        assert torch.equal(streams.gather(1, token_map.into)[:2], video.expand(2, -1))
        video = streams[0]
        lengths.append(int(video.sum()))
    assert lengths == [8, 5]


def test_gradients_reach_the_features_through_merged_tokens() -> None:
    model, streams = merge_tokens(writer(CONFIGS[1]), keep=0.5).train(), clips()
    features = streams["audio"].features.requires_grad_()
    model(streams, TEXT).logits.sum().backward()
    assert features.grad is not None
    assert features.grad[0].abs().sum(dim=-1).gt(0).all()


def test_what_a_joint_encoder_cannot_do_is_named() -> None:
    model = writer()
    with pytest.raises(ConfigError, match=r"at=\(3,\): tokens can merge in layers 0 to 2 of encoder.layers"):
        merge_tokens(model, keep=0.5, at=(3,))
    with pytest.raises(ConfigError, match=r"r=2: the number of patches of this model is not known; give keep"):
        merge_tokens(model, r=2)
    with pytest.raises(ConfigError, match=r"frames=0.5: the frames of this model are the tokens of a stream"):
        merge_tokens(model, keep=0.5, frames=0.5)
    with pytest.raises(UnsupportedHostError, match=r"encoder.layers: its masks have keys='position'"):
        merge_tokens(writer(LamConfig(keys="position")), keep=0.5)


def test_a_budget_for_an_encoder_is_used() -> None:
    model = merge_tokens(writer(), target_gmacs=0.5, count_gmacs=lambda model: model.token_reduction.keep)
    assert model.token_reduction == TokenReduction(0.5)
    assert lamzoo.profile(model.to("meta")).gmacs < lamzoo.profile(writer()).gmacs


@settings(derandomize=True, max_examples=40)
@given(
    lengths=st.lists(st.integers(2, 12), min_size=1, max_size=3), share=st.floats(0, 0.5), seed=st.integers(0, 2**20)
)
def test_streams_and_padding_never_mix(lengths: list[int], share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    total = 1 + sum(lengths)
    tokens = torch.randn(2, total, 4, generator=generator)
    present, owner = torch.ones(2, total, dtype=torch.bool), torch.zeros(total)
    parts, start, left = [], 1, torch.ones(2, dtype=torch.int64)
    for number, length in enumerate(lengths, 1):
        real = torch.randint(0, length + 1, (2,), generator=generator)
        present[:, start : start + length] = torch.arange(length) < real.unsqueeze(1)
        owner[start : start + length] = number
        gone = int(share * length)
        fewest, most = (real - (length - gone)).clamp_min(0), torch.where(real > 1, (real + 1) // 2, 0)
        due = fewest + (torch.rand(2, generator=generator) * (most - fewest + 1)).long()
        parts.append(Part(start, length, gone, due))
        left += real - due
        start += length
    sizes = torch.randint(1, 5, (2, total), generator=generator) * present.float()
    token_map, few = match_padded(tokens, parts, sizes)
    assert token_map.into is not None
    assert few.shape[1] == total - sum(part.gone for part in parts)
    kept = token_map.kept
    assert torch.equal((few > 0).sum(dim=1), left)
    assert_close(few.sum(dim=1), sizes.sum(dim=1))
    mean = token_map(tokens)
    for sample in range(2):
        for place, old in enumerate(kept[sample]):
            members = (token_map.into[sample] == place) & present[sample]
            if few[sample, place] > 0:
                assert owner[members].eq(owner[old]).all()
                weights = sizes[sample, members] / sizes[sample, members].sum()
                assert_close(mean[sample, place], weights @ tokens[sample, members])
            else:
                assert not members.any()
