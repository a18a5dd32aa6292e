"""Text tokenizers: the most frequent of CLIP's byte pairs, the words of a closed vocabulary, and GPT-2's byte pairs."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from lamzoo import hub
from lamzoo.errors import ConfigError, DataError, HubUnreachableError, WeightsNotFoundError
from lamzoo.reading import read_text

_logger = logging.getLogger(__name__)

_BYTES = 512  # each byte, inside a word and at its end
_SPECIAL = ("<start_of_text>", "<end_of_text>")
_FILE = "tokenizer.json"
_END = "<|endoftext|>"


def is_token(text: Tensor) -> Tensor:
    """Returns which token ids ``(B, L)`` are not padding, bool.

    Padding is 0 and follows the text; in some vocabularies 0 is also a token, which doesn't end a text.
    """
    return (text != 0).flip(1).cumsum(1).flip(1) > 0


class SmallTokenizer(SimpleTokenizer):
    """open_clip's tokenizer of English text, cut to the most frequent byte-pair merges of CLIP.

    It encodes any text, as the full tokenizer does, with more tokens: rare words are split into pieces, at worst into
    single bytes. Called with a text or a list of texts, it returns int64 ``(B, context_length)``: start, tokens, end
    (the highest token id, also for a truncated text), zero padding.

    Args:
        vocab_size: number of tokens, from 514 (bytes, start and end) to CLIP's 49,408.
        context_length: length of the encoded texts.

    Raises:
        ConfigError: the vocabulary is too small, or larger than CLIP's.
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
    """Packs token ids into int64 ``(B, length)``: start, ids, end, zero padding.

    A text that is too long is truncated in front of its end token.
    """
    rows = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in zip(rows, texts, strict=True):
        numbers = [start, *text[: length - 2], end]
        row[: len(numbers)] = torch.tensor(numbers)
    return rows


class WordTokenizer:
    """A word-level tokenizer with a closed vocabulary; it is called as open_clip's tokenizers are.

    Token 0 is padding; the words follow in their order, then the start and the end token.

    Args:
        words: the vocabulary, lower case, without spaces.
        context_length: length of the encoded texts, start and end included.

    Raises:
        ConfigError: the vocabulary is empty, or has a duplicate or a word with a space.
    """

    def __init__(self, words: Sequence[str], context_length: int) -> None:
        if not words or len(set(words)) < len(words) or any(word.split() != [word] for word in words):
            raise ConfigError(f"The vocabulary {list(words)[:5]}... must be a list of distinct words without spaces.")
        self.words, self.context_length = tuple(words), context_length
        self.vocab_size = len(words) + 3
        self.sot_token_id, self.eot_token_id = len(words) + 1, len(words) + 2
        self._numbers = {word: number for number, word in enumerate(words, start=1)}

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Encodes texts to int64 ``(B, context_length)``: start, words, end, zero padding; long texts are truncated.

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
        """Returns the text of token ids; ids that are no words (start, end, padding) are left out."""
        return " ".join(self.words[token - 1] for token in tokens if 0 < token <= len(self.words))


class Gpt2Tokenizer:
    """GPT-2's tokenizer, with token ids shifted by 1, since 0 is padding in the zoo.

    GPT-2 has a single token for start and end, which begins and ends every text here.

    Args:
        source: a folder with a ``tokenizer.json``, or a hub repository, ``owner/name[@revision]``.
        context_length: length of the encoded texts, start and end included.
        vocab_size: vocabulary size of the model, padding included.

    Raises:
        WeightsNotFoundError: the file is not on this machine and can't be downloaded; with instructions to get it.
        ConfigError: the file is not a tokenizer, lacks the end token, or has more tokens than the model.
    """

    def __init__(self, source: str, context_length: int, vocab_size: int) -> None:
        path, self._pairs = _opened(source)
        self._pairs.no_truncation()
        self._pairs.no_padding()
        self.context_length, self.vocab_size = context_length, self._pairs.get_vocab_size() + 1
        end = self._pairs.token_to_id(_END)
        if end is None or self.vocab_size > vocab_size:
            raise ConfigError(
                f"{path} has {self.vocab_size - 1} tokens, {'no' if end is None else 'with'} {_END}, and the model "
                f"was built for {vocab_size - 1}; set tokenizer_name to the tokenizer of its GPT-2."
            )
        self.sot_token_id = self.eot_token_id = end + 1

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Encodes texts to int64 ``(B, context_length)``: start, tokens, end, zero padding; truncates long texts."""
        # One by one: encode_batch starts threads, and the library warns about them when a data loader forks.
        rows = [
            [token + 1 for token in self._pairs.encode(text, add_special_tokens=False).ids]
            for text in ([texts] if isinstance(texts, str) else texts)
        ]
        return pack(rows, self.sot_token_id, self.eot_token_id, context_length or self.context_length)

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of token ids, without start, end and padding."""
        text: str = self._pairs.decode([int(token) - 1 for token in tokens if token not in (0, self.eot_token_id)])
        return text


class HfTokenizer:
    """The tokenizer of a model of transformers, called as open_clip's tokenizers are.

    Attributes:
        eot_token_id: None: a text ends where its padding begins.

    Args:
        source: a folder with a ``tokenizer.json``, or a hub repository, ``owner/name[@revision]``.
        context_length: length of the encoded texts, special tokens included.
        vocab_size: vocabulary size of the model.
        padding: token id of padding.

    Raises:
        WeightsNotFoundError: the file is not on this machine and can't be downloaded; with instructions to get it.
        ConfigError: the file is not a tokenizer, or has more tokens than the model.
    """

    eot_token_id: None = None

    def __init__(self, source: str, context_length: int, vocab_size: int, padding: int = 0) -> None:
        path, self._encoder = _opened(source)
        self.context_length, self.vocab_size = context_length, self._encoder.get_vocab_size()
        if self.vocab_size > vocab_size:
            raise ConfigError(
                f"{path} has {self.vocab_size} tokens, and the text tower was built for {vocab_size}; set "
                "hf_tokenizer_name to the tower's own tokenizer."
            )
        self._padding = padding
        self._encoder.no_padding()

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Encodes texts to int64 ``(B, context_length)``, special tokens first and last; long texts are truncated."""
        length = context_length or self.context_length
        self._encoder.enable_truncation(length)
        texts = [texts] if isinstance(texts, str) else texts
        rows = torch.full((len(texts), length), self._padding, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):  # one by one: encode_batch starts threads
            ids = self._encoder.encode(text).ids
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of token ids, without special tokens."""
        text: str = self._encoder.decode([int(token) for token in tokens], skip_special_tokens=True)
        return text


def find_local(source: str) -> Path | None:
    """Returns the path of the tokenizer file in a local folder, or None where ``source`` names a hub repository.

    The hub is not contacted.

    Raises:
        WeightsNotFoundError: the folder has no such file, or ``source`` is neither a folder nor a repository name.
    """
    folder = Path(os.path.expanduser(source))
    if (folder / _FILE).is_file():
        return folder / _FILE
    if folder.is_dir():
        raise WeightsNotFoundError(
            f"The folder {folder} has no {_FILE}; transformers' AutoTokenizer.from_pretrained(...).save_pretrained "
            "writes one."
        )
    repo = source.partition("@")[0]
    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError(repo)
    except HFValidationError:
        raise WeightsNotFoundError(
            f"tokenizer_name={source!r} is neither a local folder nor a hub repository (owner/name); pass a folder "
            f"with a {_FILE}."
        ) from None
    return None


def absolute_source(source: str) -> str:
    """Returns a tokenizer's folder as an absolute path, a hub repository as it is; raises as :func:`find_local`."""
    file = find_local(source)
    return source if file is None else str(file.parent.absolute())


def read_to_save(argument: str, source: str | None) -> tuple[str, str] | None:
    """Reads the tokenizer file of a local folder, to be saved with a model.

    A missing or unreadable file is logged, as no text is encoded when a model is saved.

    Args:
        argument: argument of the model that names the source, with dots before keys of tables.
        source: as of :class:`Gpt2Tokenizer`; None without such a tokenizer.

    Returns:
        The argument and the contents of the file; None for a hub repository.
    """
    try:
        file = None if source is None else find_local(source)
        return None if file is None else (argument, read_text(file))
    except (WeightsNotFoundError, OSError, ValueError) as error:
        _logger.warning("The model is saved without its tokenizer: %s", error)
        return None


def _opened(source: str) -> tuple[Path, Any]:
    """Opens the tokenizer file of a folder or hub repository; errors are those of :class:`Gpt2Tokenizer`."""
    from tokenizers import Tokenizer  # of the extras gpt2 and transformers, which the other tokenizers do without

    path = _find(source)
    try:
        return path, Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        way_out = hub.discard(path) or "replace it with an intact copy"
        raise ConfigError(f"{path} is not a tokenizer file ({error}); {way_out}.") from error


def _find(source: str) -> Path:
    if (path := find_local(source)) is not None:
        return path
    repo, _, revision = source.partition("@")
    try:
        return hub.download(repo, _FILE, revision=revision or None)
    except HubUnreachableError as error:
        missing = f"There is no folder {source}, and {error.missing}"
        works = f"Works offline: tokenizer_name= with a folder that contains a {_FILE}."
        raise HubUnreachableError(missing, works, error.bring) from error
    except hub.HubEntryMissingError as error:
        raise WeightsNotFoundError(f"{source} is neither a local folder nor a hub repository: {error}") from error
