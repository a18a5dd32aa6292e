"""Description of raw video files: the input streams of each window, and one generated sentence per window."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lamzoo.data.captions.base import Stream
from lamzoo.data.captions.feature_files import row_times, rows_within
from lamzoo.data.captions.sound import PAIR, read_sound_stream
from lamzoo.data.feature_arrays import Features, unit
from lamzoo.data.grid_tokens import BANDS
from lamzoo.data.video.reader import probe_video
from lamzoo.errors import ConfigError, DataError, UnsupportedHostError
from lamzoo.evaluation.captions.evaluate import check_streams, context_tokens, last_that_fit, move, pad_streams
from lamzoo.evaluation.runtime import inference, resolve_device
from lamzoo.lazy import renamed_argument
from lamzoo.registry.factory import create_model
from lamzoo.video.extractor import FeatureExtractor, feature_widths

_logger = logging.getLogger(__name__)

TOWERS = "open_clip/ViT-B-32:openai"  # default towers for frame features

_RATE = 5.0  # frames per second of models without a rate of their own
_SHORTEST = 0.1  # minimum length of a window, seconds
_NEGLIGIBLE = 0.01  # fraction of a window: a remainder up to this is merged into the last window
_NAMED = 5  # maximum number of windows in a warning

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class DescribedWindow:
    """A window of a video and its description.

    Attributes:
        number: index of the window in its video, from 0.
        start: seconds from the first frame of the video.
        end: likewise.
        text: the sentence; empty if the model generated none.
        tokens: token ids of the sentence, without start and end.
        context: the previous sentences that the model was conditioned on.
        modalities: the modalities for which the window has features.
    """

    number: int
    start: float
    end: float
    text: str
    tokens: tuple[int, ...]
    context: tuple[str, ...]
    modalities: tuple[str, ...]


class VideoWindows:
    """Windows of equal length of a video, or of a part of it, with the input streams of a describer.

    The streams are bitwise equal to those of ``videos:DIR`` for the same span with features from ``lamzoo
    extract-features --clip-seconds 1/RATE``. ``video``: embeddings of ``rate`` frames per second, normalised to length
    1; they are computed once for all windows, in batches. ``audio``: 50 tokens per second, each two spectra of 64 mel
    bands. Other modalities can't be computed from a file: a model that takes ``mouth`` and ``audio`` gets ``audio``
    only.

    Args:
        path: the video file.
        model: a model of the family ``lam_describer``, which defines the modalities and their widths.
        towers: name or model for :class:`FeatureExtractor`; not created if the model takes no ``video``.
        rate: frames per second; by default that of the model, or 5 if it has none.
        seconds: length of a window, at least 0.1; that of the model by default. The last window may be shorter.
        start: start of the part, seconds from the first frame of the video.
        end: end of the part, seconds; the end of the video by default.
        device: device of the towers.

    Attributes:
        path: the file.
        duration: duration of the whole video, seconds.
        rate: frames per second; None if no frames are used.
        seconds: length of a window.
        spans: start and end of each window, seconds.
        modalities: the modalities computed from the file.
        missing: the modalities of the model that can't be computed from the file.

    Raises:
        ConfigError: an invalid rate, length, start or end.
        DataError: the video can't be read, or it has no sound and the model takes only audio.
        UnsupportedHostError: the model is not a describer, none of its modalities can be computed, or the features of
            the towers have another width.
        MissingExtraError: PyAV is not installed.
        WeightsError: the weights of the towers are not available.
    """

    def __init__(
        self,
        path: str | Path,
        model: nn.Module,
        *,
        towers: str | nn.Module = TOWERS,
        rate: float | None = None,
        seconds: float | None = None,
        start: float = 0.0,
        end: float | None = None,
        device: str | torch.device = "auto",
    ) -> None:
        check_streams(model, {})
        describer: Any = model
        self.path, self.seconds = Path(path), float(describer.seconds if seconds is None else seconds)
        if not _SHORTEST <= self.seconds < math.inf:
            raise ConfigError(f"a window is {self.seconds:g} s long; it must be at least {_SHORTEST} s")
        rate = describer.rates.get("video", _RATE) if rate is None else rate
        if not (rate > 0 and math.isfinite(rate)):
            raise ConfigError(f"the rate is {rate:g} frames per second; it must be above 0")
        info = probe_video(self.path)
        self.duration = info.duration
        self.spans = _cut(self.path, info.duration, self.seconds, start, end)
        self.modalities, self.missing = _modalities(self.path, describer, info.has_audio)
        self._extractor: FeatureExtractor | None = None
        self._rows: Features | None = None
        self._first = self._count = 0
        self.rate: float | None = None
        if "video" in self.modalities:
            check_towers(describer, towers)
            self._extractor = FeatureExtractor(towers, clip_seconds=1 / rate, device=device)
            self.rate = 1 / self._extractor.clip_seconds  # rounded as in the readers of feature files
            _check_width(describer, self._extractor.video_dim)

    def __len__(self) -> int:
        return len(self.spans)

    def read(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Computes the frame features of all windows, once; called by :meth:`streams` if necessary.

        Args:
            progress: called with the number of frames read and their total.

        Raises:
            ConfigError: the features are not finite, or a batch doesn't fit into the memory of the device.
            DataError: the video can't be read.
        """
        if self._extractor is None or self.rate is None or self._rows is not None:
            return
        self._count = self._extractor.sampling.clips(self.duration)
        wanted = [rows_within(self._count, self.rate, start, end) for start, end in self.spans]
        self._first = min(rows.start for rows in wanted)
        clips = range(self._first, max(rows.stop for rows in wanted))
        seen = self._extractor.video(self.path, clips, progress)
        self._count = self._extractor.sampling.clips(seen.duration)  # decoding may correct a wrong index
        self._rows = seen.clips

    def streams(self, number: int) -> dict[str, Stream]:
        """Returns the features of a window by modality; missing modalities, such as silent audio, are left out.

        Raises:
            DataError: the video or its sound can't be read.
        """
        start, end = self.spans[number]
        self.read()
        found = {}
        if self._rows is not None and self.rate is not None:
            rows = rows_within(self._count, self.rate, start, end)
            seen = self._rows[rows.start - self._first : rows.stop - self._first]
            if len(seen) == len(rows):
                found["video"] = Stream(unit(seen), row_times(rows, self.rate, start))
        if "audio" in self.modalities:
            sound = read_sound_stream(self.path, start, end)
            if sound is not None:
                found["audio"] = sound
        return {name: found[name] for name in self.modalities if name in found}


@renamed_argument("how", "generation")
def describe_windows(
    model: nn.Module,
    windows: VideoWindows,
    *,
    generation: Any = None,
    context: bool | None = None,
    progress: Progress | None = None,
) -> list[DescribedWindow]:
    """Generates a sentence for each window, in order; windows without features are skipped.

    Args:
        model: a model of the family ``lam_describer``, on its device.
        windows: the windows, created for this model.
        generation: a :class:`lamzoo.models.describer.generation.GenerationConfig`; greedy search by default.
        context: whether to condition on the previous sentences, as many as fit; by default if the model supports it.
        progress: called with the stage (``"frames"`` or ``"windows"``), the number done and the total.

    Raises:
        ConfigError: the model doesn't support a context, or the generated length.
        DataError: the video or its sound can't be read, or no window has features.
    """
    describer: Any = model
    if context and not describer.context_tokens:
        raise ConfigError(
            f"{type(model).__name__} has no room for the sentences before; leave the context out, or take a model with "
            "context_tokens"
        )
    device = next(model.parameters()).device
    told = progress or (lambda done, total, what: None)
    windows.read(lambda done, total: told(done, total, "frames"))
    described: list[DescribedWindow] = []
    left_out = []
    with inference(model, device, "float32", 1):
        for number, (start, end) in enumerate(windows.spans):
            streams = windows.streams(number)
            if streams:
                before = () if context is False else last_that_fit(describer, [each.text for each in described])
                batch = {name: move(stream, device) for name, stream in pad_streams([streams]).items()}
                (written,) = describer.generate(batch, context_of(describer, before, device), generation, [number])
                text = str(describer.tokenizer.decode(written.tokens)).strip()
                described.append(
                    DescribedWindow(number, start, end, text, tuple(written.tokens), before, tuple(streams))
                )
            else:
                left_out.append(number)
            told(number + 1, len(windows), "windows")
    _say_what_lacked(windows, described, left_out)
    return described


@renamed_argument("how", "generation")
def describe_video(
    path: str | Path,
    model: str | nn.Module,
    *,
    towers: str | nn.Module = TOWERS,
    rate: float | None = None,
    seconds: float | None = None,
    start: float = 0.0,
    end: float | None = None,
    generation: Any = None,
    context: bool | None = None,
    device: str | torch.device = "auto",
    progress: Progress | None = None,
) -> list[DescribedWindow]:
    """Describes a video file, one sentence per window.

    Args:
        path: the file.
        model: a model of the family ``lam_describer``, or the name of one with weights; it is moved to the device.
        towers: towers that compute the frame features, as for :class:`VideoWindows`.
        rate: frames per second.
        seconds: length of a window.
        start: start of the part to describe, seconds.
        end: end of the part, seconds.
        generation: decoding settings, as for :func:`describe_windows`.
        context: whether to condition on the previous sentences, as for :func:`describe_windows`.
        device: a torch device, or ``"auto"``.
        progress: called as for :func:`describe_windows`.

    Returns:
        The windows in order, without those that have no features.

    Raises:
        ConfigError: an argument is invalid.
        DataError: the video can't be read, or no window has features.
        UnsupportedHostError: the model is not a describer, or none of its modalities can be computed from a file.
        MissingExtraError: PyAV is not installed.
        WeightsError: the weights of a model are not available.
    """
    device = resolve_device(device)
    network = create_model(model, pretrained=True) if isinstance(model, str) else model
    windows = VideoWindows(
        path, network, towers=towers, rate=rate, seconds=seconds, start=start, end=end, device=device
    )  # fmt: skip
    network.to(device)
    return describe_windows(network, windows, generation=generation, context=context, progress=progress)


def as_record(windows: VideoWindows, described: Sequence[DescribedWindow]) -> dict[str, Any]:
    """Returns a described video as JSON values: what was read, the windows, and the skipped ones."""
    there = {each.number for each in described}
    return {
        "video": os.fsencode(windows.path).decode("utf-8", "replace"),
        "duration": windows.duration,
        "rate": windows.rate,
        "seconds": windows.seconds,
        "modalities": list(windows.modalities),
        "missing": list(windows.missing),
        "windows": [
            {"start": each.start, "end": each.end, "text": each.text, "modalities": list(each.modalities)}
            for each in described
        ],
        "skipped": [
            {"start": start, "end": end} for number, (start, end) in enumerate(windows.spans) if number not in there
        ],
    }


def context_of(model: Any, texts: Sequence[str], device: torch.device) -> Tensor | None:
    """Returns the token ids of previous sentences, ``(1, W)``, on a device; None if there are none."""
    tokens = context_tokens(model, [texts])
    return None if tokens is None else tokens.to(device)


def check_towers(model: Any, towers: str | nn.Module) -> None:
    """Raises an :class:`UnsupportedHostError` for unsuitable towers, before their weights are downloaded."""
    widths = feature_widths(towers) if isinstance(towers, str) else None
    if widths is not None:
        _check_width(model, widths[0])


def _check_width(model: Any, given: int) -> None:
    if model.features["video"] != given:
        raise UnsupportedHostError(
            f"{type(model).__name__} takes {model.features['video']} features per frame, and the towers compute "
            f"{given}; use the towers whose features it was trained on."
        )


def _cut(path: Path, duration: float, seconds: float, start: float, end: float | None) -> list[tuple[float, float]]:
    """Returns start and end of each window; the last one is the remainder, or is extended by a negligible one."""
    stop = duration if end is None else min(end, duration)
    if not 0 <= start < stop:
        asked = f"{start:g} to {'its end' if end is None else f'{end:g} s'}"
        raise ConfigError(f"{path} is {duration:g} s long and has no part from {asked}; set start and end within it")
    if stop - start < seconds * (1 - _NEGLIGIBLE):
        _logger.warning(
            "%s has %.1f s to describe, less than a window of %g s; they are described as one window",
            path, stop - start, seconds,
        )  # fmt: skip
    count = max(1, math.ceil((stop - start) / seconds - _NEGLIGIBLE))
    edges = [start + number * seconds for number in range(count)]
    return list(zip(edges, [*edges[1:], stop], strict=True))


def _modalities(path: Path, model: Any, has_audio: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the modalities of a model that can be computed from a file and those that can't; logs the latter."""
    makes = {"video": model.features.get("video"), "audio": PAIR * BANDS}
    known = tuple(name for name, width in model.features.items() if makes.get(name) == width)
    strange = [name for name in model.features if name not in known]
    if not known:
        raise UnsupportedHostError(
            f"{type(model).__name__} takes {model.features}, none of which can be computed from a video file; use a "
            f"model that takes 'video', features of frames, or 'audio', {PAIR * BANDS} wide."
        )
    found = known if has_audio else tuple(name for name in known if name != "audio")
    if not found:
        raise DataError(f"{path} has no sound, the only input of the model that a file can provide; use another model")
    if strange:
        _logger.warning(
            "%s can't be computed from a video file: described from %s alone",
            " and ".join(strange),
            " and ".join(found),
        )
    if "audio" in known and not has_audio:
        _logger.warning("%s has no sound: described from %s alone", path, " and ".join(found))
    return found, tuple(name for name in model.features if name not in found)


def _say_what_lacked(windows: VideoWindows, described: Sequence[DescribedWindow], left_out: Sequence[int]) -> None:
    if not described:
        raise DataError(
            f"none of the {len(windows)} windows of {windows.path} has {' or '.join(windows.modalities)} (silent audio "
            "has no features); describe another part, or use another model"
        )
    if left_out:
        _logger.warning(
            "skipped windows of %s without %s: %s",
            windows.path, " and ".join(windows.modalities), _times(windows, left_out),
        )  # fmt: skip
    silent = [each.number for each in described if "audio" in windows.modalities and "audio" not in each.modalities]
    if silent:
        others = " and ".join(name for name in windows.modalities if name != "audio")
        _logger.warning(
            "%s has silent windows, described from %s alone: %s", windows.path, others, _times(windows, silent)
        )


def _times(windows: VideoWindows, numbers: Sequence[int]) -> str:
    few = ", ".join("{:.1f} to {:.1f} s".format(*windows.spans[number]) for number in numbers[:_NAMED])
    return f"{few} and {len(numbers) - _NAMED} more windows" if len(numbers) > _NAMED else few
