"""QD-DETR (arXiv 2303.13874): cross-attention of clips to words, a saliency token, and queries that are spans."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamzoo.errors import ConfigError
from lamzoo.lam import LamConfig
from lamzoo.layers.attention import HeadAttention
from lamzoo.models.moment_detr.layers import Attention, EncoderLayer, Mlp, initialise, sine_features
from lamzoo.models.moment_detr.model import MomentNetwork, MomentOutput, Place, build
from lamzoo.models.moment_detr.spans import to_centres

Anchors = Literal["learned", "salient"]


class QdDetr(MomentNetwork):
    """Query-dependent DETR: sections 3.1 to 3.3 of its paper, with the decoder of DAB-DETR (arXiv 2201.12329).

    In training, each video is also scored for the sentence of another sample (``MomentOutput.unrelated``).

    The published decoder starts from learned spans, the same for every video, and needs tens of thousands of updates to
    find short moments in long videos. With ``anchors="salient"`` each clip proposes a moment that contains it, and the
    decoder starts from the clips at the peaks of the saliency and their proposals, as two-stage detectors do (arXiv
    2010.04159, section 4.2).

    Args:
        video_dim: feature width of a clip, its two temporal positions included.
        text_dim: feature width of a word.
        width: width of the tokens (``hidden_dim``).
        heads: attention heads.
        hidden: hidden width of the feed-forward networks.
        cross_layers: layers in which clips attend to words.
        encoder_layers: layers of the encoder of these clips.
        decoder_layers: layers of the decoder.
        queries: number of moment queries.
        anchors: initial spans of the decoder: ``"learned"``, or the proposals of ``"salient"`` clips.
        dropout: dropout of the transformer.
        input_dropout: dropout of the feature projections.
        position_turns: periods of the fastest sinusoid of the position embeddings over a video. With the published
            value of 1, neighbours among hundreds of clips hardly differ.
        max_clips: number of clips that the model is profiled with.
        max_words: number of words that the model is profiled with.
        words: size of a vocabulary of spoken words with times, which the encoder learns to predict clip by clip; 0 for
            none.
    """

    reads_unrelated = True

    def __init__(
        self,
        *,
        video_dim: int,
        text_dim: int,
        width: int = 256,
        heads: int = 8,
        hidden: int = 1024,
        cross_layers: int = 2,
        encoder_layers: int = 2,
        decoder_layers: int = 2,
        queries: int = 10,
        anchors: Anchors = "learned",
        dropout: float = 0.1,
        input_dropout: float = 0.5,
        position_turns: float = 1.0,
        max_clips: int = 75,
        max_words: int = 32,
        words: int = 0,
    ) -> None:
        super().__init__(
            video_dim, text_dim, width, queries, input_dropout, position_turns, max_clips, max_words, words
        )
        if anchors not in get_args(Anchors):
            raise ConfigError(f"anchors is {anchors!r}; it must be one of {', '.join(map(repr, get_args(Anchors)))}.")
        self.cross = nn.ModuleList(CrossLayer(width, heads, hidden, dropout) for _ in range(cross_layers))
        self.encoder = nn.ModuleList(EncoderLayer(width, heads, hidden, dropout) for _ in range(encoder_layers))
        self.decoder = SpanDecoder(width, heads, hidden, dropout, decoder_layers, queries, anchors, position_turns)
        self.saliency_token = nn.Parameter(torch.randn(width))
        self.saliency_position = nn.Parameter(torch.randn(width))
        self.clip_saliency = nn.Linear(width, width)
        self.token_saliency = nn.Linear(width, width)
        self.proposal_head = Mlp(width, width, 2, 3) if anchors == "salient" else None
        if self.proposal_head is not None:  # initially, all proposals are equally wide
            weight, bias = self.proposal_head[-1].parameters()
            nn.init.zeros_(weight)
            nn.init.constant_(bias, math.log(_FIRST_DISTANCE / (1 - _FIRST_DISTANCE)))
        initialise(self.cross)
        initialise(self.encoder)

    def find(
        self,
        clips: Tensor,
        words: Tensor,
        positions: Tensor,
        video_mask: Tensor,
        text_mask: Tensor,
        unrelated: tuple[Tensor, Tensor] | None = None,
    ) -> MomentOutput:
        """As :meth:`MomentNetwork.find`: clips attend to the words, and the decoder only to the clips."""
        memory, saliency = self._read(clips, words, positions, video_mask, text_mask)
        proposals = begin = None
        if self.proposal_head is not None:
            proposals = propose(self.proposal_head(memory).float(), video_mask)
            chosen = peaks(saliency.detach(), video_mask, self.decoder.num_queries).unsqueeze(-1)
            begin = memory.take_along_dim(chosen, dim=1), proposals.detach().take_along_dim(chosen, dim=1)
        found = self.decoder(memory, positions, video_mask, begin)
        *others, (spans, logits) = [
            (refined(begun_with, self.span_head(queries)), self.class_head(queries)) for queries, begun_with in found
        ]
        elsewhere = None
        if unrelated is not None:
            elsewhere = self._read(clips, unrelated[0], positions, video_mask, unrelated[1])[1]
        proposals = proposals if self.training else None
        return MomentOutput(spans, logits, saliency, tuple(others), elsewhere, self.word_logits(memory), proposals)

    def attended(self, path: str, clips: int, words: int) -> tuple[int, int, int]:
        """As :meth:`MomentNetwork.attended`: clips attend to words, and then to clips and the saliency token."""
        if path.startswith("cross."):
            return 0, 0, words
        return int(path.startswith("encoder.")), clips, 0

    def _read(
        self, clips: Tensor, words: Tensor, positions: Tensor, video_mask: Tensor, text_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the encoded clips, ``(B, N, C)``, and their saliency, ``(B, N)``."""
        for layer in self.cross:
            clips = layer(clips, positions, words, text_mask)
        token = self.saliency_token.to(clips.dtype).expand(len(clips), 1, -1)
        tokens = torch.cat([token, clips], dim=1)
        first = self.saliency_position.to(positions.dtype).expand(len(clips), 1, -1)
        positions = torch.cat([first, positions], dim=1)
        allowed = torch.cat([torch.ones_like(video_mask[:, :1]), video_mask], dim=1)
        for layer in self.encoder:
            tokens = layer(tokens, positions, allowed=allowed)
        token, memory = tokens[:, :1], tokens[:, 1:]
        products = self.clip_saliency(memory) * self.token_saliency(token)
        return memory, products.sum(dim=-1) / self.width**0.5


def refined(spans: Tensor, offsets: Tensor) -> Tensor:
    """Adds offsets, in any precision, to the logits of spans ``(..., 2)``, float32, 0 to 1 (DAB-DETR)."""
    return (offsets.float() + spans.logit(eps=_EPSILON)).sigmoid()


def peaks(saliency: Tensor, video_mask: Tensor, count: int) -> Tensor:
    """Returns the clips at the highest peaks of the saliency.

    Args:
        saliency: ``(B, N)``, of each clip.
        video_mask: bool ``(B, N)``, True where there is a clip.
        count: number of clips. If there are fewer peaks, the highest other clips follow; if there are fewer clips, they
            repeat.

    Returns:
        int64 ``(B, count)``, indices of clips, the highest first.
    """
    saliency = saliency.float().masked_fill(~video_mask, -torch.inf)
    around = F.max_pool1d(saliency.unsqueeze(1), 2 * _PEAK + 1, stride=1, padding=_PEAK).squeeze(1)
    lowest = saliency.masked_fill(~video_mask, torch.inf).amin(dim=1, keepdim=True)
    highest = saliency.amax(dim=1, keepdim=True)
    beside = saliency - (highest - lowest + 1)  # after all peaks, in their own order
    order = torch.where(saliency == around, saliency, beside)
    chosen = order.topk(min(count, order.shape[1]), dim=1).indices
    lengths = video_mask.sum(dim=1, keepdim=True)
    return chosen.gather(1, torch.arange(count, device=chosen.device) % lengths.clamp(max=count))


def propose(distances: Tensor, video_mask: Tensor) -> Tensor:
    """Returns one span per clip, which contains the clip and so is never empty.

    Args:
        distances: ``(B, N, 2)``, logits of the distances from the clip to the start and to the end of its span, as
            fractions of the video.
        video_mask: bool ``(B, N)``, True where there is a clip; clips come first in each row.

    Returns:
        ``(B, N, 2)``, centre and width as fractions of the video, clipped to it.
    """
    numbers, count = torch.arange(video_mask.shape[1], device=video_mask.device), video_mask.sum(dim=1, keepdim=True)
    before, behind = distances.sigmoid().unbind(-1)
    start, end = (numbers / count - before).clamp_min(0), ((numbers + 1) / count + behind).clamp_max(1)
    return to_centres(torch.stack([start, end], dim=-1))


class CrossLayer(nn.Module):
    """Cross-attention of clips to the words of the sentence (section 3.1), and a feed-forward network."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.PReLU(), nn.Dropout(dropout), nn.Linear(hidden, width), nn.Dropout(dropout)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, clips: Tensor, positions: Tensor, words: Tensor, text_mask: Tensor) -> Tensor:
        """Returns clips ``(B, N, C)``, given their positions, words ``(B, W, C)`` and their mask ``(B, W)``, bool."""
        clips = self.attention(clips, positions, words, allowed=text_mask)
        return self.norm(clips + self.layers(clips))


class SpanDecoder(nn.Module):
    """A decoder whose queries are spans, refined layer by layer (section 3.3; DAB-DETR, section 4).

    Args:
        width: width of the tokens.
        heads: attention heads.
        hidden: hidden width of the feed-forward networks.
        dropout: dropout of attention weights and sub-layers.
        layers: number of layers.
        queries: number of spans.
        anchors: whether the initial spans are learned, or passed to :meth:`forward`.
        position_turns: as for the positions of the memory.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        dropout: float,
        layers: int,
        queries: int,
        anchors: Anchors,
        position_turns: float,
    ) -> None:
        super().__init__()
        self.width, self.num_queries, self.position_turns = width, queries, position_turns
        self.layers = nn.ModuleList(SpanLayer(width, heads, hidden, dropout, number == 0) for number in range(layers))
        if anchors == "learned":
            self.spans = nn.Embedding(queries, 2)
        self.position_head = Mlp(width, width, width, 2)
        self.position_scale = Mlp(width, width, width, 2)
        self.width_head = Mlp(width, width, 1, 2)
        self.refinement = Mlp(width, width, 2, 3)
        self.norm = nn.LayerNorm(width)
        initialise(self)
        for parameter in self.refinement[-1].parameters():  # initially, spans don't change
            nn.init.zeros_(parameter)

    def forward(
        self, memory: Tensor, positions: Tensor, allowed: Tensor, begin: tuple[Tensor, Tensor] | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Decodes.

        Args:
            memory: ``(B, N, C)``.
            positions: ``(B, N, C)``.
            allowed: bool ``(B, N)``.
            begin: the initial queries ``(B, Q, C)`` and spans ``(B, Q, 2)``, float32; None for zeros and the learned
                spans.

        Returns:
            For each layer its output queries ``(B, Q, C)`` and input spans ``(B, Q, 2)``. Spans are float32, since
            bfloat16 only distinguishes 256 positions in the second half of a video, and its logit of 1 is infinite.
        """
        if begin is None:
            numbers = torch.arange(self.num_queries, device=memory.device)
            spans = self.spans(numbers).float().sigmoid().expand(len(memory), -1, -1)
            queries = memory.new_zeros(*spans.shape[:2], self.width)
        else:
            queries, spans = begin
        found = []
        for number, layer in enumerate(self.layers):
            begun_with = spans
            if number:
                spans = spans.detach()  # not learned through attention; begun_with keeps its gradient
            waves = sine_features(spans, self.width // 2, self.position_turns).flatten(-2).to(memory.dtype)
            query_positions = self.position_head(waves)
            if number:
                waves = waves * self.position_scale(queries)
            # Wider spans attend more broadly.
            narrow = self.width_head(queries).sigmoid() / spans[..., 1:].clamp_min(_EPSILON)
            waves = waves * narrow.to(memory.dtype)
            queries = layer(queries, query_positions, waves, memory, positions, allowed)
            found.append((self.norm(queries), begun_with))
            spans = refined(spans, self.refinement(queries))
        return found


class SpanLayer(nn.Module):
    """One layer of :class:`SpanDecoder`: self-attention, conditional cross-attention, feed-forward.

    Args:
        width: width of the tokens.
        heads: attention heads.
        hidden: hidden width of the feed-forward network.
        dropout: dropout of attention weights and sub-layers.
        is_first: whether positions are also added to the content in cross-attention.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, is_first: bool) -> None:
        super().__init__()
        self.num_heads = heads
        self.self_projections = nn.ModuleDict({name: nn.Linear(width, width) for name in _SELF})
        self.cross_projections = nn.ModuleDict(
            {name: nn.Linear(width, width) for name in _CROSS if is_first or name != "query_position"}
        )
        self.self_attention = HeadAttention(width, heads, width, width, dropout)
        self.cross_attention = HeadAttention(width, heads, width, width, dropout)
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.PReLU(), nn.Dropout(dropout), nn.Linear(hidden, width), nn.Dropout(dropout)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        queries: Tensor,
        query_positions: Tensor,
        waves: Tensor,
        memory: Tensor,
        positions: Tensor,
        allowed: Tensor,
    ) -> Tensor:
        """Returns queries ``(B, Q, C)``; ``waves (B, Q, C)`` are the sine features of their spans."""
        own, cross = self.self_projections, self.cross_projections
        query = own["query"](queries) + own["query_position"](query_positions)
        key = own["key"](queries) + own["key_position"](query_positions)
        seen = self.self_attention(query, key, own["value"](queries), queries, queries)
        queries = self.norms[0](queries + self.dropout(seen))
        query, key, key_positions = cross["query"](queries), cross["key"](memory), cross["key_position"](positions)
        if "query_position" in cross:
            query, key = query + cross["query_position"](query_positions), key + key_positions
        seen = self.cross_attention(
            self._beside(query, cross["waves"](waves)), self._beside(key, key_positions), cross["value"](memory),
            queries, memory, allowed,
        )  # fmt: skip
        queries = self.norms[1](queries + self.dropout(seen))
        return self.norms[2](queries + self.layers(queries))

    def _beside(self, content: Tensor, position: Tensor) -> Tensor:
        """Concatenates content and position head by head: ``(B, N, C)`` each to ``(B, N, 2 C)``."""
        pair = [x.unflatten(-1, (self.num_heads, -1)) for x in (content, position)]
        return torch.cat(pair, dim=-1).flatten(-2)


_EPSILON = 1e-3  # fractions of a video are clamped to this distance from 0 and 1
_FIRST_DISTANCE = 0.02  # from a clip to both ends of its untrained proposal, as a fraction of the video
_PEAK = 2  # a peak is the maximum of this many clips on either side
_SELF = ("query", "query_position", "key", "key_position", "value")
_CROSS = (*_SELF, "waves")


def qd_detr(
    config: Mapping[str, Any],
    *,
    lam: LamConfig | None,
    lam_in: Sequence[Place] | None = None,
    in_chans: int = 3,
    num_classes: int = 0,
    **overrides: Any,
) -> nn.Module:
    """Builds a :class:`QdDetr` without weights.

    Args:
        config: arguments of :class:`QdDetr`, and ``lam_in``.
        lam: configuration of the masks; ``None`` for the plain model.
        lam_in: the parts that get masks: ``"cross"`` (attention of clips to words), ``"encoder"`` and ``"decoder"``; by
            default the encoder.
        in_chans: ignored, since the inputs are features.
        num_classes: must be 0.
        **overrides: arguments of :class:`QdDetr` that override ``config``.

    Raises:
        ConfigError: ``lam_in`` names a part that the model doesn't have, or an argument is invalid.
    """
    return build(QdDetr, config, lam, lam_in, num_classes, overrides)
