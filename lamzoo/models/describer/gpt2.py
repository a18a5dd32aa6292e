"""GPT-2 of transformers as a decoder with any memory, by cross-attention or as a prefix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamzoo.errors import ConfigError, DataError, MissingExtraError
from lamzoo.lam.layer import Scores
from lamzoo.layers.attention import split_heads

if find_spec("transformers") is None:
    raise MissingExtraError("GPT-2 needs transformers, which is not installed; pip install 'lamzoo[gpt2]'.")

from transformers import DynamicCache, EncoderDecoderCache, GPT2Config, GPT2Model

Reads = Literal["cross", "prefix"]

# The logit of padding: far below GPT-2's logits, which may be around -100, and finite, so that the loss with smoothed
# labels is finite.
_NEVER = -1e4


@dataclass(frozen=True)
class Gpt2Settings:
    """Size of GPT-2 and its access to the memory; the defaults are the published model of 124 million parameters.

    Attributes:
        reads: ``"cross"``: each layer attends to the memory with new cross-attention weights; ``"prefix"``: the memory
            precedes the text, as in ClipCap (arXiv 2111.09734), and uses up positions.
        vocab_size: size of the vocabulary, without padding.
        positions: maximum length of prefix and text together.
        width: width of the tokens.
        layers: number of layers.
        heads: attention heads.
        dropout: dropout of embeddings, attention weights and the output of each sub-layer.

    Raises:
        ConfigError: a value is out of range.
    """

    reads: Reads = "cross"
    vocab_size: int = 50257
    positions: int = 1024
    width: int = 768
    layers: int = 12
    heads: int = 12
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.reads not in get_args(Reads):
            raise ConfigError(f"gpt2.reads={self.reads!r}: it must be one of {', '.join(map(repr, get_args(Reads)))}.")
        sizes = (self.vocab_size, self.positions, self.width, self.layers, self.heads)
        if min(sizes) < 1 or self.width % self.heads:
            raise ConfigError(
                f"gpt2 has vocab_size={self.vocab_size}, positions={self.positions}, width={self.width}, "
                f"layers={self.layers}, heads={self.heads}: each must be at least 1, and width divisible by heads."
            )


@dataclass
class Gpt2Cache:
    """Key-value cache of a :class:`Gpt2Decoder`.

    Attributes:
        layers: keys and values of the tokens so far, prefix included, and of the memory.
        memory: the projected memory, ``(B, M, width)``, with ``reads="cross"``; None before the first token.
        mask: bool ``(B, M)``, mask of the prefix; None before the first token.
        length: number of text tokens so far.
    """

    layers: EncoderDecoderCache = field(default_factory=lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()))
    memory: Tensor | None = None
    mask: Tensor | None = None
    length: int = 0

    def select(self, rows: Tensor) -> Gpt2Cache:
        """Returns the cache of selected rows, int64 ``(B,)``; each is of the same sample as the row it replaces."""
        read: Any = self.layers.self_attention_cache.layers
        own = DynamicCache([(layer.keys[rows], layer.values[rows]) for layer in read])
        across = self.layers.cross_attention_cache  # all beams of a sample share its memory
        return Gpt2Cache(EncoderDecoderCache(own, across), self.memory, self.mask, self.length)


class Gpt2Decoder(nn.Module):
    """GPT-2 conditioned on a memory that is projected to its width; it is called as :class:`CaptionDecoder` is.

    Token ids are GPT-2's plus 1, since 0 is padding in the zoo, while GPT-2 has no padding and its 0 is a token
    (``!``). The logit of padding is always the lowest. GPT-2 has a single token for start and end.

    Args:
        settings: size of GPT-2, and its access to the memory.
        context_length: maximum tokens of a text.
        memory_width: width of the memory.

    Attributes:
        gpt2: the model of transformers, its output tied to its embedding.
        vocab_size: size of the vocabulary, padding included.

    Raises:
        ConfigError: ``context_length`` exceeds the positions of GPT-2.
    """

    def __init__(self, settings: Gpt2Settings, context_length: int, memory_width: int) -> None:
        super().__init__()
        if context_length > settings.positions:
            raise ConfigError(
                f"context_length={context_length}: GPT-2 has {settings.positions} positions; set a smaller one."
            )
        self.settings, self.context_length, self.vocab_size = settings, context_length, settings.vocab_size + 1
        config = GPT2Config(
            vocab_size=settings.vocab_size, n_positions=settings.positions, n_embd=settings.width,
            n_layer=settings.layers, n_head=settings.heads, resid_pdrop=settings.dropout, embd_pdrop=settings.dropout,
            attn_pdrop=settings.dropout, add_cross_attention=settings.reads == "cross",
            bos_token_id=None, eos_token_id=None,  # the tokenizer defines them
        )  # fmt: skip
        self.gpt2: Any = GPT2Model(config)
        self.gpt2.set_attn_implementation("sdpa")  # which takes boolean masks
        self.projection = nn.Linear(memory_width, settings.width)
        nn.init.normal_(self.projection.weight, std=config.initializer_range)
        nn.init.zeros_(self.projection.bias)

    @property
    def width(self) -> int:
        """Width of the tokens."""
        return self.settings.width

    def new_cache(self) -> Gpt2Cache:
        """Returns an empty cache."""
        return Gpt2Cache()

    def token_embedding(self, tokens: Tensor) -> Tensor:
        """Embeds tokens, int64 ``(B, L)``, as ``(B, L, width)``; padding gets the embedding of GPT-2's first token."""
        embedded: Tensor = self.gpt2.wte((tokens - 1).clamp_min(0))
        return embedded

    def forward(
        self, tokens: Tensor, memory: Tensor, memory_mask: Tensor | None = None, cache: Gpt2Cache | None = None
    ) -> Tensor:
        """Predicts the next token after each token.

        Args:
            tokens: int64 ``(B, L)``; with a cache, only the new tokens.
            memory: ``(B, M, C)``; ignored if it is in the cache.
            memory_mask: bool ``(B, M)``, True where there is memory; None for all.
            cache: cache of the previous tokens, which is updated.

        Returns:
            ``(B, L, vocab_size)``, logits.

        Raises:
            DataError: the prefix leaves fewer than ``context_length`` positions.
        """
        words = self.token_embedding(tokens)
        read = self._attend if self.settings.reads == "cross" else self._continue
        hidden = read(words, memory, memory_mask, cache)
        if cache is not None:
            cache.length += tokens.shape[1]
        return F.pad(F.linear(hidden, self.gpt2.wte.weight), (1, 0), value=_NEVER)

    def attention_scores(self, tokens: Tensor, memory: Tensor, memory_mask: Tensor | None = None) -> dict[str, Scores]:
        """Returns the attention scores of all layers, in the order in which they run, by the path of their attention.

        Args:
            tokens: as for :meth:`forward`.
            memory: as for :meth:`forward`.
            memory_mask: as for :meth:`forward`.

        Returns:
            Scores of each token ``(B, H, L, d)``; detached. With ``reads="cross"``, those of self-attention with all
            tokens, causally, and those of cross-attention, whose path ends in ``crossattention``, with the memory
            ``(B, H, M, d)``; with ``reads="prefix"`` those with the memory and then all tokens ``(B, H, M + L, d)``.
        """
        projected: dict[str, Tensor] = {}
        hooks = [
            module.register_forward_hook(lambda _, __, out, name=name: projected.update({name: out.detach()}))
            for name, module in self.named_modules()
            if name.endswith((".attn.c_attn", ".crossattention.q_attn", ".crossattention.c_attn"))
        ]
        try:
            self(tokens, memory, memory_mask)
        finally:
            for hook in hooks:
                hook.remove()
        size = 0 if self.settings.reads == "cross" else memory.shape[1]
        of_memory = memory_mask if memory_mask is not None else memory.new_ones(memory.shape[:2], dtype=torch.bool)
        seen = of_memory[:, None, None, :]
        causal = _causal(tokens.shape[1], tokens.shape[1], tokens.device)
        if size:
            causal = torch.cat([seen.expand(-1, -1, tokens.shape[1], -1), causal.expand(len(seen), -1, -1, -1)], dim=3)
        found = {}
        for number in range(self.settings.layers):
            query, key, _ = projected[f"gpt2.h.{number}.attn.c_attn"].chunk(3, dim=-1)
            found[f"gpt2.h.{number}.attn"] = self._scores(query[:, size:], key, causal)
            if self.settings.reads == "cross":
                path = f"gpt2.h.{number}.crossattention"
                key, _ = projected[f"{path}.c_attn"].chunk(2, dim=-1)
                found[path] = self._scores(projected[f"{path}.q_attn"], key, seen)
        return found

    def memory_attention(self, tokens: Tensor, memory: Tensor, memory_mask: Tensor | None = None) -> Tensor:
        """Returns the attention of each token to the memory, averaged over heads and layers.

        Args:
            tokens: as for :meth:`forward`.
            memory: as for :meth:`forward`.
            memory_mask: as for :meth:`forward`.

        Returns:
            ``(B, L, M)``: weights that sum to 1, normalised over the memory alone.
        """
        layers, size = self.attention_scores(tokens, memory, memory_mask), memory.shape[1]
        if self.settings.reads == "cross":
            read = [scores for path, scores in layers.items() if path.endswith("crossattention")]
        else:
            seen = None if memory_mask is None else memory_mask[:, None, None, :]
            read = [replace(scores, key=scores.key[:, :, :size], allowed=seen) for scores in layers.values()]
        return torch.stack([scores.attention().mean(dim=1) for scores in read]).mean(dim=0)

    def _scores(self, query: Tensor, key: Tensor, allowed: Tensor) -> Scores:
        query, key = (split_heads(x, self.settings.heads) for x in (query, key))
        return Scores(query, key, query.shape[-1] ** -0.5, allowed=allowed)

    def _attend(self, words: Tensor, memory: Tensor, mask: Tensor | None, cache: Gpt2Cache | None) -> Tensor:
        """Runs GPT-2 over words ``(B, L, width)`` with cross-attention to the memory; returns the hidden states."""
        seen = self.projection(memory) if cache is None or cache.memory is None else cache.memory
        start, new = 0 if cache is None else cache.length, words.shape[1]
        if cache is not None:
            cache.memory = seen
        found = self.gpt2(
            inputs_embeds=words,
            attention_mask=_causal(new, start + new, words.device),
            encoder_hidden_states=seen,
            encoder_attention_mask=None if mask is None else mask[:, None, None, :].expand(-1, -1, new, -1),
            use_cache=cache is not None,
            cache=None if cache is None else cache.layers,
        )
        hidden: Tensor = found.last_hidden_state
        return hidden

    def _continue(self, words: Tensor, memory: Tensor, mask: Tensor | None, cache: Gpt2Cache | None) -> Tensor:
        """Runs GPT-2 over words ``(B, L, width)`` after the memory; returns the hidden states of the words.

        Positions skip padding, so that a padded prefix leaves no gap before the text.
        """
        size, new = words.shape[:2]
        start = 0 if cache is None else cache.length
        known = None if cache is None else cache.mask
        if known is None:
            known = torch.ones(memory.shape[:2], dtype=torch.bool, device=words.device) if mask is None else mask
            self._check_room(known)
            words = torch.cat([self.projection(memory), words], dim=1)
            if cache is not None:
                cache.mask = known
        there = torch.cat([known, known.new_ones(size, start + new)], dim=1)
        positions = (there.cumsum(dim=1) - 1).clamp_min(0)
        found = self.gpt2(
            inputs_embeds=words,
            position_ids=positions[:, -words.shape[1] :],
            attention_mask=_causal(words.shape[1], there.shape[1], words.device) & there[:, None, None, :],
            use_cache=cache is not None,
            cache=None if cache is None else cache.layers.self_attention_cache,
        )
        hidden: Tensor = found.last_hidden_state[:, -new:]
        return hidden

    def _check_room(self, mask: Tensor) -> None:
        room = self.settings.positions - self.context_length
        if mask.shape[1] <= room:
            return
        longest = int(mask.sum(dim=1).max())
        if longest > room:
            raise DataError(
                f"a clip has {longest} tokens, and GPT-2's {self.settings.positions} positions have room for {room} "
                f"before a text of {self.context_length}; use shorter clips or fewer features per second, create the "
                "model with a smaller context_length, or with gpt2.reads='cross', which has no such limit"
            )


def from_gpt2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts the state dict of a published GPT-2 to the keys of a :class:`Gpt2Decoder`.

    Accepts both forms of transformers, with and without the language-modelling head, which is tied to the embedding.
    """
    bare = {name.removeprefix("transformer."): value for name, value in state.items()}
    masks = (".attn.bias", ".attn.masked_bias")  # causal masks, which old files contain
    kept = {name: value for name, value in bare.items() if not name.endswith(masks) and name != "lm_head.weight"}
    return {f"gpt2.{name}": value for name, value in kept.items()}


def _causal(new: int, every: int, device: torch.device) -> Tensor:
    """Returns the causal mask of the last tokens, bool ``(1, 1, new, every)``, True where they may attend.

    A mask of four dimensions is used by transformers as it is. From other masks it builds its own, which reads tensor
    values: a device synchronisation in each call, and impossible on the meta device.
    """
    return torch.ones(1, 1, new, every, dtype=torch.bool, device=device).tril(every - new)
