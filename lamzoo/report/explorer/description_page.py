"""The page for a describer: tokens of each modality over time, with frames and spectra, and the generated words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lamzoo.adapters.state import masks_of
from lamzoo.adapters.wrappers import unwrap
from lamzoo.data.captions import CaptionDataset
from lamzoo.data.captions.base import Stream
from lamzoo.data.captions.sound import PAIR
from lamzoo.data.grid_tokens import BANDS
from lamzoo.data.splits import index_of_id
from lamzoo.data.video.instants import Instants, middles
from lamzoo.data.video.reader import read_video
from lamzoo.evaluation.captions.evaluate import check_streams, context_tokens, move, pad_streams
from lamzoo.files import check_target
from lamzoo.lam import MaskRecord
from lamzoo.lam.layer import Scores
from lamzoo.models.describer.generation import GenerationConfig
from lamzoo.profiling.inputs import evaluating
from lamzoo.report.explorer.document import Answer, Exploration, ExploredLayer, TokenRun, UnmaskedLayer
from lamzoo.report.explorer.runs import frames_of, neutral_masks, run_twice, thumbnails, without_frames, write_page
from lamzoo.report.mask_pictures import title_of
from lamzoo.video.describe import DescribedWindow, VideoWindows

_FRAMES = 12
_SOUND = "audio"


def explore_description(
    model: nn.Module,
    dataset: CaptionDataset,
    item: str | None,
    path: str | Path,
    *,
    videos: str | Path | None = None,
) -> None:
    """Writes an interactive page of a describer's masks and attention for one clip, over time in seconds.

    The tokens are those of the joint encoder: the first token, each modality over time, and words of earlier sentences
    if the model reads them. Behind the tokens are frames of the clip, and the spectra of its sound. In the layers of
    the decoder, each generated token is a query: its attention to the tokens before it and to the encoder, with the
    masks and with neutral ones, for the sentence that was generated with the masks. The prediction is the sentence with
    the masks and without. Otherwise as :func:`lamzoo.report.explore_image`.

    Args:
        model: a model of the family ``lam_describer`` with masks.
        dataset: a split of clips.
        item: id of the clip; None for the first one.
        path: the HTML file, in an existing folder; an older file is replaced.
        videos: folder of video files for the frames of data that have only features, named by their movies (``mad:``)
            or clips (``lsmdc:``).

    Raises:
        UnsupportedHostError: the model has no masks, is not a describer, or takes other features.
        ConfigError: its masks or scores are not finite.
        DataError: the split has no such clip, it or its video can't be read, or the file can't be written.
        MissingExtraError: PyAV, which reads video files, is not installed.
    """
    path = Path(path)
    network: Any = unwrap(model)
    check_target(path, "page", suffix=".html")
    masks_of(network)
    check_streams(network, dataset.modalities)
    ids = [each.id for each in dataset.items]
    index = index_of_id(ids, item, f"the split {dataset.split!r} of {dataset.spec}", "clip")
    clip = dataset.items[index]
    before = dataset.context(index, network.context_tokens)
    place = dataset.place(index)
    frames = frames_of(dataset, index, _FRAMES, videos, place)
    streams = dataset.read(index)
    facts = [f"in the data: “{text}”" for text in clip.captions]
    if not frames and set(streams) - {_SOUND}:
        facts.append(without_frames(place[0]))
    title = f"{title_of(network)} on {clip.id}"
    write_page(_explore(network, _Clip(streams, before, frames), title, facts), path)


def explore_window(
    model: nn.Module,
    windows: VideoWindows,
    described: DescribedWindow,
    path: str | Path,
    *,
    generation: GenerationConfig | None = None,
) -> None:
    """Writes the page of :func:`explore_description` for one window of a video file.

    Args:
        model: the model that generated the description.
        windows: the windows of the video.
        described: the description of the window.
        path: the HTML file, in an existing folder; an older file is replaced.
        generation: the decoding settings of the description, also of that without masks; greedy search by default.

    Raises:
        UnsupportedHostError: as of :func:`explore_description`.
        ConfigError: as of :func:`explore_description`.
        DataError: the video can't be read, or the file can't be written.
    """
    path = Path(path)
    network: Any = unwrap(model)
    check_target(path, "page", suffix=".html")
    masks_of(network)
    check_streams(network, {})
    start, end = described.start, described.end
    frames = read_video(windows.path, Instants(at=middles(start, end, _FRAMES))).frames
    title = f"{title_of(network)} on {windows.path.name}, {start:.1f} to {end:.1f} s"
    clip = _Clip(windows.streams(described.number), described.context, frames, start)
    seeds = [described.number]
    write_page(_explore(network, clip, title, [], described.tokens, generation, seeds), path)


@dataclass(frozen=True)
class _Clip:
    """What is described.

    Attributes:
        streams: features by modality.
        before: earlier sentences.
        frames: of the clip, evenly spaced over it.
        start: seconds in its video.
    """

    streams: Mapping[str, Stream]
    before: Sequence[str]
    frames: Sequence[Image.Image]
    start: float = 0.0


def _explore(
    model: Any,
    clip: _Clip,
    title: str,
    facts: Sequence[str],
    written: Sequence[int] | None = None,
    generation: GenerationConfig | None = None,
    seeds: Sequence[int] | None = None,
) -> Exploration:
    """Runs the model on a clip; ``written`` are the token ids of its sentence, None to generate it."""
    device = next(model.parameters()).device
    batch = {name: move(stream, device) for name, stream in pad_streams([clip.streams]).items()}
    context = context_tokens(model, [clip.before])
    context = None if context is None else context.to(device)

    def generate() -> list[int]:
        return list(model.generate(batch, context, generation, seeds)[0].tokens)

    with evaluating(model), torch.no_grad():
        tokens = generate() if written is None else list(written)
        with neutral_masks(model):
            without = generate()
    longest = generation.max_length if generation is not None and generation.max_length else model.context_length
    words = _Words.of(model.tokenizer, tokens, has_end=len(tokens) + 1 < longest)
    text = torch.tensor([[model.tokenizer.sot_token_id, *tokens][: len(words.read[0])]], device=device)

    def read() -> dict[str, Scores]:
        """Reads the whole sentence at once, and returns the scores of the decoder's layers."""
        joint = model.encode(batch, context)
        scores: dict[str, Scores] = model.decoder.attention_scores(text, joint.tokens, joint.mask)
        return scores

    records, masked, plain = run_twice(model, read)
    seen = _tokens(model, clip.streams, context, thumbnails(clip.frames), clip.start)
    layers = _layers(model, records, masked, plain, seen, words)
    masked_text, plain_text = (f"“{str(model.tokenizer.decode(each)).strip()}”" for each in (tokens, without))
    about = (
        "To see what a word of the sentence was generated from, choose a layer of the decoder and point at the word."
    )
    return Exploration(title, layers, [*facts, about], [Answer("sentence", masked_text, plain_text)])


@dataclass(frozen=True)
class _Words:
    """Tokens of a generated sentence.

    Attributes:
        generated: those that the queries generate, the end included.
        read: those that are read, the start included.
    """

    generated: tuple[TokenRun, ...]
    read: tuple[TokenRun, ...]

    @classmethod
    def of(cls, tokenizer: Any, tokens: Sequence[int], *, has_end: bool) -> _Words:
        """Describes tokens; a sentence without an end was cut at the longest length."""
        texts = tuple(str(tokenizer.decode([number])).strip() for number in tokens)
        generated = (*texts, "<end>") if has_end else texts
        read = ("<start>", *texts)[: len(generated)]
        return cls((TokenRun("generated word", generated),), (TokenRun("word so far", read),))


def _layers(
    model: Any,
    records: Mapping[str, MaskRecord],
    masked: Mapping[str, Scores],
    plain: Mapping[str, Scores],
    seen: tuple[TokenRun, ...],
    words: _Words,
) -> list[ExploredLayer | UnmaskedLayer]:
    """Returns the layers of the encoder, and those of the decoder, which usually have no masks of their own."""
    masks = masks_of(model)
    decoder = {f"decoder.{path}": path for path in masked}
    layers: list[ExploredLayer | UnmaskedLayer] = [
        ExploredLayer(name.removesuffix(".attn"), masks[f"{name}.lam"].config, record, seen, seen)
        for name, record in records.items()
        if name not in decoder
    ]
    for name, path in decoder.items():
        with_memory = "cross" not in path and masked[path].key.shape[2] > len(words.read[0])  # as a prefix
        keys = seen if "cross" in path else (*seen, *words.read) if with_memory else words.read
        title = name.removesuffix(".attn")
        if name in records:
            queries = (*seen, *words.generated) if with_memory else words.generated
            layers.append(ExploredLayer(title, masks[f"{name}.lam"].config, records[name], queries, keys))
        else:
            layers.append(UnmaskedLayer(title, masked[path], plain[path], words.generated, keys))
    return layers


def _tokens(
    model: Any, streams: Mapping[str, Stream], context: Tensor | None, frames: tuple[Image.Image, ...], start: float
) -> tuple[TokenRun, ...]:
    """Returns the tokens of the joint encoder, in its order."""
    runs = [TokenRun("token", ("first",))]
    for name in (name for name in model.features if name in streams):
        stream = streams[name]
        times = tuple(f"{start + time:.2f} s" for time in stream.times.tolist())
        side = math.isqrt(len(times))
        if len(frames) == 1 and side**2 == len(times):  # patches of a photograph, row by row
            runs.append(TokenRun(name, grid=(side, side), picture=frames[0]))
        elif name == _SOUND and stream.features.shape[1] == PAIR * BANDS:
            runs.append(TokenRun(name, times, picture=_spectra(stream), time=True))
        else:
            runs.append(TokenRun(name, times, time=True, frames=frames))
    if context is not None:
        words = (model.tokenizer.decode([number]) if number else "" for number in context[0].tolist())
        runs.append(TokenRun("earlier word", tuple(words)))
    return tuple(runs)


def _spectra(stream: Stream) -> Image.Image:
    """Returns the mel bands of the sound as a picture, time to the right, low bands below."""
    bands = stream.features.reshape(-1, BANDS).T[::-1]
    low, high = np.percentile(bands, (2, 98))
    return Image.fromarray((255 * np.clip((bands - low) / max(high - low, 1e-6), 0, 1)).astype(np.uint8))
