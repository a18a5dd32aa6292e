"""A tiny vocabulary of GPT-2's kind, learned from a few sentences: no file of the published one is at hand."""

from __future__ import annotations

from pathlib import Path

_TEXT = ("she waits by the door", "he walks to the house", "bin blue now", "set red again", "the man waits again")


def write_byte_pairs(folder: Path, size: int = 300) -> Path:
    """Writes ``tokenizer.json`` and its configuration, of ``size`` tokens, the last of them GPT-2's end of a text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2TokenizerFast

    pairs = ByteLevelBPETokenizer()
    pairs.train_from_iterator([*_TEXT] * 20, vocab_size=size - 1, min_frequency=1, show_progress=False)
    assert pairs.get_vocab_size() == size - 1
    pairs.add_special_tokens(["<|endoftext|>"])
    pairs.save(str(folder / "plain.json"))
    GPT2TokenizerFast(tokenizer_file=str(folder / "plain.json")).save_pretrained(folder)
    return folder
