"""The picture of a description: what is measured for each word, and that it can be read."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import lamzoo

pytest.importorskip("matplotlib")
pytest.importorskip("open_clip")
from matplotlib.text import Text

from lamzoo.models.describer.encoder import StreamBatch
from lamzoo.models.tokenizers import SmallTokenizer, WordTokenizer
from lamzoo.report.window_pictures import word_attention, words_of
from lamzoo.report.word_attention import MAX_WORDS, ModalityView, WindowView, draw_windows

WORDS = ("a", "woman", "pays", "a", "$5", "bill", "and", "$10", "incomprehensibilities", "sits", "on", "a", "chair")


def test_the_attention_of_a_word_is_that_of_the_token_before_it() -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"features": {"video": 12}, "decoder_layers": 1, "text_layers": 0, "heads": 1}
    model: Any = lamzoo.create_model("lam_describer_micro", **options).eval()
    mask = torch.tensor([[True] * 8 + [False] * 2])
    batch = {"video": StreamBatch(torch.randn(1, 10, 12), torch.arange(10.0)[None] / 5, mask)}
    with torch.no_grad():
        joint = model.encode(batch)
        found = word_attention(model, joint, [3, 4, 5])
        assert found.shape == (3, 11)
        torch.testing.assert_close(found.sum(dim=1), torch.ones(3))
        assert not found[:, 9:].any()  # padding
        text = torch.tensor([[model.tokenizer.sot_token_id, 3, 4]])
        x = model.decoder.token_embedding(text) + model.decoder.positional_embedding[:3]
        (block,), (cross,) = model.decoder.text_decoder.resblocks, model.decoder.text_decoder.cross_attn
        x = block(x, attn_mask=torch.full((3, 3), -torch.inf).triu(1))
        (q, k), (bq, bk) = cross.attn.in_proj_weight.chunk(3)[:2], cross.attn.in_proj_bias.chunk(3)[:2]
        query, key = F.linear(cross.ln_1(x), q, bq), F.linear(cross.ln_1_kv(joint.tokens), k, bk)
        scores = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~joint.mask[:, None], -torch.inf)
        torch.testing.assert_close(found, scores.softmax(dim=-1)[0], atol=1e-5, rtol=1e-5)


def test_pieces_of_a_word_are_one_word() -> None:
    tokenizer = SmallTokenizer(600, 30)
    tokens = tokenizer("a violinist plays.")[0]
    tokens = tokens[1 : int((tokens == tokenizer.eot_token_id).nonzero()[0])].tolist()
    words = words_of(tokenizer, tokens)
    assert [word for word, _ in words] == ["a", "violinist", "plays", "."]
    assert [number for _, numbers in words for number in numbers] == list(range(len(tokens)))
    assert words_of(WordTokenizer(["set", "blue"], 5), [2, 1, 2]) == [("blue", [0]), ("set", [1]), ("blue", [2])]
    assert words_of(tokenizer, []) == []


def view(name: str, count: int, start: float, words: int, masks: bool) -> ModalityView:
    generator = np.random.default_rng(count)
    times = (start + (np.arange(count) + 0.5) * 10 / count).astype(np.float32)
    importance = generator.standard_normal(count).astype(np.float32) if masks else None
    return ModalityView(name, times, importance, generator.random((words, count)).astype(np.float32) / count)


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize(
    ("windows", "words"),
    [(6, 5), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1, 1), (3, 13), (2, 26)))],
)
def test_no_two_labels_overlap_and_none_is_cut(windows: int, words: int, masks: bool) -> None:
    said = (WORDS * 2)[:words]
    views = [
        WindowView(
            start, start + 10, said, tuple(view(n, c, start, words, masks) for n, c in (("video", 50), ("a", 1)))
        )
        for start in range(3590, 3590 + 10 * windows, 10)
    ]
    figure = draw_windows(views, neutral=0.0, title="a model on a $5 video\nand a $10 one")
    figure.draw_without_rendering()
    hidden = {
        label
        for axis in figure.axes
        for line in (axis.xaxis, axis.yaxis)
        for tick in (*line.get_major_ticks(), *line.get_minor_ticks())
        if not min(line.get_view_interval()) <= tick.get_loc() <= max(line.get_view_interval())
        for label in (tick.label1, tick.label2)
    }
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and text not in hidden]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    width, height = figure.bbox.size
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text
    for (one, box), (other, rest) in combinations(boxes, 2):
        shared = (min(box.x1, rest.x1) - max(box.x0, rest.x0), min(box.y1, rest.y1) - max(box.y0, rest.y0))
        assert min(shared) <= 1, f"{one} and {other}"
    written = [text for text, _ in boxes]
    assert written.count("$5") == (2 * windows * sum(word == "$5" for word in said[:MAX_WORDS]))
