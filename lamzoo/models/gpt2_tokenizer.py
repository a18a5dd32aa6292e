"""GPT-2's byte pairs, called as the zoo's other tokenizers are; reads their file from a folder or the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from tokenizers import Tokenizer
from torch import Tensor

from lamzoo import hub
from lamzoo.errors import ConfigError, HubUnreachableError, WeightsNotFoundError
from lamzoo.models.tokenizer import pack

_FILE = "tokenizer.json"
_END = "<|endoftext|>"


class Gpt2Tokenizer:
    """A tokenizer of any text whose numbers are those of GPT-2 plus 1, since 0 pads.

    GPT-2 has one token for start and end, and so have its texts here.

    Args:
        source: a folder with a ``tokenizer.json``, or a hub repository, ``owner/name[@revision]``.
        context_length: of the texts, start and end included.
        vocab_size: the most that the model knows, padding included.

    Raises:
        WeightsNotFoundError: the file can't be had here; says how to bring it.
        ConfigError: it is no tokenizer, has no end of a text, or more tokens than the model.
    """

    def __init__(self, source: str, context_length: int, vocab_size: int) -> None:
        path = _find(source)
        try:
            self._pairs = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more special
            raise ConfigError(f"{path} is not the file of a tokenizer ({error}); get it again.") from error
        self._pairs.no_truncation()
        self._pairs.no_padding()
        self.context_length, self.vocab_size = context_length, self._pairs.get_vocab_size() + 1
        end = self._pairs.token_to_id(_END)
        if end is None or self.vocab_size > vocab_size:
            raise ConfigError(
                f"{path} has {self.vocab_size - 1} tokens, {_END} {'not ' if end is None else ''}among them, and the "
                f"model was built for {vocab_size - 1}; name that of its GPT-2 by tokenizer_name."
            )
        self.sot_token_id = self.eot_token_id = end + 1

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Returns int64 ``(B, context_length)``: start, tokens, end, zeros; a text that is too long loses tokens."""
        # One by one: a batch starts threads, about whose end the library warns when a loader forks.
        rows = [
            [number + 1 for number in self._pairs.encode(text, add_special_tokens=False).ids]
            for text in ([texts] if isinstance(texts, str) else texts)
        ]
        return pack(rows, self.sot_token_id, self.eot_token_id, context_length or self.context_length)

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens, without start, end and padding."""
        text: str = self._pairs.decode([int(token) - 1 for token in tokens if token not in (0, self.eot_token_id)])
        return text


def find_local(source: str) -> Path | None:
    """Returns the tokenizer's file in a folder, or None for a hub repository, of which nothing is read.

    Raises:
        WeightsNotFoundError: a folder without the file, or neither a folder nor the name of a repository.
    """
    folder = Path(source).expanduser()
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
            f"tokenizer_name={source!r} is no folder here and no hub repository, owner/name; name a folder that has a "
            f"{_FILE}."
        ) from None
    return None


def _find(source: str) -> Path:
    if (path := find_local(source)) is not None:
        return path
    repo, _, revision = source.partition("@")
    try:
        return hub.download(repo, _FILE, revision=revision or None)
    except HubUnreachableError as error:
        missing = f"There is no folder {source}, and {error.missing}"
        works = f"Works without it: a folder that has a {_FILE}, named by tokenizer_name=."
        raise HubUnreachableError(missing, works, error.bring) from error
    except hub.HubEntryMissingError as error:
        raise WeightsNotFoundError(f"There is no folder {source} here, and no such repository: {error}") from error
