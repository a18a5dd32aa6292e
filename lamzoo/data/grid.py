"""GRID's clips as tokens, 25 a second: how the lips move, what is heard, and when each word is said."""

from __future__ import annotations

import random
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lamzoo.data.retrieval.jpegs import CaptionLines, JpegLines
from lamzoo.errors import DataError

Modalities = Literal["both", "video", "audio"]
Tokens = NDArray[np.float32]

RATE = 25  # tokens a second, as the corpus has frames

_FRAME = (48, 80)  # pixels around the mouth
_LIPS = (slice(12, 44), slice(24, 72))  # of them
_HOPS, _BANDS = 4, 64  # spectra of 10 ms in a token, and mel bands in a spectrum


@dataclass(frozen=True)
class Speech:
    """A stretch of speech.

    Attributes:
        tokens: ``(N, D)``, float32, 25 a second.
        words: each word with its start and end, seconds.
    """

    tokens: Tokens
    words: tuple[tuple[str, float, float], ...]

    def cut(self, start: int, end: int) -> Speech:
        """Returns the tokens from one number up to another, and the words that are whole among them."""
        tokens = self.tokens[start:end]
        moved = [(word, first - start / RATE, last - start / RATE) for word, first, last in self.words]
        inside = [word for word in moved if word[1] > -_ROUNDING and word[2] < len(tokens) / RATE + _ROUNDING]
        return Speech(tokens, tuple((word, max(0.0, first), last) for word, first, last in inside))


_ROUNDING = 1e-6  # seconds


def join(pieces: Sequence[Speech]) -> Speech:
    """Puts stretches of speech one behind the other."""
    words, shift = [], 0
    for piece in pieces:
        words += [(word, first + shift / RATE, last + shift / RATE) for word, first, last in piece.words]
        shift += len(piece.tokens)
    return Speech(np.concatenate([piece.tokens for piece in pieces]), tuple(words))


class GridTokens:
    """The clips of a split, read when they are asked for and kept: up to 190 KB each.

    A token is a frame of 40 ms. Its video features are the lips, 16 x 24 grey pixels, less the clip's mean; its audio
    features are four spectra of 64 mel bands, less the clip's mean of each band. Either is divided by its own standard
    deviation in the clip, so that neither drowns the other; nothing of other clips goes in.

    Args:
        root: the folder with ``captions.jsonl`` (``n_frames``, ``split``, ``words``), and ``mouth.npz`` and
            ``logmel.npz`` as far as they are asked for.
        split: ``train``, ``validation`` or ``test``.
        modalities: ``"both"`` (video features, then audio features), ``"video"`` or ``"audio"``.

    Attributes:
        split: the split's own name.
        vocabulary: all words of the corpus, sorted.

    Raises:
        DataError: there is no such folder, file, split or modality, or the files do not fit each other.
    """

    def __init__(self, root: Path, split: str, modalities: Modalities = "both") -> None:
        if modalities not in get_args(Modalities):
            raise DataError(f"GRID has no {modalities!r}; it has {', '.join(map(repr, get_args(Modalities)))}")
        fields = {"id": str, "n_frames": int, "words": list}
        self._lips = None if modalities == "audio" else JpegLines(root, "mouth.npz", fields, split)
        captions = self._lips or CaptionLines(root, fields, split)
        self._sound = None
        if modalities != "video":
            self._sound = _read_sound(root / "logmel.npz", len(captions.every))[captions.numbers]
        self.split, self._lines = captions.split, captions.lines
        self.vocabulary = tuple(sorted({word for line in captions.every for word, *_ in line["words"]}))
        self._kept: dict[int, Speech] = {}

    def __len__(self) -> int:
        return len(self._lines)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}}  # a worker decodes for itself

    def read(self, index: int) -> Speech:
        """Returns a clip.

        Raises:
            DataError: its frames are broken, or not as many as its line says; names them.
        """
        if index not in self._kept:
            line = self._lines[index]
            parts = [] if self._lips is None else [_lip_motion(self._lips, index, line["n_frames"])]
            if self._sound is not None:
                parts.append(_spectra(self._sound[index]))
            length = min(line["n_frames"], *map(len, parts))
            words = tuple((word, float(first), float(last)) for word, first, last in line["words"])
            tokens = np.concatenate([_scaled(part[:length]) for part in parts], axis=1)
            self._kept[index] = Speech(tokens, words)
        return self._kept[index]

    def splice(self) -> Speech:
        """Returns a sentence of which each word is said as in another clip, with the pause before it.

        All of GRID's sentences have the same grammar, so the new one is a sentence of it too. Clips and words are drawn
        from :mod:`random`.
        """
        slots = len(self._lines[0]["words"])
        pieces = []
        for slot in range(slots):
            clip = self.read(random.randrange(len(self)))
            start = round(clip.words[slot - 1][2] * RATE) if slot else 0
            end = len(clip.tokens) if slot == slots - 1 else max(start + 1, round(clip.words[slot][2] * RATE))
            word, first, last = clip.words[slot]
            limits = np.clip([first, last], start / RATE, end / RATE) - start / RATE
            pieces.append(Speech(clip.tokens[start:end], ((word, *limits.tolist()),)))
        return join(pieces)


def _lip_motion(clips: JpegLines, index: int, count: int) -> Tokens:
    """Returns the lips of each frame, ``(N, 384)``, less their mean over the clip."""
    strip = clips.decode(index).convert("L")
    height, width = _FRAME
    if strip.size != (width, height * count) or not count:
        raise DataError(
            f"{clips.name(index)} is {strip.width} x {strip.height} pixels, not {count} frames of {width} x {height}; "
            "the n_frames of its line in captions.jsonl do not fit it"
        )
    lips = np.asarray(strip, dtype=np.float32).reshape(count, height, width)[:, *_LIPS]
    halved = lips.reshape(count, lips.shape[1] // 2, 2, lips.shape[2] // 2, 2).mean(axis=(2, 4))
    return (halved - halved.mean(axis=0)).reshape(count, -1)


def _spectra(sound: NDArray[np.uint8]) -> Tokens:
    """Returns the spectra of each frame, ``(N, 256)``, less their mean over the clip."""
    spectra = sound.astype(np.float32)
    return (spectra - spectra.mean(axis=0)).reshape(-1, _HOPS * _BANDS)


def _scaled(features: Tokens) -> Tokens:
    return features / max(float(features.std()), 1e-5)


def _read_sound(path: Path, count: int) -> NDArray[np.uint8]:
    """Returns the spectra of all clips, ``(count, hops, 64)``."""
    if not path.is_file():
        raise DataError(f"{path.parent} has no {path.name}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            sound: NDArray[np.uint8] = archive["logmel"]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is no whole npz archive with the array logmel: {error}") from error
    if sound.dtype != np.uint8 or sound.ndim != 3 or sound.shape[::2] != (count, _BANDS) or sound.shape[1] % _HOPS:
        raise DataError(
            f"{path}: logmel is {sound.dtype} {sound.shape}; the {count} lines of captions.jsonl need uint8 ({count}, "
            f"a multiple of {_HOPS}, {_BANDS})"
        )
    return sound
