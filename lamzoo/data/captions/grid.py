"""Transcription of GRID's sentences from lips, face and sound, with optional degradation of the sound."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lamzoo.data.audio.spectra import HOP, Spectra
from lamzoo.data.captions.base import CaptionItem, CaptionSource, Stream
from lamzoo.data.captions.sound import PAIR, Damage, damage, sound_stream
from lamzoo.data.feature_arrays import Features
from lamzoo.data.grid_tokens import (
    BANDS,
    HOPS,
    RATE,
    Piece,
    Words,
    block_means,
    draw_pieces,
    less_mean,
    lip_motion,
    read_sound,
    scaled,
    stacked_frames,
    timed_words,
)
from lamzoo.data.jpeg_archive import CaptionLines, JpegFiles
from lamzoo.errors import DataError

_FACE = 64  # pixels per side
_FACE_FIRST, _FACE_STEP = 2, 5  # the frames with a stored face
_WIDTHS = {"mouth": 384, "face": 256, "audio": PAIR * BANDS}


class GridCaptions(CaptionSource):
    """Clips of three seconds, each a sentence of six words, with its sound and two views of the talker.

    - ``mouth``: 25 tokens per second, the lips, 16 x 24 grey pixels.
    - ``face``: 5 tokens per second, 16 x 16 grey block means of the face.
    - ``audio``: 50 tokens per second, each two spectra of 64 mel bands, 10 ms apart.

    Each modality is normalised per clip: the mean of each pixel or band is subtracted, and all values are divided by
    their standard deviation. Image archives stay encoded in memory. Clips are cached as read, 190 KB each without the
    face, except for degraded sound: sound is degraded before normalisation, deterministically in validation and test,
    and differently each time (from :mod:`random`) in training and in spliced clips.

    Args:
        root: the folder with ``captions.jsonl`` (``id``, ``text``, ``n_frames``, ``split``, ``words``), and those of
            ``mouth.npz``, ``face.npz`` and ``logmel.npz`` that the modalities need.
        split: ``train``, ``validation`` or ``test``.
        modalities: the modalities, in order.
        harm: degradation of the sound: ``"noise"`` as loud as the speech, ``"gaps"`` over a third of the clip, or
            ``"damaged"``, both; see :mod:`lamzoo.data.captions.sound`.

    Raises:
        DataError: there is no such folder, file, split or modality, a modality is repeated, ``harm`` is given without
            ``audio``, or the files are inconsistent.
    """

    def __init__(
        self, root: Path, split: str, modalities: Sequence[str] = ("mouth", "audio"), harm: Damage | None = None
    ) -> None:
        for name in modalities:
            if name not in _WIDTHS or list(modalities).count(name) > 1:
                raise DataError(
                    f"the modalities of GRID are {'+'.join(modalities)}; they must be {', '.join(_WIDTHS)}, each at "
                    "most once"
                )
        if harm is not None and "audio" not in modalities:
            raise DataError(f"{harm!r} degrades GRID's sound, which is not among {'+'.join(modalities)}; add audio")
        fields = {"id": str, "text": str, "n_frames": int, "words": list}
        captions = CaptionLines(root, fields, split)
        self._mouth = JpegFiles(captions, "mouth.npz") if "mouth" in modalities else None
        self._face = JpegFiles(captions, "face.npz") if "face" in modalities else None
        self._sound = None
        if "audio" in modalities:
            self._sound = read_sound(root / "logmel.npz", len(captions.every))[captions.numbers]
        self._frames = [line["n_frames"] for line in captions.lines]
        if self._sound is not None:
            self._frames = [min(count, self._sound.shape[1] // HOPS) for count in self._frames]
        self._lines, self._harm, self.split = captions.lines, harm, captions.split
        self.modalities = {name: _WIDTHS[name] for name in modalities}
        self.items = [
            CaptionItem(line["id"], line["id"], 0.0, count / RATE, (line["text"].strip(),), timed_words(line))
            for line, count in zip(captions.lines, self._frames, strict=True)
        ]
        self._kept: dict[tuple[int, str], Stream] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}}  # each worker has its own cache

    def sizes(self) -> list[int]:
        return [size for view in (self._mouth, self._face) if view is not None for size in view.sizes()]

    def streams(self, index: int) -> dict[str, Stream]:
        return {name: self._stream(index, name) for name in self.modalities}

    def frames(self, index: int, count: int) -> list[Image.Image]:
        """Returns frames of the face if it is among the modalities, otherwise of the mouth, if that is."""
        clips, (width, height) = (self._mouth, (80, 48)) if self._face is None else (self._face, (_FACE, _FACE))
        if clips is None:
            return []
        strip = clips.decode(index)
        stored = strip.height // height
        chosen = dict.fromkeys(int((number + 0.5) / count * stored) for number in range(count))
        return [strip.crop((0, number * height, width, (number + 1) * height)) for number in chosen]

    def splice(self) -> tuple[CaptionItem, dict[str, Stream]]:
        """Returns a sentence whose words are taken from different clips, each with the pause before it.

        Clips and words are drawn from :mod:`random`. All modalities are cut between the same frames; a face belongs to
        the piece that contains its middle. Sound is degraded after splicing.
        """
        pieces = draw_pieces(len(self.items), lambda index: (self.items[index].words, self._frames[index]))
        shifts = _shifts(pieces)
        words = tuple(
            (word, first + shift, last + shift)
            for (word, first, last), shift in zip((piece.word for piece in pieces), shifts, strict=False)
        )
        streams = {}
        for name in self.modalities:
            if name == "audio" and self._harm is not None:
                sound = np.concatenate(
                    [self._spectra(piece.clip)[piece.start * HOPS : piece.end * HOPS] for piece in pieces]
                )
                streams[name] = sound_stream(damage(sound, _speech(words), self._harm, _drawn()))
            else:
                streams[name] = _join([self._stream(piece.clip, name) for piece in pieces], pieces)
        if not all(len(stream.times) for stream in streams.values()):  # a very short sentence may have no face
            return self.splice()
        text = " ".join(word for word, *_ in words)
        return CaptionItem("spliced", "spliced", 0.0, shifts[-1], (text,), words), streams

    def _stream(self, index: int, name: str) -> Stream:
        if name == "audio" and self._harm is not None:
            spectra = damage(self._spectra(index), _speech(self.items[index].words), self._harm, self._generator(index))
            return sound_stream(spectra)
        if (index, name) not in self._kept:
            read = {"mouth": self._mouths, "face": self._faces, "audio": self._sounds}[name]
            self._kept[index, name] = read(index)
        return self._kept[index, name]

    def _mouths(self, index: int) -> Stream:
        assert self._mouth is not None
        lips = lip_motion(self._mouth, index, self._lines[index]["n_frames"])[: self._frames[index]]
        return Stream(scaled(lips), _middles(np.arange(len(lips))))

    def _faces(self, index: int) -> Stream:
        assert self._face is not None
        numbers = np.arange(_FACE_FIRST, self._lines[index]["n_frames"], _FACE_STEP)
        faces = stacked_frames(self._face, index, len(numbers), _FACE, _FACE).astype(np.float32)
        numbers = numbers[numbers < self._frames[index]]
        return Stream(scaled(less_mean(block_means(faces, 4))[: len(numbers)]), _middles(numbers))

    def _sounds(self, index: int) -> Stream:
        return sound_stream(self._spectra(index))

    def _spectra(self, index: int) -> Spectra:
        """Returns the log10 of the power in each band, every 10 ms, ``(N, 64)``."""
        assert self._sound is not None
        return self._sound[index, : self._frames[index] * HOPS].astype(np.float32) / 25.5 - 8

    def _generator(self, index: int) -> np.random.Generator:
        if self.split == "train":
            return _drawn()
        return np.random.default_rng([zlib.crc32(str(self.split).encode()), index])


def _drawn() -> np.random.Generator:
    return np.random.default_rng(random.getrandbits(64))


def _speech(words: Words) -> slice:
    """Returns the spectra from the first word to the last; all if there are no words."""
    return slice(round(words[0][1] / HOP), round(words[-1][2] / HOP)) if words else slice(None)


def _middles(frames: NDArray) -> Features:
    return ((frames + 0.5) / RATE).astype(np.float32)


def _shifts(pieces: Sequence[Piece]) -> list[float]:
    """Returns the start of each piece in the new sentence, and the end of the last one, seconds."""
    frames = np.cumsum([0, *(piece.end - piece.start for piece in pieces)])
    return (frames / RATE).tolist()


def _join(clips: Sequence[Stream], pieces: Sequence[Piece]) -> Stream:
    features, times = [], []
    for clip, piece, shift in zip(clips, pieces, _shifts(pieces), strict=False):
        start, end = np.array([piece.start, piece.end]) / RATE
        inside = (clip.times > start - HOP / 4) & (clip.times < end - HOP / 4)
        features.append(clip.features[inside])
        times.append(clip.times[inside] + np.float32(shift - start))
    return Stream(np.concatenate(features), np.concatenate(times))
