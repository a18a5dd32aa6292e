"""Text tokenizers for small models: the most frequent of CLIP's byte pairs, and the words of a closed vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from lamzoo.errors import ConfigError, DataError

_BYTES = 512  # each byte, inside a word and at its end
_SPECIAL = ("<start_of_text>", "<end_of_text>")


class SmallTokenizer(SimpleTokenizer):
    """open_clip's tokenizer of English text with only the first, most frequent, byte-pair merges of CLIP.

    Reads any text, as the large one does, in more tokens: rare words come in pieces, at worst byte by byte. Called
    with a text or a list of them, it returns int64 ``(B, context_length)``: start, tokens, end (the highest number, a
    text that is too long included), zeros.

    Args:
        vocab_size: tokens, from 514 (bytes, start and end) to CLIP's 49,408.
        context_length: of the texts.

    Raises:
        ConfigError: a vocabulary too small or larger than CLIP's.
    """

    vocab_size: int
    encoder: dict[str, int]
    bpe_ranks: dict[tuple[str, str], int]

    def __init__(self, vocab_size: int, context_length: int) -> None:
        super().__init__(context_length=context_length)
        if not _BYTES + len(_SPECIAL) <= vocab_size <= self.vocab_size:
            raise ConfigError(
                f"The vocabulary has {vocab_size} tokens; it needs {_BYTES + len(_SPECIAL)} to {self.vocab_size}."
            )
        merges = list(self.bpe_ranks)[: vocab_size - _BYTES - len(_SPECIAL)]
        tokens = [*list(self.encoder)[: _BYTES + len(merges)], *_SPECIAL]
        self.bpe_ranks = dict(zip(merges, range(len(merges)), strict=True))
        self.encoder = dict(zip(tokens, range(vocab_size), strict=True))
        self.decoder = {number: token for token, number in self.encoder.items()}
        self.vocab_size = vocab_size
        self.all_special_ids = [self.encoder[token] for token in _SPECIAL]
        self.sot_token_id, self.eot_token_id = self.all_special_ids


def pack(texts: Sequence[Sequence[int]], start: int, end: int, length: int) -> Tensor:
    """Returns texts as the zoo's tokenizers do, int64 ``(B, length)``: start, numbers, end, zeros.

    A text that is too long loses its last numbers.
    """
    rows = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in zip(rows, texts, strict=True):
        numbers = [start, *text[: length - 2], end]
        row[: len(numbers)] = torch.tensor(numbers)
    return rows


class WordTokenizer:
    """A tokenizer of a closed vocabulary, a token a word; called as open_clip's are.

    The token 0 pads, the words follow in their order, then start and end.

    Args:
        words: the vocabulary, lower case, without blanks.
        context_length: of the texts, start and end included.

    Raises:
        ConfigError: no words, or one is there twice or has a blank.
    """

    def __init__(self, words: Sequence[str], context_length: int) -> None:
        if not words or len(set(words)) < len(words) or any(word.split() != [word] for word in words):
            raise ConfigError(
                f"The vocabulary {list(words)[:5]}... must name some words, each once and without blanks."
            )
        self.words, self.context_length = tuple(words), context_length
        self.vocab_size = len(words) + 3
        self.sot_token_id, self.eot_token_id = len(words) + 1, len(words) + 2
        self._numbers = {word: number for number, word in enumerate(words, start=1)}

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Returns int64 ``(B, context_length)``: start, words, end, zeros; a text that is too long loses words.

        Raises:
            DataError: a word is not in the vocabulary.
        """
        rows = []
        for text in [texts] if isinstance(texts, str) else texts:
            rows.append([self._numbers.get(word, 0) for word in text.lower().split()])
            if 0 in rows[-1]:
                raise DataError(f"{text.split()[rows[-1].index(0)]!r} is not among the {len(self.words)} known words")
        return pack(rows, self.sot_token_id, self.eot_token_id, context_length or self.context_length)

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the words of tokens, those that are none left out."""
        return " ".join(self.words[token - 1] for token in tokens if 0 < token <= len(self.words))
