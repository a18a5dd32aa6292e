"""The small tokenizer reads what CLIP's reads, in more pieces."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from lamzoo.errors import ConfigError
from lamzoo.models.tokenizers import SmallTokenizer

SMALL = SmallTokenizer(1024, 24)
FULL = SimpleTokenizer(context_length=24)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_read_without_loss(text: str) -> None:
    tokens = SMALL.encode(text)
    assert all(0 <= token < 1022 for token in tokens)
    assert SMALL.decode(tokens) == FULL.decode(FULL.encode(text))


def test_the_end_is_the_highest_number_of_every_text() -> None:
    tokens = SMALL(["bin blue at f two now", "long " * 50, ""])
    assert tokens.shape == (3, 24)
    assert tokens.dtype == torch.int64
    assert tokens.max(dim=1).values.tolist() == [1023] * 3
    assert (tokens[:, 0] == 1022).all()


def test_with_the_whole_vocabulary_it_is_clips() -> None:
    texts = ["A man tunes his guitar, slowly.", "Ünïcödé 123!"]
    assert torch.equal(SmallTokenizer(FULL.vocab_size, 24)(texts), FULL(texts))


@pytest.mark.parametrize("size", [513, FULL.vocab_size + 1])
def test_a_vocabulary_that_cannot_be_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"vocabulary has {size} tokens"):
        SmallTokenizer(size, 24)
