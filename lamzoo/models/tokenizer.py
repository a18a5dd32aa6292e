"""A text tokenizer for small models: CLIP's byte pairs, the most frequent of them alone."""

from __future__ import annotations

from open_clip.tokenizer import SimpleTokenizer

from lamzoo.errors import ConfigError

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
