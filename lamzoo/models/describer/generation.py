"""Text generation with a cached decoder: greedy search, beam search and nucleus sampling, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lamzoo.errors import ConfigError
from lamzoo.lazy import renamed_argument


@dataclass(frozen=True)
class GenerationConfig:
    """Settings of text generation.

    Attributes:
        beams: width of the beam search; 1 is greedy search.
        length_penalty: exponent of the number of tokens by which the log-probability of a text is divided; 0 for none.
        max_length: maximum number of tokens, start and end included; None for the maximum of the decoder.
        top_p: sample from the smallest set of tokens with this total probability (nucleus sampling, arXiv 1904.09751);
            None searches instead.
        temperature: divisor of the logits when sampling.

    Raises:
        ConfigError: a value is out of range, or sampling is combined with several beams.
    """

    beams: int = 1
    length_penalty: float = 1.0
    max_length: int | None = None
    top_p: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.beams < 1 or self.length_penalty < 0 or self.temperature <= 0:
            raise ConfigError(
                f"beams={self.beams}, length_penalty={self.length_penalty:g}, temperature={self.temperature:g}: beams "
                "must be at least 1, length_penalty at least 0 and temperature above 0."
            )
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"max_length={self.max_length}: a text has at least a start and an end.")
        if self.top_p is not None and (not 0 < self.top_p <= 1 or self.beams > 1):
            raise ConfigError(f"top_p={self.top_p:g} with beams={self.beams}: give 0 < top_p <= 1 and one beam.")


class Text(NamedTuple):
    """A generated text.

    Attributes:
        tokens: token ids, without start and end.
        score: log-probability, normalised by ``length_penalty``; higher is better.
    """

    tokens: list[int]
    score: float


@torch.no_grad()
@renamed_argument("how", "generation")
def generate(
    decoder: Any,
    memory: Tensor,
    memory_mask: Tensor | None,
    start: int,
    end: int,
    generation: GenerationConfig,
    seeds: Sequence[int] | None = None,
) -> list[Text]:
    """Generates a text for each sample, which doesn't depend on the other samples of the batch, up to rounding.

    Args:
        decoder: a :class:`CaptionDecoder`, or an object with its ``forward``, ``new_cache`` and ``context_length``.
        memory: ``(B, M, C)``.
        memory_mask: bool ``(B, M)``, True where there is memory; None for all.
        start: the start token.
        end: the end token.
        generation: the decoding settings.
        seeds: one per sample, for ``top_p``; the positions in the batch by default.

    Raises:
        ConfigError: ``max_length`` exceeds the maximum of the decoder, or a probability is not a number.
    """
    length = decoder.context_length if generation.max_length is None else generation.max_length
    if length > decoder.context_length:
        raise ConfigError(
            f"max_length={length}: the decoder was built for {decoder.context_length} tokens; set a smaller one."
        )
    if generation.top_p is not None:
        return _draw(decoder, memory, memory_mask, start, end, length, generation, seeds or range(len(memory)))
    return _search(decoder, memory, memory_mask, start, end, length, generation)


def _search(
    decoder: Any, memory: Tensor, mask: Tensor | None, start: int, end: int, length: int, generation: GenerationConfig
) -> list[Text]:
    size, beams = len(memory), generation.beams
    memory = memory.repeat_interleave(beams, dim=0)
    mask = None if mask is None else mask.repeat_interleave(beams, dim=0)
    cache = decoder.new_cache()
    texts = torch.full((size, beams, 1), start, device=memory.device)
    scores = torch.full((size, beams), -torch.inf, device=memory.device)
    scores[:, 0] = 0.0  # all beams are equal at first
    finished: list[list[Text]] = [[] for _ in range(size)]
    done = [False] * size
    first = torch.arange(size, device=memory.device).unsqueeze(1) * beams
    while texts.shape[2] < length and not all(done):
        logits = decoder(texts[:, :, -1].reshape(-1, 1), memory, mask, cache)[:, -1]
        chances = _checked(logits.float().log_softmax(dim=-1)).unflatten(0, (size, beams))
        best = (scores.unsqueeze(-1) + chances).flatten(1).topk(2 * beams, dim=1)  # one candidate of each beam may end
        parents, tokens = best.indices // chances.shape[2], best.indices % chances.shape[2]
        ends = tokens == end
        for sample, rank in ends[:, :beams].nonzero().tolist():
            if not done[sample]:
                written = texts[sample, parents[sample, rank], 1:].tolist()
                finished[sample].append(_text(written, best.values[sample, rank].item(), len(written) + 1, generation))
        scores, order = best.values.masked_fill(ends, -torch.inf).topk(beams, dim=1)
        parents, tokens = parents.gather(1, order), tokens.gather(1, order)
        texts = texts.gather(1, parents.unsqueeze(-1).expand(-1, -1, texts.shape[2]))
        texts = torch.cat([texts, tokens.unsqueeze(-1)], dim=2)
        if beams > 1:
            cache = cache.select((first + parents).flatten())
        for sample, running in enumerate(scores[:, 0].tolist()):
            done[sample] = done[sample] or _nothing_better(finished[sample], running, length, generation)
    for sample in range(size):
        if not done[sample]:  # texts of the maximum length have no end token
            running = zip(texts[sample, :, 1:].tolist(), scores[sample].tolist(), strict=True)
            finished[sample] += [
                _text(text, score, len(text), generation) for text, score in running if score > -torch.inf
            ]
    return [max(found, key=lambda text: text.score) for found in finished]


def _checked(chances: Tensor) -> Tensor:
    """Returns probabilities; raises a :class:`ConfigError` if one is not a number."""
    if chances.isnan().any():
        raise ConfigError("the model's outputs are not finite; use another precision, or check the weights")
    return chances


def _text(tokens: list[int], chance: float, length: int, generation: GenerationConfig) -> Text:
    return Text(tokens, chance / max(1, length) ** generation.length_penalty)


def _nothing_better(finished: list[Text], running: float, length: int, generation: GenerationConfig) -> bool:
    """Returns whether a sample is done: with one beam at its first end, with several once no beam can still win."""
    if generation.beams == 1 or len(finished) < generation.beams:
        return generation.beams == 1 and bool(finished)
    possible = running / (length - 1) ** generation.length_penalty
    return max(text.score for text in finished) >= possible


def _draw(
    decoder: Any,
    memory: Tensor,
    mask: Tensor | None,
    start: int,
    end: int,
    length: int,
    generation: GenerationConfig,
    seeds: Sequence[int],
) -> list[Text]:
    assert generation.top_p is not None
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    cache = decoder.new_cache()
    token = torch.full((len(memory), 1), start, device=memory.device)
    texts: list[list[int]] = [[] for _ in generators]
    chances = [0.0] * len(texts)
    lengths = [0] * len(texts)
    done = [False] * len(texts)
    for _ in range(length - 1):
        logits = decoder(token, memory, mask, cache)[:, -1].float() / generation.temperature
        shares, order = _checked(logits.softmax(dim=-1)).sort(dim=-1, descending=True)
        before = shares.cumsum(dim=-1) - shares
        nucleus = shares.masked_fill(before >= generation.top_p, 0.0)
        nucleus = nucleus / nucleus.sum(dim=-1, keepdim=True)
        draws = [torch.rand((), generator=generator, device="cpu") for generator in generators]
        drawn_at = torch.stack(draws).to(memory.device)
        place = (nucleus.cumsum(dim=-1) <= drawn_at.unsqueeze(1)).sum(dim=-1, keepdim=True)
        place = place.minimum((nucleus > 0).sum(dim=-1, keepdim=True) - 1)  # the sum may round to less than 1
        token = order.gather(1, place)
        chosen = shares.gather(1, place)[:, 0].log().tolist()
        for sample, (drawn, chance) in enumerate(zip(token[:, 0].tolist(), chosen, strict=True)):
            if not done[sample]:
                chances[sample] += chance
                lengths[sample] += 1
                done[sample] = drawn == end
                if not done[sample]:
                    texts[sample].append(drawn)
        if all(done):
            break
    return [_text(*each, generation) for each in zip(texts, chances, lengths, strict=True)]
