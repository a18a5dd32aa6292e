"""The page for a describer: tokens of each modality over time, with frames and spectra, and the generated sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
from lamzoo.models.describer.generation import GenerationConfig
from lamzoo.report.explorer.document import Answer, Exploration, ExploredLayer, TokenRun
from lamzoo.report.explorer.runs import run_twice, thumbnails, write_page
from lamzoo.report.mask_pictures import title_of
from lamzoo.video.describe import DescribedWindow, VideoWindows

_FRAMES = 12
_SOUND = "audio"


def explore_description(model: nn.Module, dataset: CaptionDataset, item: str | None, path: str | Path) -> None:
    """Writes an interactive page of a describer's masks and attention for one clip, over time in seconds.

    The tokens are those of the joint encoder: the first token, each modality over time, and words of earlier sentences
    if the model reads them. Behind the tokens are frames of the clip, and the spectra of its sound. The prediction is
    the sentence with the masks and without. Otherwise as :func:`lamzoo.report.explore_image`.

    Args:
        model: a model of the family ``lam_describer`` with masks.
        dataset: a split of clips.
        item: id of the clip; None for the first one.
        path: the HTML file, in an existing folder; an older file is replaced.

    Raises:
        UnsupportedHostError: the model has no masks, is not a describer, or takes other features.
        ConfigError: its masks or scores are not finite.
        DataError: the split has no such clip, it can't be read, or the file can't be written.
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
    frames = dataset.frames(index, _FRAMES)
    facts = [f"in the data: “{text}”" for text in clip.captions]
    title = f"{title_of(network)} on {clip.id}"
    write_page(_explore(network, dataset.read(index), before, frames, title, facts), path)


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
        generation: the decoding settings of the description; greedy search by default.

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
    streams = windows.streams(described.number)
    decoding = (generation, [described.number])
    write_page(_explore(network, streams, described.context, frames, title, [], start, decoding), path)


def _explore(
    model: Any,
    streams: Mapping[str, Stream],
    before: Sequence[str],
    frames: Sequence[Image.Image],
    title: str,
    facts: Sequence[str],
    start: float = 0.0,
    decoding: tuple[GenerationConfig | None, Sequence[int] | None] = (None, None),
) -> Exploration:
    """Runs the model on a clip that starts at ``start`` seconds of its video; ``decoding`` has settings and seeds."""
    device = next(model.parameters()).device
    batch = {name: move(stream, device) for name, stream in pad_streams([streams]).items()}
    context = context_tokens(model, [before])
    context = None if context is None else context.to(device)

    def describe() -> str:
        (text,) = model.describe(batch, context, *decoding)
        return str(text)

    records, masked, plain = run_twice(model, describe)
    masks = masks_of(model)
    tokens = _tokens(model, streams, context, thumbnails(frames), start)
    layers = [
        ExploredLayer(name.removesuffix(".attn"), masks[f"{name}.lam"].config, record, tokens, tokens)
        for name, record in records.items()
    ]
    return Exploration(title, layers, facts, [Answer("sentence", f"“{masked}”", f"“{plain}”")])


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
