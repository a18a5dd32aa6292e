"""The text decoder of open_clip's CoCa (arXiv 2205.01917), with any memory and a key-value cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from open_clip.transformer import MultimodalTransformer, ResidualAttentionBlock, Transformer
from torch import Tensor, nn
from torch.nn import functional as F

from lamzoo.errors import ConfigError
from lamzoo.lam.layer import Scores
from lamzoo.layers.attention import split_heads

_Pair = tuple[Tensor, Tensor]


@dataclass
class DecoderCache:
    """Key-value cache of a decoder: ``(B, H, N, d)`` each, by layer.

    Attributes:
        own: keys and values of the tokens so far, in self-attention.
        across: keys and values of the memory, in cross-attention.
        length: number of tokens so far.
    """

    own: dict[int, _Pair] = field(default_factory=dict)
    across: dict[int, _Pair] = field(default_factory=dict)
    length: int = 0

    def select(self, rows: Tensor) -> DecoderCache:
        """Returns the cache of selected rows, int64 ``(B,)``; each is a beam of the same sample as the row it replaces.

        Rows may repeat. All beams of a sample share its memory, so the cross-attention cache doesn't change.
        """
        own = {number: (key[rows], value[rows]) for number, (key, value) in self.own.items()}
        return DecoderCache(own, self.across, self.length)


class CaptionDecoder(nn.Module):
    """CoCa's text decoder: causal layers over the text, then causal layers that also attend to a memory.

    It is built of open_clip's modules, so that published weights fit, without CoCa's class token and contrastive
    projection. Unlike in open_clip, the memory may be padded.

    Args:
        vocab_size: size of the vocabulary.
        context_length: maximum tokens of a text.
        width: width of the tokens and of the memory.
        heads: attention heads.
        text_layers: layers that only attend to the text.
        layers: layers that also attend to the memory.
    """

    reads_blocks = True  # instead of calling them, so FSDP can't shard each one, and a mask in one would have no effect

    def __init__(
        self, vocab_size: int, context_length: int, width: int, heads: int, text_layers: int, layers: int
    ) -> None:
        super().__init__()
        self.vocab_size, self.context_length, self.num_heads = vocab_size, context_length, heads
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.transformer = Transformer(width, text_layers, heads)
        self.text_decoder = MultimodalTransformer(width, layers, heads, context_length, output_dim=vocab_size)
        _initialise(self)

    @property
    def width(self) -> int:
        """Width of the tokens."""
        return self.token_embedding.embedding_dim

    def new_cache(self) -> DecoderCache:
        """Returns an empty cache."""
        return DecoderCache()

    def forward(
        self, tokens: Tensor, memory: Tensor, memory_mask: Tensor | None = None, cache: DecoderCache | None = None
    ) -> Tensor:
        """Predicts the next token after each token.

        Args:
            tokens: int64 ``(B, L)``; with a cache, only the new tokens.
            memory: ``(B, M, C)``; ignored if it is in the cache.
            memory_mask: bool ``(B, M)``, True where there is memory; None for all.
            cache: cache of the previous tokens, which is updated.

        Returns:
            ``(B, L, vocab_size)``, logits.
        """
        start = 0 if cache is None else cache.length
        if (end := start + tokens.shape[1]) > len(self.positional_embedding):
            raise ConfigError(
                f"The text has {end} tokens and the decoder takes {len(self.positional_embedding)}; truncate it, or "
                "create the model with a larger context_length."
            )
        positions = self.positional_embedding[start:end]
        x = self.token_embedding(tokens) + positions
        seen = None if memory_mask is None else memory_mask[:, None, None, :]
        number = 0
        for block in self.transformer.resblocks:
            x = self._read_itself(block, x, number, cache)
            number += 1
        for block, cross in zip(self.text_decoder.resblocks, self.text_decoder.cross_attn, strict=True):
            x = self._read_itself(block, x, number, cache)
            x = self._read_memory(cross, x, memory, seen, number, cache)
            number += 1
        if cache is not None:
            cache.length += tokens.shape[1]
        logits: Tensor = self.text_decoder.ln_final(x) @ self.text_decoder.text_projection
        return logits

    def attention_scores(self, tokens: Tensor, memory: Tensor, memory_mask: Tensor | None = None) -> dict[str, Scores]:
        """Returns the attention scores of all layers, in the order in which they run, by the path of their attention.

        Args:
            tokens: as for :meth:`forward`.
            memory: as for :meth:`forward`.
            memory_mask: as for :meth:`forward`.

        Returns:
            Scores of each token ``(B, H, L, d)`` with all tokens, causally, in layers of self-attention, and with the
            memory ``(B, H, M, d)`` in layers of cross-attention, whose path has ``cross_attn``; detached.
        """
        normed: dict[str, Tensor] = {}
        names = [f"transformer.resblocks.{number}" for number in range(len(self.transformer.resblocks))]
        for number in range(len(self.text_decoder.resblocks)):
            names += [f"text_decoder.resblocks.{number}", f"text_decoder.cross_attn.{number}"]
        blocks: dict[str, Any] = {name: self.get_submodule(name) for name in names}
        parts = {f"{name}.{part}": norm for name, block in blocks.items() for part, norm in block.named_children()}
        hooks = [
            norm.register_forward_hook(lambda _, __, out, name=name: normed.update({name: out.detach()}))
            for name, norm in parts.items()
            if name.endswith((".ln_1", ".ln_1_kv"))
        ]
        try:
            self(tokens, memory, memory_mask)
        finally:
            for hook in hooks:
                hook.remove()
        causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).tril()
        seen = None if memory_mask is None else memory_mask[:, None, None, :]
        found = {}
        for name, block in blocks.items():
            queries = normed[f"{name}.ln_1"]
            keys = normed.get(f"{name}.ln_1_kv", queries)
            query, key = self._heads(block.attn, queries, 0).detach(), self._heads(block.attn, keys, 1).detach()
            allowed = causal if keys is queries else seen
            found[f"{name}.attn"] = Scores(query, key, query.shape[-1] ** -0.5, allowed=allowed)
        return found

    def memory_attention(self, tokens: Tensor, memory: Tensor, memory_mask: Tensor | None = None) -> Tensor:
        """Returns the attention of each token to the memory, averaged over heads and layers.

        Args:
            tokens: as for :meth:`forward`.
            memory: as for :meth:`forward`.
            memory_mask: as for :meth:`forward`.

        Returns:
            ``(B, L, M)``: weights that sum to 1.
        """
        layers = self.attention_scores(tokens, memory, memory_mask)
        weights = [scores.attention().mean(dim=1) for name, scores in layers.items() if "cross_attn" in name]
        return torch.stack(weights).mean(dim=0)

    def _read_itself(self, block: ResidualAttentionBlock, x: Tensor, number: int, cache: DecoderCache | None) -> Tensor:
        normed = block.ln_1(x)
        query, key, value = (self._heads(block.attn, normed, part) for part in range(3))
        if cache is not None:
            if number in cache.own:
                key, value = (torch.cat(pair, dim=2) for pair in zip(cache.own[number], (key, value), strict=True))
            cache.own[number] = key, value
        new, every = query.shape[2], key.shape[2]
        allowed = None
        if 1 < new < every:  # torch aligns causal masks with the first key, not with the last
            allowed = torch.ones(new, every, dtype=torch.bool, device=x.device).tril(every - new)
        out = F.scaled_dot_product_attention(query, key, value, allowed, is_causal=1 < new == every)
        return self._finish(block, x, out)

    def _read_memory(
        self,
        block: ResidualAttentionBlock,
        x: Tensor,
        memory: Tensor,
        seen: Tensor | None,
        number: int,
        cache: DecoderCache | None,
    ) -> Tensor:
        query = self._heads(block.attn, block.ln_1(x), 0)
        if cache is not None and number in cache.across:
            key, value = cache.across[number]
        else:
            normed = block.ln_1_kv(memory)
            key, value = (self._heads(block.attn, normed, part) for part in (1, 2))
            if cache is not None:
                cache.across[number] = key, value
        return self._finish(block, x, F.scaled_dot_product_attention(query, key, value, seen))

    def _heads(self, attention: nn.MultiheadAttention, x: Tensor, part: int) -> Tensor:
        weight, bias = attention.in_proj_weight.chunk(3)[part], attention.in_proj_bias.chunk(3)[part]
        return split_heads(F.linear(x, weight, bias), self.num_heads)

    def _finish(self, block: ResidualAttentionBlock, x: Tensor, heads: Tensor) -> Tensor:
        x = x + block.ls_1(block.attn.out_proj(heads.transpose(1, 2).flatten(2)))
        out: Tensor = x + block.ls_2(block.mlp(block.ln_2(x)))
        return out


def from_coca(state: Mapping[str, Tensor], context_length: int) -> dict[str, Tensor]:
    """Converts the state dict of open_clip's CoCa to the keys of a :class:`CaptionDecoder`; other keys are left out."""
    found = {}
    for name, value in state.items():
        if name.startswith("text_decoder."):
            found[name] = value
        elif name.startswith(("text.token_embedding.", "text.transformer.")):
            found[name.removeprefix("text.")] = value
        elif name == "text.positional_embedding":  # the last position is the class token's
            found["positional_embedding"] = value[:context_length]
    return found


def _initialise(decoder: CaptionDecoder) -> None:
    """Initialises the weights as open_clip's text towers; its CoCa leaves the decoder at torch's defaults."""
    nn.init.normal_(decoder.token_embedding.weight, std=0.02)
    nn.init.normal_(decoder.positional_embedding, std=0.01)
    width, projection = decoder.token_embedding.embedding_dim, decoder.text_decoder.text_projection
    blocks = [*decoder.transformer.resblocks, *decoder.text_decoder.resblocks, *decoder.text_decoder.cross_attn]
    for block in blocks:
        nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
        nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * len(blocks)) ** -0.5)
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * len(blocks)) ** -0.5)
    nn.init.normal_(projection, std=width**-0.5)
