"""Training batches of captioned clips, and the losses of captioning."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from lamzoo.data.captions import CaptionDataset
from lamzoo.data.captions.base import CaptionItem
from lamzoo.data.captions.base import Stream as Features
from lamzoo.data.grid_tokens import IGNORED, said_at
from lamzoo.evaluation.captions.evaluate import context_tokens, pad_streams
from lamzoo.models.tokenizers import is_token
from lamzoo.training.captions.recipe import CaptionWeights


@dataclass(frozen=True)
class Sample:
    """A clip, one of its captions, and the captions before it.

    Attributes:
        item: the clip.
        streams: its features by modality.
        caption: the target caption.
        context: earlier captions of the same video.
    """

    item: CaptionItem
    streams: Mapping[str, Features]
    caption: str
    context: tuple[str, ...]


class Samples(Dataset[Sample]):
    """The clips of a data set, each with one caption; :mod:`random` selects among several.

    Args:
        dataset: the split.
        splice: probability that a clip is spliced from pieces of several.
        context: maximum number of earlier captions.
    """

    def __init__(self, dataset: CaptionDataset, splice: float = 0.0, context: int = 0) -> None:
        self._dataset, self._splice, self._context = dataset, splice, context

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:
        if self._splice and random.random() < self._splice:
            item, streams = self._dataset.splice()
            return Sample(item, streams, random.choice(item.captions), ())
        item = self._dataset.items[index]
        context = self._dataset.context(index, self._context)
        return Sample(item, self._dataset.read(index), random.choice(item.captions), context)


class Collate:
    """Collates samples into one padded batch of tensors, which a loader can move between devices.

    Called with samples, it returns ``streams``, as :func:`pad_streams`; ``text``, int64 ``(B, L)``, padded with zeros;
    ``context``, int64 ``(B, W)``, if a sample has earlier captions and the model supports them; and for models with
    ``align`` ``words``, per modality int64 ``(B, N)``, the word spoken at each token, 0 for none and -100 where the
    token is padding or the word unknown.

    Args:
        model: the model, whose vocabulary is used.
    """

    def __init__(self, model: Any) -> None:
        self.tokenizer, self.context_tokens = model.tokenizer, model.context_tokens
        self._align = model.word_head is not None

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        streams = pad_streams([sample.streams for sample in samples])
        batch: dict[str, Any] = {"streams": streams, "text": self.tokenizer([sample.caption for sample in samples])}
        context = context_tokens(self, [sample.context for sample in samples])
        if context is not None:
            batch["context"] = context
        if self._align:
            batch["words"] = {
                name: torch.stack([
                    self._said(sample.item, times, mask)
                    for sample, times, mask in zip(samples, stream.times, stream.mask, strict=True)
                ])
                for name, stream in streams.items()
            }  # fmt: skip
        return batch

    def _said(self, item: CaptionItem, times: Tensor, mask: Tensor) -> Tensor:
        if not item.words:
            return torch.full_like(mask, IGNORED, dtype=torch.int64)
        said = said_at(item.words, times.numpy(), lambda word: int(self.tokenizer([word])[0, 1]))
        return torch.from_numpy(said).masked_fill(~mask, IGNORED)


def caption_counts(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Counts the elements over which the losses of a batch are averaged.

    Args:
        batch: a batch, as returned by :class:`Collate`.

    Returns:
        Int64 scalars: ``tokens`` of the captions, start tokens excluded, and for models with ``align`` also ``words``,
        encoder tokens with a known word, and ``spoken``, modalities of clips that are long enough for their sentence.
        Modalities that the model leaves out in training are counted, too.
    """
    counts = {"tokens": is_token(batch["text"])[:, 1:].sum()}
    if "words" in batch:
        counts["words"] = torch.stack([(said != IGNORED).sum() for said in batch["words"].values()]).sum()
        lengths = _lengths(batch["text"])
        spoken = [_enough(batch["streams"][name].mask.sum(dim=1), lengths).sum() for name in batch["words"]]
        counts["spoken"] = torch.stack(spoken).sum()
    return counts


def caption_losses(
    found: Any, batch: Mapping[str, Any], weights: CaptionWeights, counts: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Computes the weighted losses of a batch.

    Args:
        found: the model's output, a :class:`lamzoo.models.describer.model.DescriberOutput`.
        batch: a batch, as returned by :class:`Collate`.
        weights: weights of the losses.
        counts: as returned by :func:`caption_counts`, for a larger batch that contains this one; the losses of its
            parts then add up to that of the whole. None for this batch alone.

    Returns:
        ``caption`` and, for models with ``align``, ``words`` and ``ctc``: scalars, float32.
    """
    counts = {name: count.clamp_min(1) for name, count in (counts or caption_counts(batch)).items()}
    text = batch["text"]
    following = text[:, 1:].masked_fill(~is_token(text)[:, 1:], IGNORED)
    logits = found.logits[:, :-1].float().transpose(1, 2)
    caption = F.cross_entropy(logits, following, label_smoothing=weights.label_smoothing, reduction="sum")
    losses = {"caption": weights.caption * caption / counts["tokens"]}
    if found.words is None:
        return losses
    labels, ctc = [], []
    lengths = _lengths(text)
    sentences = torch.cat([row[1 : 1 + length] for row, length in zip(text, lengths.tolist(), strict=True)])
    for name, said in batch["words"].items():
        start, end = found.joint.spans[name]
        scores, present = found.words[:, start:end].float(), found.joint.mask[:, start:end]
        said = said.masked_fill(~present, IGNORED)  # nothing is learned of modalities that were dropped
        labels.append(F.cross_entropy(scores.flatten(0, 1), said.flatten(), reduction="sum"))
        there = present.sum(dim=1)
        chances = scores.log_softmax(dim=-1).transpose(0, 1)
        each = F.ctc_loss(chances, sentences, there.clamp_min(1), lengths, reduction="none", zero_infinity=True)
        ctc.append((each / lengths.clamp_min(1) * _enough(there, lengths)).sum())
    losses["words"] = weights.words * torch.stack(labels).sum() / counts["words"]
    losses["ctc"] = weights.ctc * torch.stack(ctc).sum() / counts["spoken"]
    return losses


def _lengths(text: Tensor) -> Tensor:
    """Returns the tokens of each sentence between its start and end tokens; the end token has the highest index."""
    return text.argmax(dim=1) - 1


def _enough(there: Tensor, lengths: Tensor) -> Tensor:
    """Returns a bool mask ``(B,)`` of the clips with as many encoder tokens that are long enough for their sentence."""
    return (there >= 2 * lengths) & (there > 0)
