"""A raw video, window by window: the streams that a describer reads, and the sentence that it writes for each."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lamzoo.data.audio.spectra import read_log_mel
from lamzoo.data.captions.base import Features, Stream
from lamzoo.data.captions.feature_files import row_times, rows_within
from lamzoo.data.captions.sound import PAIR, sound_stream
from lamzoo.data.grid_tokens import BANDS
from lamzoo.data.moments.feature_folder import unit
from lamzoo.data.video.reader import probe_video
from lamzoo.errors import ConfigError, DataError, UnsupportedHostError
from lamzoo.evaluation.captions.evaluate import check_streams, context_tokens, last_that_fit, move, pad_streams
from lamzoo.evaluation.runtime import inference, resolve_device
from lamzoo.lazy import renamed_argument
from lamzoo.registry.factory import create_model
from lamzoo.video.extractor import FeatureExtractor, feature_widths

_logger = logging.getLogger(__name__)

TOWERS = "open_clip/ViT-B-32:openai"  # whose features of frames are read where nothing else is said

_RATE = 5.0  # frames a second of models that don't say theirs
_SHORTEST = 0.1  # seconds of a window
_NEGLIGIBLE = 0.01  # of a window: a rest that the last one takes in
_NAMED = 5  # windows in a warning

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class DescribedWindow:
    """A part of a video and what was written of it.

    Attributes:
        number: of the window in its video, from 0.
        start: seconds from the video's first frame.
        end: likewise.
        text: the sentence; empty where the model writes none.
        tokens: of the sentence, without start and end.
        context: the sentences before, as far as the model read them.
        modalities: those that the window had features of.
    """

    number: int
    start: float
    end: float
    text: str
    tokens: tuple[int, ...]
    context: tuple[str, ...]
    modalities: tuple[str, ...]


class VideoWindows:
    """A video, or a part of it, in windows of one length, with the streams of each that a describer reads.

    The streams are to the bit what ``videos:DIR`` gives for the same span, with features that ``lamzoo
    extract-features --clip-seconds 1/RATE`` made: ``video``, the embeddings of so many frames a second, scaled to
    length 1, which are read once for all windows, some frames at a time; and ``audio``, 50 tokens a second, each two
    spectra of 64 mel bands. Other modalities can't be made of a file: a model that reads ``mouth`` and ``audio`` gets
    ``audio``.

    Args:
        path: the video file.
        model: of the family ``lam_describer``; says which modalities, and how wide.
        towers: a name, or model, as of :class:`FeatureExtractor`; nothing is created where the model
            reads no ``video``.
        rate: frames a second; the model's own by default, 5 where it has none.
        seconds: length of a window, at least 0.1; the model's own by default. The last one is what is left.
        start: of the part, seconds from the video's first frame.
        end: likewise; by default the video's.
        device: of the towers.

    Attributes:
        path: the file.
        duration: of the whole video, seconds.
        rate: frames a second; None where no frames are looked at.
        seconds: length of a window.
        spans: start and end of each window, seconds.
        modalities: those that are made.
        missing: those that the model reads too, and that can't be made of this file.

    Raises:
        ConfigError: a rate, length, start or end that is not possible.
        DataError: the video can't be read, or has no sound and the model listens only.
        UnsupportedHostError: the model describes nothing, none of its modalities can be made, or the towers' features
            are of another width.
        MissingExtraError: PyAV is not installed.
        WeightsError: the weights of the towers cannot be had.
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
            raise ConfigError(f"{rate:g} frames a second can't be looked at; the rate must be more than 0")
        info = probe_video(self.path)
        self.duration = info.duration
        self.spans = _cut(self.path, info.duration, self.seconds, start, end)
        self.modalities, self.missing = _modalities(self.path, describer, info.has_audio)
        self._extractor: FeatureExtractor | None = None
        self._rows: Features | None = None
        self._first = self._count = 0
        self.rate: float | None = None
        if "video" in self.modalities:
            widths = feature_widths(towers) if isinstance(towers, str) else None
            if widths is not None:
                _check_width(describer, widths[0])  # before weights of towers that do not fit are asked for
            self._extractor = FeatureExtractor(towers, clip_seconds=1 / rate, device=device)
            self.rate = 1 / self._extractor.clip_seconds  # rounded as readers of its files do
            _check_width(describer, self._extractor.video_dim)

    def __len__(self) -> int:
        return len(self.spans)

    def read(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Looks at the frames of all windows, once; :meth:`streams` does so where nobody did.

        Args:
            progress: called with the frames that are seen, and how many there are.

        Raises:
            ConfigError: the features are not finite, or a batch does not fit on the device.
            DataError: the video can't be read.
        """
        if self._extractor is None or self.rate is None or self._rows is not None:
            return
        self._count = self._extractor.sampling.clips(self.duration)
        wanted = [rows_within(self._count, self.rate, start, end) for start, end in self.spans]
        self._first = min(rows.start for rows in wanted)
        clips = range(self._first, max(rows.stop for rows in wanted))
        seen = self._extractor.video(self.path, clips, progress)
        self._count = self._extractor.sampling.clips(seen.duration)  # decoding may show that the file's index was wrong
        self._rows = seen.clips

    def streams(self, number: int) -> dict[str, Stream]:
        """Returns the features of a window by modality, without those it lacks: none where it is silent.

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
            heard = read_log_mel(self.path, start, end, bands=BANDS)
            if heard is not None and len(heard[0]) >= PAIR:
                found["audio"] = sound_stream(heard[0])
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
    """Lets a model write a sentence for each window, one after the other; a window without any features is left out.

    Args:
        model: of the family ``lam_describer``, on its device.
        windows: made for this model.
        generation: a :class:`lamzoo.models.describer.generation.GenerationConfig`; greedily by default.
        context: whether the model reads the sentences that it wrote before, the last that fit; by default where it has
            room for them.
        progress: called with what is done (``"frames"``, ``"windows"``), behind how much of it, and of how much.

    Raises:
        ConfigError: a context that the model has no room for, or a length that it was not built for.
        DataError: the video or its sound can't be read, or no window has any features.
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
    """Describes a video file, a sentence for each window.

    Args:
        path: the file.
        model: of the family ``lam_describer``, or its name, which is created with its weights; left on the device.
        towers: what makes features of frames, and the further arguments: as of :class:`VideoWindows`.
        rate: frames a second.
        seconds: length of a window.
        start: of the part that is described, seconds.
        end: likewise.
        generation: as of :func:`describe_windows`, and so the rest.
        context: whether the model reads what it wrote before.
        device: as torch writes it, or ``"auto"``.
        progress: called as there.

    Returns:
        The windows, in their order, without those that have no features.

    Raises:
        ConfigError: an argument that is not possible.
        DataError: the video can't be read, or nothing of it can be described.
        UnsupportedHostError: the model describes nothing, or none of what it reads can be made of a file.
        MissingExtraError: PyAV is not installed.
        WeightsError: the weights of a model cannot be had.
    """
    device = resolve_device(device)
    network = create_model(model, pretrained=True) if isinstance(model, str) else model
    network.to(device)
    windows = VideoWindows(
        path, network, towers=towers, rate=rate, seconds=seconds, start=start, end=end, device=device
    )  # fmt: skip
    return describe_windows(network, windows, generation=generation, context=context, progress=progress)


def context_of(model: Any, texts: Sequence[str], device: torch.device) -> Tensor | None:
    """Returns the tokens of sentences before, ``(1, W)``, on a device; None where there are none."""
    tokens = context_tokens(model, [texts])
    return None if tokens is None else tokens.to(device)


def _check_width(model: Any, given: int) -> None:
    if model.features["video"] != given:
        raise UnsupportedHostError(
            f"{type(model).__name__} reads {model.features['video']} features of a frame, and the towers give "
            f"{given}; name those that made the features that it was trained on."
        )


def _cut(path: Path, duration: float, seconds: float, start: float, end: float | None) -> list[tuple[float, float]]:
    """Returns start and end of each window; the last one is what is left, and more by a negligible rest."""
    stop = duration if end is None else min(end, duration)
    if not 0 <= start < stop:
        asked = f"{start:g} to {'its end' if end is None else f'{end:g} s'}"
        raise ConfigError(f"{path} is {duration:g} s long and was to be described from {asked}; name a part of it")
    if stop - start < seconds * (1 - _NEGLIGIBLE):
        _logger.warning(
            "%s has %.1f s to describe, less than a window of %g s, which it then is by itself",
            path, stop - start, seconds,
        )  # fmt: skip
    count = max(1, math.ceil((stop - start) / seconds - _NEGLIGIBLE))
    edges = [start + number * seconds for number in range(count)]
    return list(zip(edges, [*edges[1:], stop], strict=True))


def _modalities(path: Path, model: Any, has_audio: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns which modalities of a model can be made of a file, and which not; says so where it matters."""
    makes = {"video": model.features.get("video"), "audio": PAIR * BANDS}
    known = tuple(name for name, width in model.features.items() if makes.get(name) == width)
    strange = [name for name in model.features if name not in known]
    if not known:
        raise UnsupportedHostError(
            f"{type(model).__name__} reads {model.features}, none of which can be made of a video file; use a model "
            f"that reads 'video', features of frames, or 'audio', {PAIR * BANDS} wide."
        )
    found = known if has_audio else tuple(name for name in known if name != "audio")
    if not found:
        raise DataError(f"{path} has no sound, and of what the model reads only that could be made; use another model")
    if strange:
        _logger.warning(
            "%s can't be made of a video file: described from %s alone", " and ".join(strange), " and ".join(found)
        )
    if "audio" in known and not has_audio:
        _logger.warning("%s has no sound: described from %s alone", path, " and ".join(found))
    return found, tuple(name for name in model.features if name not in found)


def _say_what_lacked(windows: VideoWindows, described: Sequence[DescribedWindow], left_out: Sequence[int]) -> None:
    if not described:
        raise DataError(
            f"none of the {len(windows)} windows of {windows.path} has {' or '.join(windows.modalities)}, as where all "
            "is silent; describe another part, or use another model"
        )
    if left_out:
        _logger.warning(
            "left out of %s, for want of %s: %s",
            windows.path, " and ".join(windows.modalities), _times(windows, left_out),
        )  # fmt: skip
    silent = [each.number for each in described if "audio" in windows.modalities and "audio" not in each.modalities]
    if silent:
        others = " and ".join(name for name in windows.modalities if name != "audio")
        _logger.warning("%s is silent here, described from %s alone: %s", windows.path, others, _times(windows, silent))


def _times(windows: VideoWindows, numbers: Sequence[int]) -> str:
    few = ", ".join("{:.1f} to {:.1f} s".format(*windows.spans[number]) for number in numbers[:_NAMED])
    return f"{few} and {len(numbers) - _NAMED} more windows" if len(numbers) > _NAMED else few
