"""Moment-DETR (arXiv 2107.09609), with learnable masks: moments and highlights of a video for a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from lamzoo.adapters import add_lam_to
from lamzoo.errors import ConfigError, class_name
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
class MomentOutput:
    """Output of a :class:`MomentNetwork` for a batch of videos and sentences.

    Attributes:
        spans: ``(B, Q, 2)``, float32, centre and width of each query's moment, as fractions of the video.
        logits: ``(B, Q, 2)``, of "moment" and "no moment".
        saliency: ``(B, N)``, score of each clip; the higher, the better it fits the sentence.
        layers: spans and logits after each decoder layer but the last, for auxiliary losses.
        unrelated: ``(B, N)``, saliency for the sentence of another sample; None except in training of QD-DETR.
        words: ``(B, N, words + 1)``, logits of the word spoken in each clip, where 0 is no word; None except in
            training of a model with ``words``.
        proposals: ``(B, N, 2)``, centre and width of the moment proposed by each clip, as fractions of the video; None
            except in training of a QD-DETR with ``anchors="salient"``.
    """

    spans: Tensor
    logits: Tensor
    saliency: Tensor
    layers: tuple[tuple[Tensor, Tensor], ...] = ()
    unrelated: Tensor | None = None
    words: Tensor | None = None
    proposals: Tensor | None = None

    def windows(self) -> Tensor:
        """Returns ``(B, Q, 3)``: start and end as fractions of the video, and score, the best first."""
        edges = to_edges(self.spans).clamp(0, 1)
        score = self.logits.float().softmax(dim=-1)[..., :1]  # in half precision, good ones would tie
        windows = torch.cat([edges, score], dim=-1)
        order = score.squeeze(-1).argsort(dim=1, descending=True, stable=True)
        return windows.gather(1, order.unsqueeze(-1).expand_as(windows))


class MomentNetwork(nn.Module):
    """Base of Moment-DETR and QD-DETR: projections of the features, and heads for spans and classes.

    Attributes:
        video_dim: feature width of a clip, its two temporal positions included.
        text_dim: feature width of a word.
        width: width of the tokens.
        position_turns: periods of the fastest sinusoid of the position embeddings over a video.
        max_clips: number of clips that the model is profiled with; it takes any number.
        max_words: number of words that the model is profiled with.
        num_queries: number of moment queries.
        word_head: predicts the word spoken in a clip, in training; None without ``words``.
        reads_unrelated: whether training also uses sentences that don't match the video.
    """

    task: ClassVar[str] = "moments"
    reads_unrelated: ClassVar[bool] = False
    lam_config: LamConfig | None
    #: Parameters (patterns) to the argument that determines their size, for error messages.
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
    ) -> MomentOutput:
        """Finds the moments of a video that match a sentence.

        Args:
            video: ``(B, N, video_dim)``, float; the last two features of a clip are its start and end as fractions of
                the video.
            text: ``(B, W, text_dim)``, float; further rows are only used for ``unrelated``.
            video_mask: bool ``(B, N)``, True where there is a clip; None for all.
            text_mask: bool ``(B, W)``, True where there is a word, with as many rows as ``text``; None for all.
            unrelated: int64 ``(B,)``, for each video a row of ``text`` that doesn't match it, for training QD-DETR;
                None for the sentence of the next sample.
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
    ) -> MomentOutput:
        """Finds the moments of clips ``(B, N, C)`` with positions that match a sentence ``(B, W, C)``.

        ``unrelated`` is a sentence that doesn't match, and its mask, for training.
        """
        raise NotImplementedError

    def word_logits(self, memory: Tensor) -> Tensor | None:
        """Returns, in training, the logits of :attr:`word_head` for the encoder's clips ``(B, N, C)``."""
        return None if self.word_head is None or not self.training else self.word_head(memory)

    def attended(self, path: str, clips: int, words: int) -> tuple[int, int, int]:
        """Returns how many saliency tokens, clips and words a masked layer attends to, in this order.

        Args:
            path: of the layer in the model.
            clips: of the video.
            words: of the sentence.
        """
        return 0, clips, words

    def example_inputs(self, batch_size: int = 1) -> tuple[Tensor, Tensor]:
        """Returns random features of ``max_clips`` clips and ``max_words`` words, for profiling."""
        like = next(self.parameters())
        video = torch.rand(batch_size, self.max_clips, self.video_dim, device=like.device)
        text = torch.rand(batch_size, self.max_words, self.text_dim, device=like.device)
        return video.to(like.dtype), text.to(like.dtype)


class MomentDetr(MomentNetwork):
    """A joint encoder of the clips of a video and the words of a sentence, and a decoder with moment queries.

    Args:
        video_dim: feature width of a clip, its two temporal positions included.
        text_dim: feature width of a word.
        width: width of the tokens (``hidden_dim``).
        heads: attention heads.
        hidden: hidden width of the feed-forward networks.
        encoder_layers: layers of the joint encoder.
        decoder_layers: layers of the decoder.
        queries: number of moment queries.
        dropout: dropout of the transformer.
        input_dropout: dropout of the feature projections.
        position_turns: periods of the fastest sinusoid of the position embeddings over a video. With the published
            value of 1, neighbours among hundreds of clips hardly differ.
        max_clips: number of clips that the model is profiled with.
        max_words: number of words that the model is profiled with.
        words: size of a vocabulary of spoken words with times, which the encoder learns to predict clip by clip; 0 for
            none.
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
    ) -> MomentOutput:
        """As :meth:`MomentNetwork.find`, with clips and words in one sequence."""
        memory = torch.cat([clips, words], dim=1)
        positions = torch.cat([positions, torch.zeros_like(words)], dim=1)
        allowed = torch.cat([video_mask, text_mask], dim=1)
        for layer in self.encoder:
            memory = layer(memory, positions, allowed=allowed)
        *others, (spans, logits) = self._decode(memory, positions, allowed)
        memory = memory[:, : clips.shape[1]]
        saliency = self.saliency_head(memory).squeeze(-1)
        return MomentOutput(spans, logits, saliency, tuple(others), words=self.word_logits(memory))

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
        config: arguments of :class:`MomentDetr`, and ``lam_in``.
        lam: configuration of the masks; ``None`` for the plain model.
        lam_in: the parts that get masks: ``"encoder"`` and ``"decoder"`` (the queries' self- and cross-attention); by
            default the encoder.
        in_chans: ignored, since the inputs are features.
        num_classes: must be 0.
        **overrides: arguments of :class:`MomentDetr` that override ``config``.

    Raises:
        ConfigError: ``lam_in`` names a part that the model doesn't have, or an argument is invalid.
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
    """Builds a model of the family with masks in the chosen parts; raises as :func:`moment_detr`."""
    if num_classes != 0:
        raise ConfigError(f"{class_name(cls)} has no classes; leave num_classes out.")
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
            f"lam_in is {tuple(places)}; for {class_name(model)} it must name some of {', '.join(there)}."
        )
    return places
