"""Audio description: a joint encoder over video and audio with learnable masks, and a decoder that writes."""

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

if find_spec("open_clip") is None:
    raise MissingExtraError("The describer needs open_clip, which is not installed; pip install 'lamzoo[clip]'.")

from open_clip.tokenizer import SimpleTokenizer

from lamzoo.models.describer.decoder import CaptionDecoder, from_coca
from lamzoo.models.describer.encoder import Joint, JointEncoder, Stream
from lamzoo.models.describer.generation import Generation, Text, generate
from lamzoo.models.tokenizers import Gpt2Tokenizer, SmallTokenizer, WordTokenizer, find_local

_RATE = 25.0  # features a second, where none is given


@dataclass(frozen=True)
class Described:
    """What a model says of a batch of clips and their sentences.

    Attributes:
        logits: ``(B, L, V)``, of the token behind each token of the sentence.
        words: of the word that is said at each token of the encoder, ``(B, N, V)``, 0 standing for none; None where the
            model was not built with ``align``.
        joint: the encoder's tokens.
    """

    logits: Tensor
    words: Tensor | None
    joint: Joint


class Describer(nn.Module):
    """A BERT-like encoder over the tokens of several modalities, and a text decoder over what it has read.

    The encoder is that of section 4.1 of the paper (arXiv 2406.02761), whose masks weigh tokens of unequal granularity
    against each other; the decoder, CoCa's or GPT-2, sees all of the encoder's tokens.

    Args:
        features: width of each modality's features, by name.
        width: of all tokens.
        heads: attention heads, of the encoder and of CoCa's decoder.
        hidden: width of the encoder's feed-forward networks.
        encoder_layers: how many.
        text_layers: of CoCa's decoder, that read the text alone.
        decoder_layers: of CoCa's decoder, that also attend to the encoder's tokens.
        gpt2: lets GPT-2 write, with its own sizes and vocabulary: fields of
            :class:`lamzoo.models.describer.gpt2.Gpt2Settings`, of which there may be none; None for CoCa's decoder.
        tokenizer_name: of GPT-2's vocabulary: a hub repository, or a folder with a ``tokenizer.json``; None is
            ``openai-community/gpt2``.
        vocabulary: ``"clip"``, CLIP's byte pairs; a number, so many of them; or the words of a closed grammar.
        context_length: tokens of a sentence, start and end included.
        context_tokens: of the text context (previous descriptions) at most; 0 for models without.
        dropout: of the encoder.
        input_dropout: of the encoder's tokens.
        modality_dropout: probability, in training, that a sample loses a modality.
        align: whether the encoder's tokens say which word is being said (for speech, whose words have times).
        seconds: of a clip that the model is profiled with.
        rates: features a second of each modality of that clip; 25 where it isn't given.

    Attributes:
        encoder: its layers may have masks.
        decoder: writes.
    """

    lam_config: LamConfig | None
    #: Which argument sizes which parameters, for messages about weights that don't fit.
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
            raise ConfigError("features is empty; name at least one modality and the width of its features.")
        if isinstance(vocabulary, str) and vocabulary != "clip":
            raise ConfigError(f"vocabulary={vocabulary!r}: it must be 'clip', a number of tokens, or a list of words.")
        if align and isinstance(vocabulary, (str, int)):
            raise ConfigError("align needs a vocabulary of words, since byte pairs have no times; list the words.")
        if gpt2 is not None and vocabulary != "clip":
            raise ConfigError("GPT-2 has its own vocabulary; leave vocabulary and align out, or gpt2.")
        if gpt2 is None and tokenizer_name is not None:
            raise ConfigError(f"tokenizer_name={tokenizer_name!r} is of GPT-2's; leave it out, or give gpt2.")
        self.features, self.seconds, self.rates = dict(features), seconds, dict(rates or {})
        self.width, self.context_length, self.context_tokens = width, context_length, context_tokens
        self.num_features, self.num_classes = width, 0
        self.lam_config = None
        self._vocabulary = vocabulary
        self._gpt2_tokenizer = None if gpt2 is None else tokenizer_name or "openai-community/gpt2"
        if tokenizer_name is not None:
            find_local(tokenizer_name)  # fails early
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

    @cached_property
    def tokenizer(self) -> Any:
        """What turns a list of texts into token numbers ``(B, context_length)``, int64: start, text, end, zeros.

        Raises:
            WeightsNotFoundError: it is GPT-2's, whose file can't be had here.
        """
        if self._gpt2_tokenizer is not None:
            return Gpt2Tokenizer(self._gpt2_tokenizer, self.context_length, self.decoder.vocab_size)
        if isinstance(self._vocabulary, str):
            return SimpleTokenizer(context_length=self.context_length)
        if isinstance(self._vocabulary, int):
            return SmallTokenizer(self._vocabulary, self.context_length)
        return WordTokenizer(self._vocabulary, self.context_length)

    def forward(self, streams: Mapping[str, Stream], text: Tensor, context: Tensor | None = None) -> Described:
        """Reads clips and, for training, what is to be said of them.

        Args:
            streams: by modality; those that are missing are left out.
            text: token numbers, int64 ``(B, L)``, the start first.
            context: of the text context, int64 ``(B, W)``, zeros behind its end; None for none.

        Raises:
            DataError: no stream at all, or one that the model was not built for.
        """
        joint = self.encode(streams, context)
        words = None if self.word_head is None else self.word_head(joint.tokens)
        return Described(self.decoder(text, joint.tokens, joint.mask), words, joint)

    def encode(self, streams: Mapping[str, Stream], context: Tensor | None = None) -> Joint:
        """Reads clips; arguments and errors as of :meth:`forward`.

        Raises:
            ConfigError: a context that the model has no room for.
        """
        if context is None:
            joint: Joint = self.encoder(streams)
            return joint
        if context.shape[1] > self.context_tokens:
            raise ConfigError(
                f"The context has {context.shape[1]} tokens and the model room for {self.context_tokens}; cut it, or "
                "build the model with a larger context_tokens."
            )
        embedded = self.context_projection(self.decoder.token_embedding(context))
        tokens = embedded + self.context_positions[: context.shape[1]]
        joint = self.encoder(streams, (tokens, context != 0))
        return joint

    def generate(
        self,
        streams: Mapping[str, Stream],
        context: Tensor | None = None,
        how: Generation | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Text]:
        """Writes token numbers for each clip; arguments and errors as of :meth:`describe`."""
        joint = self.encode(streams, context)
        ends = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
        return generate(self.decoder, joint.tokens, joint.mask, *ends, how or Generation(), seeds)

    @torch.no_grad()
    def describe(
        self,
        streams: Mapping[str, Stream],
        context: Tensor | None = None,
        how: Generation | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[str]:
        """Writes a sentence for each clip.

        Args:
            streams: as of :meth:`forward`.
            context: likewise.
            how: greedily by default.
            seeds: of each clip's draws, where there are any.

        Raises:
            DataError: as :meth:`forward`.
            ConfigError: a context or length that the model has no room for.
        """
        written = self.generate(streams, context, how, seeds)
        return [str(self.tokenizer.decode(text.tokens)).strip() for text in written]

    def example_lengths(self) -> dict[str, int]:
        """Returns the number of features of each modality in a clip of ``seconds``."""
        return {name: max(1, round(self.seconds * self.rates.get(name, _RATE))) for name in self.features}

    def example_inputs(self, batch_size: int = 1) -> tuple[dict[str, Stream], Tensor]:
        """Returns random features of a clip of ``seconds`` and the longest sentence, for profiling."""
        like = next(self.parameters())
        streams = {}
        for name, count in self.example_lengths().items():
            times = (torch.arange(count, device=like.device) + 0.5) / self.rates.get(name, _RATE)
            values = torch.rand(batch_size, count, self.features[name], device=like.device).to(like.dtype)
            mask = torch.ones(batch_size, count, dtype=torch.bool, device=like.device)
            streams[name] = Stream(values, times.expand(batch_size, -1), mask)
        return streams, torch.ones(batch_size, self.context_length, dtype=torch.int64, device=like.device)


def describer(
    config: Mapping[str, Any], *, lam: LamConfig | None, in_chans: int = 3, num_classes: int = 0, **overrides: Any
) -> nn.Module:
    """Builds a :class:`Describer` without weights.

    Args:
        config: its arguments.
        lam: what the encoder's masks are made of; ``None`` leaves the plain model.
        in_chans: not read: the inputs are features.
        num_classes: must be 0.
        **overrides: further arguments, which win over the config's.

    Raises:
        ConfigError: an argument that means nothing.
    """
    if num_classes != 0:
        raise ConfigError("A describer classifies nothing; leave num_classes out.")
    model = Describer(**{**config, **overrides})
    if lam is not None:
        add_lam_to(model, {"encoder": 1 + sum(model.example_lengths().values())}, lam)
    return model


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: Describer) -> dict[str, Tensor]:
    """Makes a published decoder the model's, an open_clip CoCa's or GPT-2; the encoder, and what a decoder reads it by
    and GPT-2 has not, stay fresh. Own weights are returned as they are.

    Named and called as timm's converters.
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
            raise ConfigError(f"gpt2 has no field {name!r}; the fields are {', '.join(sorted(known))}.")
    return Gpt2Decoder(Gpt2Settings(**options), context_length, width)
