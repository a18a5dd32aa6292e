"""A BERT-like encoder of one joint sequence of several modalities with different frame rates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lamzoo.errors import DataError
from lamzoo.layers.attention import attend


class StreamBatch(NamedTuple):
    """Features of one modality for a batch of samples.

    Attributes:
        features: ``(B, N, D)``, float.
        times: ``(B, N)``, float32, seconds: the middle of the interval of each feature.
        mask: bool ``(B, N)``, True where there is a feature; a sample may have none.
    """

    features: Tensor
    times: Tensor
    mask: Tensor


class Joint(NamedTuple):
    """A joint sequence: a class token, then the tokens of each modality in turn.

    Attributes:
        tokens: ``(B, N, C)``.
        mask: bool ``(B, N)``, True where there is a token.
        spans: half-open token range ``(start, end)`` of each modality.
    """

    tokens: Tensor
    mask: Tensor
    spans: Mapping[str, tuple[int, int]]


class JointEncoder(nn.Module):
    """Projects modalities, adds time and modality embeddings, and applies self-attention to the joint sequence.

    Tokens are built as BERT's (arXiv 1810.04805, section 3.2): features plus position plus segment embedding, under a
    norm. Positions are sinusoids of the *time* in seconds, so that 25 frames and 100 spectra a second are aligned.

    Args:
        features: feature width of each modality, by name.
        width: width of the tokens.
        heads: attention heads.
        hidden: width of the feed-forward networks.
        layers: number of layers.
        dropout: dropout of attention weights and of the output of each sub-layer.
        input_dropout: dropout of the projected features.
        modality_dropout: probability, in training, of dropping one modality of a sample that has several.
    """

    def __init__(
        self,
        features: Mapping[str, int],
        width: int,
        heads: int,
        hidden: int,
        layers: int,
        dropout: float,
        input_dropout: float,
        modality_dropout: float,
    ) -> None:
        super().__init__()
        self.features, self.width, self.modality_dropout = dict(features), width, modality_dropout
        self.projections = nn.ModuleDict(
            {name: nn.Sequential(nn.LayerNorm(size), nn.Linear(size, width)) for name, size in features.items()}
        )
        self.modalities = nn.ParameterDict({name: nn.Parameter(torch.randn(width) * 0.02) for name in features})
        self.first = nn.Parameter(torch.randn(width) * 0.02)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(input_dropout)
        self.layers = nn.ModuleList(BertLayer(width, heads, hidden, dropout) for _ in range(layers))

    def forward(self, streams: Mapping[str, StreamBatch], context: tuple[Tensor, Tensor] | None = None) -> Joint:
        """Encodes a batch.

        Args:
            streams: features by modality; missing modalities are left out.
            context: tokens to append, ``(B, W, C)``, and their mask, bool ``(B, W)``.

        Raises:
            DataError: there is no stream, or one of a modality or width that the model was not built for.
        """
        self._check(streams)
        streams = {name: streams[name] for name in self.projections if name in streams}
        if self.training and self.modality_dropout and len(streams) > 1:
            streams = self._dropped(streams)
        size = len(next(iter(streams.values())).mask)
        parts = [self.first.expand(size, 1, -1)]
        masks = [next(iter(streams.values())).mask.new_ones(size, 1)]
        for name, stream in streams.items():
            tokens = self.projections[name](stream.features)
            tokens = tokens + time_waves(stream.times, self.width).to(tokens.dtype) + self.modalities[name]
            parts.append(tokens)
            masks.append(stream.mask)
        if context is not None:
            parts.append(context[0])
            masks.append(context[1])
        dtype = parts[1].dtype
        tokens = self.dropout(self.norm(torch.cat([part.to(dtype) for part in parts], dim=1)))
        mask = torch.cat(masks, dim=1)
        for layer in self.layers:
            tokens = layer(tokens, mask)
        return Joint(tokens, mask, self.stream_spans(streams))

    def stream_spans(self, streams: Mapping[str, StreamBatch]) -> dict[str, tuple[int, int]]:
        """Returns the half-open range of each modality's tokens in the joint sequence."""
        spans, start = {}, 1  # after the class token
        for name in self.projections:
            if name in streams:
                end = start + streams[name].mask.shape[-1]
                spans[name], start = (start, end), end
        return spans

    def _check(self, streams: Mapping[str, StreamBatch]) -> None:
        if not streams or not set(streams) <= set(self.projections):
            raise DataError(
                f"the streams are {', '.join(map(repr, streams)) or 'none'}; the model reads "
                f"{', '.join(map(repr, self.projections))}, at least one of them"
            )
        for name, stream in streams.items():
            width, shape = self.features[name], tuple(stream.features.shape)
            if len(shape) != 3 or shape[2] != width or {stream.times.shape, stream.mask.shape} != {shape[:2]}:
                raise DataError(
                    f"the stream {name!r} has features {shape}, times {tuple(stream.times.shape)} and a mask "
                    f"{tuple(stream.mask.shape)}; they must be (B, N, {width}), (B, N) and (B, N)"
                )

    def _dropped(self, streams: Mapping[str, StreamBatch]) -> dict[str, StreamBatch]:
        """Drops one modality of some samples that have several."""
        there = torch.stack([stream.mask.any(dim=1) for stream in streams.values()])
        chance = torch.rand(there.shape, device=there.device).masked_fill(~there, -1.0)
        loses = torch.rand(there.shape[1], device=there.device) < self.modality_dropout
        loses &= there.sum(dim=0) > 1
        victim = torch.zeros_like(there).scatter_(0, chance.argmax(dim=0, keepdim=True), True) & loses
        return {
            name: stream._replace(mask=stream.mask & ~victim[number, :, None])
            for number, (name, stream) in enumerate(streams.items())
        }


class BertLayer(nn.Module):
    """Self-attention and a GELU feed-forward network, each followed by dropout, residual and norm (BERT)."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Returns ``(B, N, C)`` for tokens ``(B, N, C)`` and a mask, bool ``(B, N)``, True where there is a token."""
        tokens = self.norms[0](tokens + self.dropout(attend(self.attn, tokens, tokens, tokens, mask)))
        out: Tensor = self.norms[1](tokens + self.dropout(self.feed_forward(tokens)))
        return out


_SHORTEST, _LONGEST = 0.04, 400.0  # periods of the fastest and slowest sinusoid, seconds


def time_waves(times: Tensor, width: int) -> Tensor:
    """Returns sinusoids of times ``(B, N)`` in seconds, with periods of 40 ms to 400 s: float32 ``(B, N, width)``."""
    share = torch.arange(width // 2, dtype=torch.float32, device=times.device) / max(1, width // 2 - 1)
    lengths = _SHORTEST * (_LONGEST / _SHORTEST) ** share
    angles = 2 * math.pi * times.float().unsqueeze(-1) / lengths
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
