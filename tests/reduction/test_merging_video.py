"""What merge_tokens promises of models of videos: frames and streams mix only where they may, and padding never."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import lamzoo
from lamzoo import LamConfig, TokenReduction, merge_tokens, remove_reduction
from lamzoo.errors import ConfigError
from lamzoo.models.clip4clip.model import clip4clip
from lamzoo.reduction.frames import merge_frames

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
    merge_tokens(model, target, frames=0.7)
    assert 0.9 * target < lamzoo.profile(model).gmacs <= target
    assert model.token_reduction.keep < 1
    assert TokenReduction.from_dict(model.token_reduction.to_dict()) == model.token_reduction


def test_wrong_frames_are_named() -> None:
    model = retriever()
    with pytest.raises(ConfigError, match=r"frames=0: the share of frames to keep must be above 0"):
        merge_tokens(model, keep=1, frames=0)
    with pytest.raises(ConfigError, match=r"frames=0.5: open_clip.transformer.VisionTransformer has no frames"):
        merge_tokens(model.clip.visual, keep=1, frames=0.5)
    with pytest.raises(ConfigError, match=r"frames=0.5 is a setting of merging"):
        TokenReduction(0.5, "prune", (0,), frames=0.5)
