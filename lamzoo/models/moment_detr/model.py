"""Moment-DETR (arXiv 2107.09609): moments and highlights of a video for a sentence, with learnable attention masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from lamzoo.adapters import add_lam_to
from lamzoo.errors import ConfigError
from lamzoo.lam import LamConfig
from lamzoo.models.moment_detr.layers import (
    DecoderLayer,
    EncoderLayer,
    InputProjection,
    Mlp,
    initialise,
    sine_positions,
)
from lamzoo.models.moment_detr.spans import to_edges

Place = Literal["encoder", "cross", "decoder"]
Model = TypeVar("Model", bound="MomentNetwork")


@dataclass(frozen=True)
class Moments:
    """What a model says of a batch of videos and sentences.

    Attributes:
        spans: ``(B, Q, 2)``, float32, centre and width of each query's moment, as shares of the video.
        logits: ``(B, Q, 2)``, of "a moment" and "nothing".
        saliency: ``(B, N)``, of each clip; the higher, the better it fits the sentence.
        layers: spans and logits behind each decoder layer but the last, for auxiliary losses.
        unrelated: saliency for the sentence of another sample, ``(B, N)``, where the model trains on it (QD-DETR).
        words: of the word that is said in each clip, ``(B, N, words + 1)``, 0 standing for none; None but in training
            of a model built with ``words``.
        proposals: ``(B, N, 2)``, centre and width of the moment that each clip would lie in, as shares of the video;
            None but in training of a model whose decoder begins with them (QD-DETR).
    """

    spans: Tensor
    logits: Tensor
    saliency: Tensor
    layers: tuple[tuple[Tensor, Tensor], ...] = ()
    unrelated: Tensor | None = None
    words: Tensor | None = None
    proposals: Tensor | None = None

    def windows(self) -> Tensor:
        """Returns ``(B, Q, 3)``: start and end as shares of the video, and score, the best first."""
        edges = to_edges(self.spans).clamp(0, 1)
        score = self.logits.softmax(dim=-1)[..., :1]
        windows = torch.cat([edges, score], dim=-1)
        order = score.squeeze(-1).argsort(dim=1, descending=True, stable=True)
        return windows.gather(1, order.unsqueeze(-1).expand_as(windows))


class MomentNetwork(nn.Module):
    """What Moment-DETR and QD-DETR have in common: features in, spans and classes out.

    Attributes:
        video_dim: features of a clip, its two temporal positions included.
        text_dim: features of a word.
        width: of the tokens.
        position_turns: of the fastest wave of the sine positions over a video.
        max_clips: clips of a video that it is profiled with; it takes any number.
        max_words: likewise, words of a sentence.
        num_queries: moments that it looks for.
        word_head: tells which word is said in a clip, where the model was built to; only training looks at it.
        reads_unrelated: whether it learns from sentences that do not fit, too.
    """

    reads_unrelated: ClassVar[bool] = False
    lam_config: LamConfig | None
    #: Which argument sizes which parameters, for messages about weights that don't fit.
    sized_by: ClassVar[Mapping[str, str]] = {
        "video_projection.*": "video_dim",
        "text_projection.*": "text_dim",
        "query_embedding.weight": "queries",
        "spans.weight": "queries",
        "word_head.*": "words",
        "*.table.*": "max_clips",
    }

    def __init__(
        self,
        video_dim: int,
        text_dim: int,
        width: int,
        queries: int,
        input_dropout: float,
        position_turns: float,
        max_clips: int,
        max_words: int,
        words: int,
    ) -> None:
        super().__init__()
        self.video_dim, self.text_dim, self.width, self.num_queries = video_dim, text_dim, width, queries
        self.position_turns, self.max_clips, self.max_words = position_turns, max_clips, max_words
        self.num_features, self.num_classes = width, 0
        self.lam_config = None
        self.video_projection = InputProjection(video_dim, width, input_dropout)
        self.text_projection = InputProjection(text_dim, width, input_dropout)
        self.span_head = Mlp(width, width, 2, 3)
        self.class_head = nn.Linear(width, 2)
        self.word_head = nn.Linear(width, words + 1) if words else None

    def forward(
        self,
        video: Tensor,
        text: Tensor,
        video_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        unrelated: Tensor | None = None,
    ) -> Moments:
        """Looks for a sentence in a video.

        Args:
            video: ``(B, N, video_dim)``, float; the last two features of a clip are its start and end as shares of the
                video.
            text: ``(B, W, text_dim)``, float; sentences behind the first ``B`` are there for ``unrelated`` alone.
            video_mask: bool ``(B, N)``, True where there is a clip; None for all.
            text_mask: bool ``(B, W)``, True where there is a word, as many rows as ``text``; None for all.
            unrelated: int64 ``(B,)``, for each video the row of ``text`` that does not fit it, on which QD-DETR
                trains; None for the next sample's.
        """
        video_mask, text_mask = (
            tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask
            for tokens, mask in ((video, video_mask), (text, text_mask))
        )
        clips, words = self.video_projection(video), self.text_projection(text)
        positions = sine_positions(video_mask, self.width, self.position_turns).to(clips.dtype)
        count, others = len(clips), None
        if self.training and self.reads_unrelated:
            if unrelated is None and count > 1:
                unrelated = torch.arange(count, device=clips.device).roll(-1)
            others = None if unrelated is None else (words[unrelated], text_mask[unrelated])
        return self.find(clips, words[:count], positions, video_mask, text_mask[:count], others)

    def find(
        self,
        clips: Tensor,
        words: Tensor,
        positions: Tensor,
        video_mask: Tensor,
        text_mask: Tensor,
        unrelated: tuple[Tensor, Tensor] | None = None,
    ) -> Moments:
        """Looks for a sentence, ``(B, W, C)``, in clips ``(B, N, C)`` with positions.

        ``unrelated`` is a sentence that does not fit, and its mask, where the model is to learn from one.
        """
        raise NotImplementedError

    def said(self, memory: Tensor) -> Tensor | None:
        """Returns, in training, what :attr:`word_head` makes of the encoder's clips ``(B, N, C)``."""
        return None if self.word_head is None or not self.training else self.word_head(memory)

    def example_inputs(self, batch_size: int = 1) -> tuple[Tensor, Tensor]:
        """Returns random features of ``max_clips`` clips and ``max_words`` words, to measure the model on."""
        like = next(self.parameters())
        video = torch.rand(batch_size, self.max_clips, self.video_dim, device=like.device)
        text = torch.rand(batch_size, self.max_words, self.text_dim, device=like.device)
        return video.to(like.dtype), text.to(like.dtype)


class MomentDetr(MomentNetwork):
    """A joint encoder over the clips of a video and the words of a sentence, and a decoder with moment queries.

    Args:
        video_dim: features of a clip, its two temporal positions included.
        text_dim: features of a word.
        width: of the tokens (``hidden_dim``).
        heads: attention heads.
        hidden: width of the feed-forward networks.
        encoder_layers: of the joint encoder.
        decoder_layers: of the decoder.
        queries: moments that it looks for.
        dropout: of the transformer.
        input_dropout: of the projections of the features.
        position_turns: of the fastest wave of the sine positions over a video. With the published one, neighbours among
            hundreds of clips hardly differ.
        max_clips: clips of a video that it is profiled with.
        max_words: likewise, words of a sentence.
        words: of a vocabulary, that its encoder learns to tell apart clip by clip, where they have times; 0 for none.
    """

    def __init__(
        self,
        *,
        video_dim: int,
        text_dim: int,
        width: int = 256,
        heads: int = 8,
        hidden: int = 1024,
        encoder_layers: int = 2,
        decoder_layers: int = 2,
        queries: int = 10,
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
        self.encoder = nn.ModuleList(EncoderLayer(width, heads, hidden, dropout) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(width, heads, hidden, dropout) for _ in range(decoder_layers))
        self.decoder_norm = nn.LayerNorm(width)
        self.query_embedding = nn.Embedding(queries, width)
        self.saliency_head = nn.Linear(width, 1)
        initialise(self.encoder)
        initialise(self.decoder)

    def find(
        self,
        clips: Tensor,
        words: Tensor,
        positions: Tensor,
        video_mask: Tensor,
        text_mask: Tensor,
        unrelated: tuple[Tensor, Tensor] | None = None,
    ) -> Moments:
        """As :meth:`MomentNetwork.find`: both modalities are one sequence."""
        memory = torch.cat([clips, words], dim=1)
        positions = torch.cat([positions, torch.zeros_like(words)], dim=1)
        allowed = torch.cat([video_mask, text_mask], dim=1)
        for layer in self.encoder:
            memory = layer(memory, positions, allowed=allowed)
        *others, (spans, logits) = self._decode(memory, positions, allowed)
        memory = memory[:, : clips.shape[1]]
        saliency = self.saliency_head(memory).squeeze(-1)
        return Moments(spans, logits, saliency, tuple(others), words=self.said(memory))

    def _decode(self, memory: Tensor, positions: Tensor, allowed: Tensor) -> list[tuple[Tensor, Tensor]]:
        numbers = torch.arange(self.query_embedding.num_embeddings, device=memory.device)
        query_positions = self.query_embedding(numbers).to(memory.dtype).expand(len(memory), -1, -1)
        queries, found = torch.zeros_like(query_positions), []
        for layer in self.decoder:
            queries = layer(queries, query_positions, memory, positions, allowed)
            out = self.decoder_norm(queries)
            found.append((self.span_head(out).float().sigmoid(), self.class_head(out)))
        return found


def moment_detr(
    config: Mapping[str, Any],
    *,
    lam: LamConfig | None,
    lam_in: Sequence[Place] | None = None,
    in_chans: int = 3,
    num_classes: int = 0,
    **overrides: Any,
) -> nn.Module:
    """Builds a :class:`MomentDetr` without weights.

    Args:
        config: its arguments, and ``lam_in``.
        lam: what the masks are made of; ``None`` leaves the plain model.
        lam_in: where the masks go: the ``"encoder"``, the ``"decoder"`` (its queries' attention to each other and to
            the memory); by default the encoder.
        in_chans: not read: the inputs are features.
        num_classes: must be 0.
        **overrides: further arguments, which win over the config's.

    Raises:
        ConfigError: a place without attention, or an argument that means nothing.
    """
    return build(MomentDetr, config, lam, lam_in, num_classes, overrides)


def build(
    cls: type[Model],
    config: Mapping[str, Any],
    lam: LamConfig | None,
    lam_in: Sequence[Place] | None,
    num_classes: int,
    overrides: Mapping[str, Any],
) -> Model:
    """Builds a model of the family and puts masks into the places asked for; raises as :func:`moment_detr`."""
    if num_classes != 0:
        raise ConfigError(f"{cls.__name__} classifies nothing; leave num_classes out.")
    chosen = {**config, **overrides}
    default: Sequence[Place] = chosen.pop("lam_in", ("encoder",))
    model = cls(**chosen)
    if lam is not None:
        places = _places(model, default if lam_in is None else lam_in)
        add_lam_to(model, dict.fromkeys(places, model.max_clips + model.max_words), lam)
    return model


def _places(model: MomentNetwork, places: Sequence[Place]) -> Sequence[Place]:
    there = [place for place in get_args(Place) if hasattr(model, place)]
    if not places or not set(places) <= set(there):
        raise ConfigError(
            f"lam_in is {tuple(places)}; in a {type(model).__name__} it must name some of {', '.join(there)}."
        )
    return places
