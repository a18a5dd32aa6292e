"""A clip's output is its own: the same alone and in any batch, with masks whose tables count positions too."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import lamzoo
from lamzoo import LamConfig
from lamzoo.models.clip4clip.heads import SequentialHead, TightHead
from lamzoo.models.describer.encoder import StreamBatch

PLACES = {"lam_moment_detr_micro": ("encoder", "decoder"), "lam_qd_detr_micro": ("cross", "encoder", "decoder")}
ROWS = 9  # of a table; some clips have fewer tokens, others more
MASKS = {
    "paper": LamConfig(keys="position", op="mul", heads="shared", rank=3, init="paper", max_length=ROWS),
    "single": LamConfig(layers="single", keys="position", op="mul", sign="positive", rank=3, init="paper",
                        max_length=ROWS),
    "content": LamConfig(rank=3, init="paper"),
}  # fmt: skip
masks = pytest.mark.parametrize("lam", MASKS.values(), ids=list(MASKS))
lengths = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 5)), min_size=2, max_size=4)
few = settings(max_examples=3)


def padded(counts: list[int], width: int) -> tuple[Tensor, Tensor]:
    """Rows of random features, of which the first ones are there, and their mask."""
    mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    return torch.randn(*mask.shape, width), mask


@masks
@pytest.mark.parametrize(("name", "options"), [
    ("lam_moment_detr_micro", {}), ("lam_qd_detr_micro", {}), ("lam_qd_detr_micro", {"anchors": "salient"}),
])  # fmt: skip
@few
@given(sizes=lengths)
def test_moments_of_a_video(name: str, options: dict[str, Any], lam: LamConfig, sizes: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    sized = {"video_dim": 6, "text_dim": 4, "width": 16, "heads": 2, "hidden": 16, "queries": 3, **options}
    model: Any = lamzoo.create_model(name, lam=lam, lam_in=PLACES[name], **sized).eval()
    clips, words = zip(*sizes, strict=True)
    (video, video_mask), (text, text_mask) = padded(list(clips), 6), padded(list(words), 4)
    together = model(video, text, video_mask, text_mask)
    for row, (count, length) in enumerate(sizes):
        alone = model(video[row : row + 1, :count], text[row : row + 1, :length])
        assert_close(alone.spans[0], together.spans[row])
        assert_close(alone.logits[0], together.logits[row])
        assert_close(alone.saliency[0], together.saliency[row, :count])


@masks
@few
@given(sizes=st.lists(st.tuples(st.integers(0, 8), st.integers(1, 12), st.integers(1, 3)), min_size=2, max_size=4))
def test_the_description_of_a_clip(lam: LamConfig, sizes: list[tuple[int, int, int]]) -> None:
    torch.manual_seed(0)
    model: Any = lamzoo.create_model(
        "lam_describer_micro", lam=lam, features={"video": 5, "audio": 3}, width=16, heads=2, hidden=16,
        encoder_layers=2, text_layers=1, decoder_layers=1, vocabulary=["bin", "now"], context_length=5,
        context_tokens=3,
    ).eval()  # fmt: skip
    video, audio, context = ([size[part] for size in sizes] for part in range(3))
    batch = {
        name: StreamBatch(features, torch.arange(mask.shape[1]).expand(mask.shape) / 25, mask)
        for name, (features, mask) in (("video", padded(video, 5)), ("audio", padded(audio, 3)))
    }
    before = torch.where(padded(context, 1)[1], torch.randint(1, 5, (len(sizes), max(context))), 0)
    text = torch.randint(1, 5, (len(sizes), 5))
    together = model(batch, text, before).logits
    for row, counts in enumerate(zip(video, audio, strict=True)):
        parts = zip(batch.items(), counts, strict=True)
        own = {name: StreamBatch(*(x[row : row + 1, :n] for x in stream)) for (name, stream), n in parts if n}
        alone = model(own, text[row : row + 1], before[row : row + 1, : context[row]]).logits
        assert_close(alone[0], together[row])


@masks
@pytest.mark.parametrize("similarity", ["seq", "tight"])
@few
@given(counts=st.lists(st.integers(1, 12), min_size=2, max_size=4))
def test_the_similarity_of_a_video(similarity: str, lam: LamConfig, counts: list[int]) -> None:
    torch.manual_seed(0)
    head = {"seq": SequentialHead, "tight": TightHead}[similarity](64, 12, 2, 1.0, nn.GELU)
    lamzoo.add_lam(head, lam).eval()
    frames, mask = padded(counts, 64)
    texts = torch.randn(3, 64)
    with torch.no_grad():
        together = compare(head, texts, frames, mask)
        for row, count in enumerate(counts):
            alone = compare(head, texts, frames[row : row + 1, :count], mask[row : row + 1, :count])
            assert_close(alone, together[:, row : row + 1])


def compare(head: Any, texts: Tensor, frames: Tensor, mask: Tensor) -> Tensor:
    scores: Tensor = head(texts, frames, mask) if isinstance(head, TightHead) else texts @ head(frames, mask).T
    return scores
