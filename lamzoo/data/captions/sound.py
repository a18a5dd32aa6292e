"""Sound as tokens, read from files or from log-mel spectra, and degradation of spectra by noise and gaps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np

from lamzoo.data.audio.spectra import FLOOR, HOP, Spectra, mel_filters, read_log_mel, stack_spectra
from lamzoo.data.captions.base import Stream
from lamzoo.data.grid_tokens import scaled

Damage = Literal["noise", "gaps", "damaged"]

PAIR = 2  # spectra per token

_SHARE = 1 / 3  # of a clip is in gaps
_GAP = (0.3, 0.6)  # duration of a gap, seconds
# A Fourier bin is 31 Hz wide, and a Hann window of 25 ms resolves 60 Hz.
_INDEPENDENT = 31.25 / 60


def read_sound_stream(path: Path, start: float = 0.0, end: float = math.inf) -> Stream | None:
    """Reads the tokens of a span of a video's sound; None without an audio track, and for silence and under 20 ms.

    Args:
        path: the file.
        start: seconds from the first frame of the video.
        end: likewise.

    Raises:
        DataError: as of :func:`lamzoo.data.audio.spectra.read_log_mel`.
    """
    spectra = read_log_mel(path, start, end)
    return None if spectra is None or len(spectra) < PAIR else sound_stream(spectra)


def sound_stream(spectra: Spectra) -> Stream:
    """Converts spectra to tokens, 50 per second: pairs of spectra minus the mean of each band, scaled to variance 1.

    Args:
        spectra: log10 of the power in bands, ``(N, bands)``; spectrum k is centred at k * 10 ms.
    """
    tokens = stack_spectra(spectra, PAIR)
    times = (PAIR * np.arange(len(tokens)) + (PAIR - 1) / 2) * HOP
    return Stream(scaled(tokens), times.astype(np.float32))


def damage(spectra: Spectra, speech: slice, kind: Damage, generator: np.random.Generator) -> Spectra:
    """Returns spectra with noise, with gaps, or (``"damaged"``) with gaps in the noise.

    Args:
        spectra: log10 of the power in bands of 10 ms, ``(N, bands)``.
        speech: the range with speech; all if it is empty.
        kind: kind of degradation.
        generator: random generator.
    """
    if kind in ("noise", "damaged"):
        spectra = add_noise(spectra, speech, generator)
    return cut_gaps(spectra, generator) if kind in ("gaps", "damaged") else spectra


def add_noise(spectra: Spectra, speech: slice, generator: np.random.Generator) -> Spectra:
    """Adds white noise at 0 dB: with the mean power of the speech, summed over all bands.

    Each band gets the power that passes its filter. It fluctuates between spectra as the power of as many waves as the
    band can resolve: a chi-square distribution with two degrees of freedom per wave. The correlation of neighbouring
    spectra and bands, which overlap, is not modelled.
    """
    power = 10.0 ** spectra.astype(np.float64)
    weights = mel_filters(spectra.shape[1])
    share = weights.sum(axis=0) / weights.sum()
    freedom = 2 * np.maximum(1.0, _INDEPENDENT * weights.sum(axis=0) ** 2 / (weights**2).sum(axis=0))
    spoken = power[speech] if len(power[speech]) else power
    level = spoken.sum(axis=1).mean()
    noise = level * share * generator.chisquare(freedom, size=power.shape) / freedom
    return np.log10(power + noise).astype(np.float32)


def cut_gaps(spectra: Spectra, generator: np.random.Generator) -> Spectra:
    """Silences separate intervals of 0.3 to 0.6 s, about a third of the clip in total."""
    lengths: list[int] = []
    while sum(lengths) < len(spectra) * _SHARE - np.mean(_GAP) / HOP / 2:
        lengths.append(min(len(spectra), round(generator.uniform(*_GAP) / HOP)))
    kept = max(0, len(spectra) - sum(lengths))
    starts = np.sort(generator.integers(0, kept, size=len(lengths), endpoint=True))
    damaged = spectra.copy()
    before = 0
    for start, length in zip(starts, lengths, strict=True):
        damaged[start + before : start + before + length] = np.log10(FLOOR)
        before += length
    return damaged
