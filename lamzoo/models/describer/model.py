"""Audio description: a joint encoder of video and audio with learnable masks, and a text decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lamzoo.adapters import add_lam_to
from lamzoo.errors import ConfigError, MissingExtraError
from lamzoo.lam import LamConfig
from lamzoo.lazy import renamed_argument

if find_spec("open_clip") is None:
    raise MissingExtraError("The describer needs open_clip, which is not installed; pip install 'lamzoo[clip]'.")

from open_clip.tokenizer import SimpleTokenizer

from lamzoo.models.describer.decoder import CaptionDecoder, from_coca
from lamzoo.models.describer.encoder import Joint, JointEncoder, StreamBatch
from lamzoo.models.describer.generation import GenerationConfig, Text, generate
from lamzoo.models.tokenizers import (
    Gpt2Tokenizer,
    SmallTokenizer,
    WordTokenizer,
    absolute_source,
    is_token,
    read_to_save,
)

_RATE = 25.0  # default features per second


@dataclass(frozen=True)
class DescriberOutput:
    """Output of a :class:`Describer` for a batch of clips and their sentences.

    Attributes:
        logits: ``(B, L, V)``, of the token after each token of the sentence.
        words: ``(B, N, V)``, logits of the word spoken at each token of the encoder, where 0 is no word; None if the
            model was built without ``align``.
        joint: the encoder's output.
    """

    logits: Tensor
    words: Tensor | None
    joint: Joint


class Describer(nn.Module):
    """A BERT-like encoder over the tokens of several modalities, and a text decoder that attends to its output.

    The encoder is that of section 4.1 of the paper (arXiv 2406.02761), whose masks weigh tokens of unequal granularity
    against each other. The decoder is CoCa's or GPT-2.

    Args:
        features: feature width of each modality, by name.
        width: width of the tokens.
        heads: attention heads of the encoder and of CoCa's decoder.
        hidden: width of the encoder's feed-forward networks.
        encoder_layers: number of layers of the encoder.
        text_layers: layers of CoCa's decoder that only attend to the text.
        decoder_layers: layers of CoCa's decoder that also attend to the encoder's tokens.
        gpt2: decode with GPT-2, which has its own sizes and vocabulary: fields of
            :class:`lamzoo.models.describer.gpt2.Gpt2Settings`, possibly empty; None for CoCa's decoder.
        tokenizer_name: tokenizer of GPT-2: a hub repository, or a folder with a ``tokenizer.json``; None for
            ``openai-community/gpt2``.
        vocabulary: ``"clip"`` for CLIP's byte pairs, a number for the most frequent of them, or a list of words.
        context_length: maximum tokens of a sentence, start and end included.
        context_tokens: maximum tokens of the text context (previous descriptions); 0 for no context.
        dropout: dropout of the encoder.
        input_dropout: dropout of the encoder's tokens.
        modality_dropout: probability, in training, of dropping one modality of a sample.
        align: whether the encoder's tokens also predict the spoken word (for speech with word times).
        seconds: clip length that the model is profiled with.
        rates: features per second of each modality in that clip; 25 by default.

    Attributes:
        encoder: the joint encoder, whose layers may have masks.
        decoder: the text decoder.
    """

    task: ClassVar[str] = "captions"
    lam_config: LamConfig | None
    #: Parameters (patterns) to the argument that determines their size, for error messages.
    sized_by: ClassVar[Mapping[str, str]] = {
        "decoder.positional_embedding": "context_length",
        "decoder.gpt2.wpe.weight": "gpt2",
        "decoder.gpt2.wte.weight": "gpt2",
        "context_positions": "context_tokens",
        "encoder.projections.*": "features",
        "*.table.*": "seconds",
        "decoder.token_embedding.weight": "vocabulary",
        "decoder.text_decoder.text_projection": "vocabulary",
        "word_head.*": "vocabulary",
    }

    def __init__(
        self,
        *,
        features: Mapping[str, int],
        width: int = 512,
        heads: int = 8,
        hidden: int = 2048,
        encoder_layers: int = 6,
        text_layers: int = 12,
        decoder_layers: int = 12,
        gpt2: Mapping[str, Any] | None = None,
        tokenizer_name: str | None = None,
        vocabulary: str | int | Sequence[str] = "clip",
        context_length: int = 76,
        context_tokens: int = 0,
        dropout: float = 0.1,
        input_dropout: float = 0.1,
        modality_dropout: float = 0.0,
        align: bool = False,
        seconds: float = 10.0,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        if not features:
            raise ConfigError("features is empty; pass at least one modality with the width of its features.")
        if isinstance(vocabulary, str) and vocabulary != "clip":
            raise ConfigError(f"vocabulary={vocabulary!r}: it must be 'clip', a number of tokens, or a list of words.")
        if align and isinstance(vocabulary, (str, int)):
            raise ConfigError("align needs a vocabulary of words, as byte pairs have no times; pass a list of words.")
        if gpt2 is not None and vocabulary != "clip":
            raise ConfigError("GPT-2 has its own vocabulary; pass either gpt2, or vocabulary and align.")
        if gpt2 is None and tokenizer_name is not None:
            raise ConfigError(f"tokenizer_name={tokenizer_name!r} is an option of GPT-2; leave it out, or pass gpt2.")
        self.features, self.seconds, self.rates = dict(features), seconds, dict(rates or {})
        self.width, self.context_length, self.context_tokens = width, context_length, context_tokens
        self.num_features, self.num_classes = width, 0
        self.lam_config = None
        self._vocabulary = vocabulary
        if tokenizer_name is not None:
            tokenizer_name = absolute_source(tokenizer_name)  # fails early
        self._gpt2_tokenizer = None if gpt2 is None else tokenizer_name or "openai-community/gpt2"
        self.encoder = JointEncoder(
            features, width, heads, hidden, encoder_layers, dropout, input_dropout, modality_dropout
        )
        self.decoder: Any
        if gpt2 is None:
            vocab_size = int(self.tokenizer.vocab_size)
            self.decoder = CaptionDecoder(vocab_size, context_length, width, heads, text_layers, decoder_layers)
        else:
            self.decoder = _gpt2_decoder(gpt2, context_length, width)
        self.word_head = nn.Linear(width, self.decoder.vocab_size) if align else None
        if context_tokens:
            fits = self.decoder.width == width
            self.context_projection = nn.Identity() if fits else nn.Linear(self.decoder.width, width)
            self.context_positions = nn.Parameter(torch.randn(context_tokens, width) * 0.02)

    def tokenizer_to_save(self) -> tuple[str, str] | None:
        """Returns the tokenizer that is saved with the model, as :func:`lamzoo.models.tokenizers.read_to_save`."""
        return read_to_save("tokenizer_name", self._gpt2_tokenizer)

    @cached_property
    def tokenizer(self) -> Any:
        """Encodes a list of texts to token ids ``(B, context_length)``, int64: start, text, end, zeros.

        Raises:
            WeightsNotFoundError: the file of GPT-2's tokenizer is not on this machine and can't be downloaded.
        """
        if self._gpt2_tokenizer is not None:
            return Gpt2Tokenizer(self._gpt2_tokenizer, self.context_length, self.decoder.vocab_size)
        if isinstance(self._vocabulary, str):
            return SimpleTokenizer(context_length=self.context_length)
        if isinstance(self._vocabulary, int):
            return SmallTokenizer(self._vocabulary, self.context_length)
        return WordTokenizer(self._vocabulary, self.context_length)

    def forward(
        self, streams: Mapping[str, StreamBatch], text: Tensor, context: Tensor | None = None
    ) -> DescriberOutput:
        """Encodes clips and predicts the next token after each token of their sentences.

        Args:
            streams: features by modality; missing modalities are left out.
            text: token ids, int64 ``(B, L)``, with the start token.
            context: token ids of the text context, int64 ``(B, W)``, zero-padded; None for no context.

        Raises:
            DataError: there is no stream, or one that the model was not built for.
        """
        joint = self.encode(streams, context)
        words = None if self.word_head is None else self.word_head(joint.tokens)
        return DescriberOutput(self.decoder(text, joint.tokens, joint.mask), words, joint)

    def encode(self, streams: Mapping[str, StreamBatch], context: Tensor | None = None) -> Joint:
        """Encodes clips; arguments and errors as for :meth:`forward`.

        Raises:
            ConfigError: the context is longer than ``context_tokens``.
        """
        if context is None or not context.shape[1]:
            joint: Joint = self.encoder(streams)
            return joint
        if context.shape[1] > self.context_tokens:
            raise ConfigError(
                f"The context has {context.shape[1]} tokens and the model takes {self.context_tokens}; truncate it, or "
                "create the model with a larger context_tokens."
            )
        embedded = self.context_projection(self.decoder.token_embedding(context))
        tokens = embedded + self.context_positions[: context.shape[1]]
        joint = self.encoder(streams, (tokens, is_token(context)))
        return joint

    @renamed_argument("how", "generation")
    def generate(
        self,
        streams: Mapping[str, StreamBatch],
        context: Tensor | None = None,
        generation: GenerationConfig | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Text]:
        """Generates token ids for each clip; arguments and errors as for :meth:`describe`."""
        joint = self.encode(streams, context)
        ends = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
        return generate(self.decoder, joint.tokens, joint.mask, *ends, generation or GenerationConfig(), seeds)

    @renamed_argument("how", "generation")
    @torch.no_grad()
    def describe(
        self,
        streams: Mapping[str, StreamBatch],
        context: Tensor | None = None,
        generation: GenerationConfig | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[str]:
        """Generates a sentence for each clip.

        Args:
            streams: as for :meth:`forward`.
            context: as for :meth:`forward`.
            generation: decoding settings; greedy search by default.
            seeds: one per clip, for sampling.

        Raises:
            DataError: as for :meth:`forward`.
            ConfigError: the context or ``max_length`` is longer than the model allows.
        """
        written = self.generate(streams, context, generation, seeds)
        return [str(self.tokenizer.decode(text.tokens)).strip() for text in written]

    def example_lengths(self) -> dict[str, int]:
        """Returns the number of features of each modality in a clip of ``seconds``."""
        return {name: max(1, round(self.seconds * self.rates.get(name, _RATE))) for name in self.features}

    def example_inputs(self, batch_size: int = 1) -> tuple[dict[str, StreamBatch], Tensor]:
        """Returns random features of a clip of ``seconds`` and the longest sentence, for profiling."""
        like = next(self.parameters())
        streams = {}
        for name, count in self.example_lengths().items():
            times = (torch.arange(count, device=like.device) + 0.5) / self.rates.get(name, _RATE)
            values = torch.rand(batch_size, count, self.features[name], device=like.device).to(like.dtype)
            mask = torch.ones(batch_size, count, dtype=torch.bool, device=like.device)
            streams[name] = StreamBatch(values, times.expand(batch_size, -1), mask)
        return streams, torch.ones(batch_size, self.context_length, dtype=torch.int64, device=like.device)


def describer(
    config: Mapping[str, Any], *, lam: LamConfig | None, in_chans: int = 3, num_classes: int = 0, **overrides: Any
) -> nn.Module:
    """Builds a :class:`Describer` without weights.

    Args:
        config: arguments of :class:`Describer`.
        lam: configuration of the encoder's masks; ``None`` for the plain model.
        in_chans: ignored, since the inputs are features.
        num_classes: must be 0.
        **overrides: arguments of :class:`Describer` that override ``config``.

    Raises:
        ConfigError: an argument is invalid.
    """
    if num_classes != 0:
        raise ConfigError("A describer has no classes; leave num_classes out.")
    model = Describer(**{**config, **overrides})
    if lam is not None:
        add_lam_to(model, {"encoder": 1 + sum(model.example_lengths().values())}, lam)
    return model


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: Describer) -> dict[str, Tensor]:
    """Converts published weights of a decoder, open_clip's CoCa or GPT-2, to a full state dict of the model.

    The encoder, and the layers that connect it to GPT-2, keep their initial weights. A state dict of the model itself
    is returned unchanged. Name and arguments are those of timm's converters.
    """
    if "wte.weight" in state_dict or "transformer.wte.weight" in state_dict:
        from lamzoo.models.describer.gpt2 import from_gpt2  # needs transformers

        decoder = from_gpt2(state_dict)
    elif any(key.startswith("text_decoder.") for key in state_dict):
        decoder = from_coca(state_dict, model.context_length)
    else:
        return state_dict
    return model.state_dict() | {f"decoder.{name}": value for name, value in decoder.items()}


def _gpt2_decoder(options: Mapping[str, Any], context_length: int, width: int) -> nn.Module:
    from lamzoo.models.describer.gpt2 import Gpt2Decoder, Gpt2Settings  # needs transformers

    known = {field.name for field in fields(Gpt2Settings)}
    for name in options:
        if name not in known:
            raise ConfigError(f"gpt2 has no field {name!r}; its fields are {', '.join(sorted(known))}.")
    return Gpt2Decoder(Gpt2Settings(**options), context_length, width)
