"""Log-mel spectra of audio tracks, read through PyAV, and their conversion to tokens."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from lamzoo.data.paths import open_listed
from lamzoo.data.video.packets import import_av, open_container
from lamzoo.errors import DataError

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame
    from av.audio.resampler import AudioResampler
    from av.audio.stream import AudioStream
    from av.container import InputContainer

Spectra: TypeAlias = NDArray[np.float32]

RATE = 16_000  # samples per second
HOP = 0.01  # seconds from one spectrum to the next
FLOOR = 1e-8  # minimum power; silence

_WINDOW, _FFT = 400, 512  # samples: 25 ms; with an FFT of 400 the lowest of 64 bands would contain no bin
_LOWEST, _HIGHEST = 20.0, 7600.0  # Hz
_WARM_UP = 0.5  # seconds decoded before the requested span
_JITTER = 0.02  # seconds by which a frame's time may differ from the end of the previous sound without a gap
_OVERLAP = 0.5  # seconds of overlapping sound that are dropped without a warning
_LONGEST = 12 * 3600  # maximum duration of sound that is read at once, seconds
_TAG = b"ID3"

_logger = logging.getLogger(__name__)


def read_log_mel(path: str | Path, start: float = 0.0, end: float = math.inf) -> Spectra | None:
    """Reads the log-mel spectra of a video or audio file, or of a span of it.

    The mean of the channels is resampled to 16 kHz. The spectra are those of
    ``torchaudio.transforms.MelSpectrogram(16000, n_fft=512, win_length=400, hop_length=160, f_min=20, f_max=7600,
    n_mels=64, mel_scale="htk", norm=None)``: power in triangular filters on HTK's mel scale, of a periodic Hann
    window of 25 ms, every 10 ms. Sound is aligned by the timestamps of its frames: gaps are silence, and overlapping
    sound is dropped. The audio format may change within a track.

    Args:
        path: the file; its content, not its extension, determines the format.
        start: start of the span, seconds from the first frame of the video, or of the audio in a file without video.
        end: end of the span; that of the track by default.

    Returns:
        The log10 of the powers, ``(N, 64)``, float32, at least -8; the middle of spectrum k is ``k * 10`` ms after
        ``start``. None if the file has no audio track, or the span is silent.

    Raises:
        DataError: the file does not exist, FFmpeg can't read it, its sound is damaged, its timestamps restart in the
            middle, or over 12 hours would be read; names it.
        MissingExtraError: PyAV is not installed.
    """
    samples = _samples(path, start, end)
    return log_mel(samples) if samples.any() else None


def log_mel(samples: NDArray[np.float32]) -> Spectra:
    """Computes the spectra of :func:`read_log_mel`, ``(N // 160, 64)``, of samples ``(N,)`` at 16 kHz."""
    count = len(samples) * 100 // RATE
    padded = np.pad(samples, (0, max(0, _FFT - len(samples))))  # the padding reflects samples at both ends
    transformed = torch.stft(
        torch.from_numpy(padded), _FFT, round(RATE * HOP), _WINDOW, torch.hann_window(_WINDOW), return_complex=True
    )
    power = transformed.abs().square().T[:count] @ torch.from_numpy(mel_filters()).float()
    return power.clamp(min=FLOOR).log10().numpy()


def mel_filters(bands: int = 64) -> NDArray[np.float64]:
    """Returns the mel filter bank, ``(257, bands)``: the weight of each Fourier bin in each band, at most 1."""
    edges = _from_mel(np.linspace(_to_mel(_LOWEST), _to_mel(_HIGHEST), bands + 2))
    frequencies = np.linspace(0, RATE / 2, _FFT // 2 + 1)[:, None]
    rising = (frequencies - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - frequencies) / np.diff(edges)[1:]
    return np.clip(np.minimum(rising, falling), 0, None)


def stack_spectra(spectra: Spectra, count: int) -> Spectra:
    """Subtracts the mean of spectra ``(N, bands)`` and concatenates groups: ``(N // count, count * bands)``.

    An incomplete group at the end is dropped.
    """
    centred = (spectra - spectra.mean(axis=0))[: len(spectra) // count * count]
    return centred.reshape(-1, count * spectra.shape[1])


def _to_mel(frequency: float) -> float:
    return float(2595 * np.log10(1 + frequency / 700))


def _from_mel(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    return 700 * (10 ** (mel / 2595) - 1)


def _samples(path: str | Path, start: float, end: float) -> NDArray[np.float32]:
    """Returns the samples of a span, mono, -1 to 1; empty if the file has no audio track."""
    with _opened(path) as container:
        track: Any = container.streams.best("audio")
        if track is None:
            return np.zeros(0, np.float32)
        video = container.streams.best("video")
        shown = video if video is not None and video.start_time is not None else track
        zero = (shown.start_time or 0) * float(shown.time_base or 1)
        sought = start > _WARM_UP and track.time_base is not None
        if sought:
            container.seek(round((zero + start - _WARM_UP) / track.time_base), stream=track)
        span = _Span(path, zero + start, None if math.isinf(end) else round((end - start) * RATE))
        for frame in _frames(container, track, sought):
            span.add(frame)
            if span.complete:
                break
        return span.samples()


class _Span:
    """Samples of a span, aligned by the timestamps of their frames.

    Consecutive frames without a gap share one resampler. A new resampler starts where the audio format changes, or
    where the timestamp of a frame differs from the end of the previous sound. Gaps become silence; of overlapping
    sound, the part read first is kept.

    Args:
        path: the file, for messages.
        start: start of the span, in seconds of the track's timestamps.
        count: samples of the span; None for the rest of the track.
    """

    def __init__(self, path: str | Path, start: float, count: int | None) -> None:
        self._path, self._start, self._count = path, start, count
        self._parts: list[NDArray[np.float32]] = []
        self._length = 0  # samples of the span so far
        self._cut = 0  # samples to drop from the current run: before the span, or overlapping
        self._overlap = 0
        self._resampler: AudioResampler | None = None
        self._format: tuple[str, str, int] | None = None
        self._first = self._last = -math.inf  # times of the first and the previous frame
        self._due = 0.0  # time at which the current run's sound ends

    @property
    def complete(self) -> bool:
        """Whether further frames would be after the span."""
        return self._count is not None and self._length >= self._count

    def add(self, frame: AudioFrame) -> None:
        """Appends a frame.

        Raises:
            DataError: its timestamp goes back to that of the first frame.
        """
        sound_format = frame.format.name, frame.layout.name, frame.sample_rate
        time = self._due if frame.time is None else frame.time - self._start
        if time < self._last and time <= self._first + _JITTER:
            raise DataError(
                f"cannot read the sound of {self._path}: its timestamps restart in the middle, as in concatenated "
                "files; remux, replace or remove it"
            )
        if self._resampler is None or sound_format != self._format or abs(time - self._due) > _JITTER:
            self._first = time if self._resampler is None else self._first
            self._append(None)
            self._resampler = import_av().AudioResampler(format="fltp", rate=RATE)
            self._format, self._due = sound_format, time
            self._move_to(round(time * RATE))
        self._last = time
        self._due += frame.samples / frame.sample_rate
        self._append(frame)

    def samples(self) -> NDArray[np.float32]:
        """Returns all samples, ``(N,)``, after the last frame."""
        self._append(None)
        if self._overlap > _OVERLAP * RATE:
            _logger.warning("dropped %.2f s of sound in %s that overlap other sound", self._overlap / RATE, self._path)
        return np.concatenate(self._parts)[: self._count] if self._parts else np.zeros(0, np.float32)

    def _move_to(self, place: int) -> None:
        """Starts a run at a sample of the span; negative before the span."""
        gap = place - self._length
        self._check_length(max(0, gap))
        if gap > 0:
            gap = gap if self._count is None else min(gap, max(0, self._count - self._length))
            self._parts.append(np.zeros(gap, np.float32))
            self._length += gap
        self._cut = max(0, -gap)

    def _append(self, frame: AudioFrame | None) -> None:
        for piece in self._resampler.resample(frame) if self._resampler is not None else ():
            self._check_length(piece.samples)
            samples = piece.to_ndarray().mean(axis=0)
            cut = min(self._cut, len(samples))
            self._cut -= cut
            self._overlap += cut if self._length else 0
            self._parts.append(samples[cut:])
            self._length += len(samples) - cut

    def _check_length(self, more: int) -> None:
        """Raises an error if the rest of a track is so long that its samples might not fit into the memory."""
        if self._count is None and self._length + more > _LONGEST * RATE:
            raise DataError(
                f"cannot read the sound of {self._path}: it lasts over {_LONGEST // 3600} hours, or its timestamps are "
                "damaged; read a span of it, replace or remove it"
            )


def _frames(container: InputContainer, track: AudioStream, sought: bool) -> Iterator[AudioFrame]:
    """Decodes from the current position, which may be within a frame after seeking."""
    for packet in container.demux(track):
        if container.format.name == "mp3" and bytes(packet)[: len(_TAG)] == _TAG:
            continue  # from concatenated MP3 files
        try:
            frames = packet.decode()
        except import_av().error.InvalidDataError:
            if not sought:
                raise
            continue
        for frame in frames:
            sought = False
            yield frame


@contextmanager
def _opened(path: str | Path) -> Iterator[InputContainer]:
    """Opens a file; later failures are raised as errors that name it."""
    av = import_av()
    path = Path(path)
    try:
        open_listed(path).close()  # FFmpeg would wait for the other end of a pipe
        with open_container(path) as container:
            yield container
    except FileNotFoundError as error:
        raise DataError(f"no such file: {path}") from error
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"cannot read the sound of {path}: {reason}; replace or remove it") from error
