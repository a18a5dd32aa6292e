"""Log-mel spectra as tokens, and made worse, as in bad places and over bad lines: arithmetic; reads no file."""

from __future__ import annotations

from typing import Literal

import numpy as np

from lamzoo.data.audio.spectra import FLOOR, HOP, Spectra, mel_filters, stack_spectra
from lamzoo.data.captions.base import Stream
from lamzoo.data.grid_tokens import scaled

Damage = Literal["noise", "gaps", "damaged"]

PAIR = 2  # spectra in a token

_SHARE = 1 / 3  # of a clip that is missing in gaps
_GAP = (0.3, 0.6)  # seconds of a gap
# A bin of the transform is 31 Hz wide, and a Hann window of 25 ms tells what is 60 Hz apart.
_INDEPENDENT = 31.25 / 60


def sound_stream(spectra: Spectra) -> Stream:
    """Makes tokens of spectra, 50 a second: each two of them, less the mean of each band, and scaled to variance 1.

    Args:
        spectra: log10 of the power in bands, ``(N, bands)``; number k is of the time around k * 10 ms.
    """
    tokens = stack_spectra(spectra, PAIR)
    times = (PAIR * np.arange(len(tokens)) + (PAIR - 1) / 2) * HOP
    return Stream(scaled(tokens), times.astype(np.float32))


def damage(spectra: Spectra, speech: slice, kind: Damage, generator: np.random.Generator) -> Spectra:
    """Returns spectra with noise, with gaps, or (``"damaged"``) with gaps in the noise.

    Args:
        spectra: log10 of the power in bands of 10 ms, ``(N, bands)``.
        speech: where somebody speaks; everywhere if it is empty.
        kind: what to do.
        generator: what chance comes from.
    """
    if kind in ("noise", "damaged"):
        spectra = add_noise(spectra, speech, generator)
    return cut_gaps(spectra, generator) if kind in ("gaps", "damaged") else spectra


def add_noise(spectra: Spectra, speech: slice, generator: np.random.Generator) -> Spectra:
    """Adds white noise at 0 dB: of the same power, over all bands together, as the speech has on average.

    A band gets of it what its filter lets through. That fluctuates from one spectrum to the next as the power of as
    many waves does as fit into the band next to each other: a chi-square distribution with two degrees of freedom for
    each. Neighbouring spectra and bands overlap, and so would vary together; here they don't.
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
    """Silences stretches of 0.3 to 0.6 s, apart from each other, that are about a third of the clip together."""
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
