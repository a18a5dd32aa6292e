"""Generation and scoring of captions with a describer."""

from __future__ import annotations

import logging
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lamzoo.data import plain_worker_errors
from lamzoo.data.captions import CaptionDataset
from lamzoo.data.captions.base import Stream as Features
from lamzoo.errors import ConfigError, MissingExtraError, UnsupportedHostError
from lamzoo.evaluation.captions.coco_results import read_captions
from lamzoo.evaluation.captions.metrics import caption_metrics, neighbour_recall, word_error_rate
from lamzoo.evaluation.runtime import Items, Precision, check_batches, inference, resolve_device
from lamzoo.lazy import renamed_argument
from lamzoo.tasks.base import EvalRequest, Evaluation, MetricSpec, ScoreTable, metric_table

_logger = logging.getLogger(__name__)

_NEAREST, _NEIGHBOURS = 5, 16  # of AutoAD's R@5/16


@dataclass(frozen=True)
class CaptionResult:
    """Scores of a describer.

    Attributes:
        metrics: as returned by :func:`caption_scores`.
        captions: the generated captions by item id.
        seconds: total time, including reading.
    """

    metrics: dict[str, float]
    captions: dict[str, str]
    seconds: float


@renamed_argument("how", "generation")
def evaluate_captions(
    model: nn.Module,
    dataset: CaptionDataset,
    *,
    generation: Any = None,
    context: int = 0,
    batch_size: int = 32,
    device: str | torch.device = "auto",
    precision: Precision = "float32",
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> CaptionResult:
    """Scores a model of the family ``lam_describer`` on a split, with one generated caption per clip.

    Args:
        model: the model; it stays on the device.
        dataset: the split.
        generation: a :class:`lamzoo.models.describer.generation.GenerationConfig`; greedy decoding by default.
        context: number of earlier captions of the same video to condition on, taken from the data.
        batch_size: clips per batch.
        device: a torch device, or ``"auto"``.
        precision: autocast precision.
        workers: worker processes that read features; 0 reads in the main process.
        progress: called with the number of clips described and the total.

    Raises:
        ConfigError: an invalid device, precision, batch size or number of workers, or a context that the model does not
            support.
        DataError: features can't be read.
        UnsupportedHostError: the model does not generate captions, or expects other features.
    """
    start = time.perf_counter()
    captions = describe_clips(
        model, dataset, generation=generation, context=context, batch_size=batch_size, device=device,
        precision=precision, workers=workers, progress=progress,
    )  # fmt: skip
    return CaptionResult(caption_scores(dataset, captions), captions, time.perf_counter() - start)


def score_captions(model: Any, dataset: CaptionDataset, request: EvalRequest) -> Evaluation:
    """Scores a describer as ``lamzoo eval`` and ``lamzoo bench`` do; errors as of :func:`evaluate_captions`.

    Args:
        model: a model of the family ``lam_describer``.
        dataset: the split.
        request: evaluation settings; its options are ``beams`` and ``context``.
    """
    from lamzoo.models.describer.generation import GenerationConfig  # needs open_clip

    generation = GenerationConfig(beams=request.options.get("beams") or 1)
    context = request.options.get("context") or 0
    result = evaluate_captions(
        model, dataset, generation=generation, context=context, batch_size=request.batch_size, device=request.device,
        precision=request.precision, workers=request.workers,
        progress=lambda done, total: request.progress(done, total, ""),
    )  # fmt: skip
    metrics = result.metrics | _java_scores(dataset, result.captions)
    record = {"beams": generation.beams, "context": context, "clips": len(dataset), "seconds": result.seconds}
    record |= {"metrics": metrics}
    return Evaluation(metrics, f"{len(dataset):,} clips", record, predictions=result.captions)


def score_file(path: str | Path, dataset: CaptionDataset) -> Evaluation:
    """Scores captions in COCO's results format, as ``lamzoo eval FILE.json`` does.

    Raises:
        DataError: as of :func:`lamzoo.evaluation.read_captions`, or the ids differ from the split's.
    """
    captions = {str(key): caption for key, caption in read_captions(path).items()}
    metrics = caption_scores(dataset, captions) | _java_scores(dataset, captions)
    record = {"captions": str(path), "clips": len(dataset), "metrics": metrics}
    return Evaluation(metrics, f"{len(dataset):,} clips", record)


def score_table(scores: Mapping[str, Mapping[str, float]]) -> ScoreTable:
    """Returns metrics of :func:`caption_scores` as a table with one row per split."""
    keys = list(dict.fromkeys(key for of_split in scores.values() for key in of_split))
    percent = ("WER", "sentence_accuracy", f"R@{_NEAREST}/{_NEIGHBOURS}")
    specs = [MetricSpec(key, (key,), key, decimals=2 if key in percent else 3) for key in keys]
    note = "Word error rate and sentence accuracy in percent, the others as computed by COCO's tools."
    return metric_table(specs, scores, note=note)


def watched_metric(dataset: CaptionDataset) -> str:
    """Returns the watched metric: word error rate if the words have times (speech), CIDEr otherwise."""
    return "WER" if dataset.items[0].words else "CIDEr"


def describe_input(model: Any) -> str:
    """Returns the input size of a describer, for a model card."""
    inputs = [f"{rate:g} tokens of {name} ({model.features[name]} wide)" for name, rate in model.rates.items()]
    return f"{model.seconds:g} seconds of {' and '.join(inputs)} a second, and one sentence"


@renamed_argument("how", "generation")
def describe_clips(
    model: nn.Module,
    dataset: CaptionDataset,
    indices: Sequence[int] | None = None,
    *,
    generation: Any = None,
    context: int = 0,
    batch_size: int = 32,
    device: str | torch.device = "auto",
    precision: Precision = "float32",
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, str]:
    """Generates a caption for each clip; arguments and errors as of :func:`evaluate_captions`.

    Returns:
        The captions by item id, for ``indices`` or for all clips by default.
    """
    indices = range(len(dataset)) if indices is None else indices
    check_batches(batch_size, workers, precision)
    check_streams(model, dataset.modalities)
    described: Any = model
    if context and not described.context_tokens:
        raise ConfigError(f"context={context}: the model does not support earlier captions; use 0.")
    device = resolve_device(device)
    loader = DataLoader(Subset(Items(dataset), indices), batch_size, collate_fn=list, num_workers=workers)
    model.to(device)
    captions: dict[str, str] = {}
    done = 0
    with inference(model, device, precision, batch_size), plain_worker_errors():
        for clips in loader:
            numbers, done = indices[done : done + len(clips)], done + len(clips)
            before = context_tokens(described, [dataset.context(number, context) for number in numbers])
            streams = {name: move(stream, device) for name, stream in pad_streams(clips).items()}
            written = described.describe(
                streams, None if before is None else before.to(device), generation, seeds=list(numbers)
            )
            captions |= {dataset.items[number].id: text for number, text in zip(numbers, written, strict=True)}
            if progress is not None:
                progress(len(captions), len(indices))
    return captions


def caption_scores(dataset: CaptionDataset, captions: Mapping[str, str]) -> dict[str, float]:
    """Returns COCO's scores as fractions, and word error rate and sentence accuracy in percent.

    Both sides are lowercased and stripped of punctuation first. If some videos have more than five descriptions and
    each clip has exactly one, the scores include AutoAD's R@5/16 of these videos in percent, ranked by word overlap;
    see :func:`lamzoo.evaluation.neighbour_recall`.

    Args:
        dataset: the split.
        captions: by item id, for all items.

    Raises:
        DataError: the ids differ from the split's.
    """
    references, hypotheses = _compared(dataset, captions)
    scores = caption_metrics(references, hypotheses) | word_error_rate(references, hypotheses)
    groups: dict[str, list[str]] = {}
    for item in sorted(dataset.items, key=lambda item: item.start):
        groups.setdefault(item.video, []).append(item.id)
    single = all(len(texts) == 1 for texts in references.values())
    groups = {video: texts for video, texts in groups.items() if len(texts) > _NEAREST}  # in others every rank counts
    if single and groups:
        keys = [key for texts in groups.values() for key in texts]
        right, found = {key: references[key] for key in keys}, {key: hypotheses[key] for key in keys}
        recall = neighbour_recall(right, found, groups, k=_NEAREST, window=_NEIGHBOURS)
        scores[f"R@{_NEAREST}/{_NEIGHBOURS}"] = recall
    return scores


def _java_scores(dataset: CaptionDataset, captions: Mapping[str, str]) -> dict[str, float]:
    """Returns METEOR and SPICE as fractions if their Java tools are installed; logs why one is left out."""
    references, hypotheses = _compared(dataset, captions)
    scores: dict[str, float] = {}
    metrics: tuple[Literal["METEOR", "SPICE"], ...] = ("METEOR", "SPICE")
    for metric in metrics:
        try:
            scores |= caption_metrics(references, hypotheses, metrics=(metric,))
        except MissingExtraError as error:
            _logger.warning("%s is left out: %s", metric, error)
    return scores


def check_streams(model: nn.Module, modalities: Mapping[str, int]) -> None:
    """Raises an :class:`UnsupportedHostError` if a model does not accept these modalities."""
    wanted = getattr(model, "features", None)
    if not isinstance(wanted, dict) or not hasattr(model, "describe"):
        raise UnsupportedHostError(
            f"{type(model).__name__} does not generate captions; use a model of the family lam_describer."
        )
    if any(wanted.get(name) != width for name, width in modalities.items()):
        raise UnsupportedHostError(
            f"{type(model).__name__} reads {wanted}, but the data have {dict(modalities)}; create it with "
            f"features={dict(modalities)}, or use other data."
        )


def pad_streams(clips: Sequence[Mapping[str, Features]]) -> dict[str, Any]:
    """Collates the streams of several clips into one batch.

    Returns:
        A :class:`lamzoo.models.describer.encoder.StreamBatch` per modality that any clip has, padded with zeros.
    """
    from lamzoo.models.describer.encoder import StreamBatch

    found = {}
    for name in dict.fromkeys(name for clip in clips for name in clip):
        width = next(clip[name].features.shape[1] for clip in clips if name in clip)
        rows = [torch.from_numpy(clip[name].features) if name in clip else torch.zeros(0, width) for clip in clips]
        times = [torch.from_numpy(clip[name].times) if name in clip else torch.zeros(0) for clip in clips]
        masks = [torch.ones(len(row), dtype=torch.bool) for row in rows]
        found[name] = StreamBatch(*(nn.utils.rnn.pad_sequence(part, batch_first=True) for part in (rows, times, masks)))
    return found


def move(stream: Any, device: torch.device) -> Any:
    """Moves a stream to a device."""
    return type(stream)(*(part.to(device) for part in stream))


def context_tokens(model: Any, captions: Sequence[Sequence[str]]) -> Tensor | None:
    """Returns the tokens ``(B, W)`` of the latest earlier captions that fit; None if there are none.

    The oldest captions are dropped first, as a whole; a single caption that is too long loses its first tokens.
    """
    fitting = [_fitting(model, texts)[1] for texts in captions]
    if all(numbers is None for numbers in fitting):
        return None
    rows = torch.zeros(len(fitting), model.context_tokens, dtype=torch.int64)
    for row, numbers in zip(rows, fitting, strict=True):
        if numbers is not None:
            if len(numbers) > len(row):  # a single caption that is too long
                numbers = torch.cat([numbers[:1], numbers[len(numbers) - len(row) + 1 :]])
            row[: len(numbers)] = numbers
    return rows


def last_that_fit(model: Any, texts: Sequence[str]) -> tuple[str, ...]:
    """Returns the latest texts that fit into the model's context together, at least one if it has any context."""
    return _fitting(model, texts)[0]


def _fitting(model: Any, texts: Sequence[str]) -> tuple[tuple[str, ...], Tensor | None]:
    """Returns the latest texts that fit and their tokens, with start and end tokens; () and None if none fits."""
    room, said = model.context_tokens, [text for text in texts if text]
    if not room or not said:
        return (), None
    count, numbers = 1, _numbers(model, said[-1])
    while count < len(said):
        longer = _numbers(model, " ".join(said[-count - 1 :]))
        if len(longer) > room:
            break
        count, numbers = count + 1, longer
    return tuple(said[-count:]), numbers


def _numbers(model: Any, text: str) -> Tensor:
    """Returns all tokens of a text, with start and end tokens; every token covers at least one byte."""
    tokens: Tensor = model.tokenizer([text], context_length=len(text.encode()) + 2)[0]
    return tokens[: int(tokens.nonzero()[-1]) + 1]


def _compared(dataset: CaptionDataset, captions: Mapping[str, str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Returns normalised references and hypotheses by id."""
    references = {key: [_plain(text) for text in texts] for key, texts in dataset.references().items()}
    return references, {key: _plain(text) for key, text in captions.items()}


def _plain(text: str) -> str:
    plain = ""
    for sign in unicodedata.normalize("NFC", text.lower()):
        # Marks are parts of words, as vowels of Hindi and Thai are, unless they follow a picture or choose its form.
        is_mark = unicodedata.category(sign) in ("Mn", "Mc") and not "\ufe00" <= sign <= "\ufe0f"
        if sign.isalnum() or (is_mark and plain[-1:].strip()):
            plain += sign
        elif sign not in "\u200c\u200d":  # which join the letters of a word
            plain += " "
    return " ".join(plain.split()) or "_"
