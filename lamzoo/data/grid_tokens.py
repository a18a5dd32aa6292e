"""GRID's clips as tokens, 25 per second, of lip motion and sound, with the times of the spoken words."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lamzoo.data.arrays import read_npz
from lamzoo.data.audio.spectra import stack_spectra
from lamzoo.data.jpeg_archive import CaptionLines, JpegFiles
from lamzoo.data.paths import file_exists
from lamzoo.errors import DataError

Modalities = Literal["both", "video", "audio"]
Tokens = NDArray[np.float32]
Words = tuple[tuple[str, float, float], ...]  # word, start and end, seconds

RATE = 25  # tokens per second, the frame rate of the corpus
IGNORED = -100  # label of tokens without one, ignored by torch's cross_entropy
HOPS, BANDS = 4, 64  # spectra of 10 ms per frame, and mel bands per spectrum

_FRAME = (48, 80)  # pixels around the mouth
_LIPS = (slice(12, 44), slice(24, 72))  # of them


@dataclass(frozen=True)
class Speech:
    """A segment of speech.

    Attributes:
        tokens: ``(N, D)``, float32, 25 per second.
        words: each word with its start and end, seconds.
    """

    tokens: Tokens
    words: Words

    def cut(self, start: int, end: int) -> Speech:
        """Returns the tokens from ``start`` to ``end``, exclusive, with the words that are entirely among them."""
        tokens = self.tokens[start:end]
        moved = [(word, first - start / RATE, last - start / RATE) for word, first, last in self.words]
        inside = [word for word in moved if word[1] > -_ROUNDING and word[2] < len(tokens) / RATE + _ROUNDING]
        return Speech(tokens, tuple((word, max(0.0, first), last) for word, first, last in inside))


_ROUNDING = 1e-6  # seconds


def join(pieces: Sequence[Speech]) -> Speech:
    """Concatenates segments of speech."""
    words, shift = [], 0
    for piece in pieces:
        words += [(word, first + shift / RATE, last + shift / RATE) for word, first, last in piece.words]
        shift += len(piece.tokens)
    return Speech(np.concatenate([piece.tokens for piece in pieces]), tuple(words))


@dataclass(frozen=True)
class Piece:
    """A word of a clip, with the pause before it, and with the rest of the clip if it is the last word.

    Attributes:
        clip: index of the clip.
        start: the first frame.
        end: the frame after the last.
        word: the word with its start and end, seconds from the start of the piece.
    """

    clip: int
    start: int
    end: int
    word: tuple[str, float, float]


def draw_pieces(count: int, clip: Callable[[int], tuple[Words, int]], phrase: range | None = None) -> list[Piece]:
    """Draws the words of a new sentence from different clips, with :mod:`random`.

    All of GRID's sentences have the same grammar, which the new one follows too.

    Args:
        count: number of clips to draw from.
        clip: returns the words and the number of frames of a clip.
        phrase: the words of the sentence to draw; all by default.

    Raises:
        DataError: a clip has fewer words than the first one.
    """
    length = len(clip(0)[0])
    pieces = []
    for slot in range(length) if phrase is None else phrase:
        index = random.randrange(count)
        words, frames = clip(index)
        if len(words) < length:
            raise DataError(
                f"clips with {length} and with {len(words)} words can't be spliced; set augment.splice to 0"
            )
        start = round(words[slot - 1][2] * RATE) if slot else 0
        end = frames if slot == length - 1 else max(start + 1, round(words[slot][2] * RATE))
        word, first, last = words[slot]
        limits = np.clip([first, last], start / RATE, end / RATE) - start / RATE
        pieces.append(Piece(index, start, end, (word, *limits.tolist())))
    return pieces


class GridTokens:
    """The clips of a split, read on demand and cached: up to 190 KB each.

    A token is a frame of 40 ms. Its video features are the lips, 16 x 24 grey pixels, minus the mean of the clip; its
    audio features are four spectra of 64 mel bands, minus the mean of each band in the clip. Each modality is divided
    by its standard deviation in the clip, which balances them; statistics of other clips are not used.

    Args:
        root: the folder with ``captions.jsonl`` (``n_frames``, ``split``, ``words``), and those of ``mouth.npz`` and
            ``logmel.npz`` that the modalities need.
        split: ``train``, ``validation`` or ``test``.
        modalities: ``"both"`` (video features, then audio features), ``"video"`` or ``"audio"``.

    Attributes:
        split: name of the split in the data.
        vocabulary: all words of the corpus, sorted.

    Raises:
        DataError: there is no such folder, file or split, or the files are inconsistent.
    """

    def __init__(self, root: Path, split: str, modalities: Modalities = "both") -> None:
        fields = {"id": str, "n_frames": int, "words": list}
        captions = CaptionLines(root, fields, split)
        self._lips = None if modalities == "audio" else JpegFiles(captions, "mouth.npz")
        self._sound = None
        if modalities != "video":
            self._sound = read_sound(root / "logmel.npz", len(captions.every))[captions.numbers]
        self.split, self._lines = captions.split, captions.lines
        self.vocabulary = tuple(sorted({word for line in captions.every for word, *_ in line["words"]}))
        self._kept: dict[int, Speech] = {}

    def __len__(self) -> int:
        return len(self._lines)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}}  # each worker has its own cache

    def read(self, index: int) -> Speech:
        """Returns a clip.

        Raises:
            DataError: its frames are damaged, or their number differs from its line; names them.
        """
        if index not in self._kept:
            line = self._lines[index]
            parts = [] if self._lips is None else [lip_motion(self._lips, index, line["n_frames"])]
            if self._sound is not None:
                parts.append(stack_spectra(self._sound[index].astype(np.float32), HOPS))
            length = min(line["n_frames"], *map(len, parts))
            tokens = np.concatenate([scaled(part[:length]) for part in parts], axis=1)
            self._kept[index] = Speech(tokens, timed_words(line))
        return self._kept[index]

    def frames(self, index: int, numbers: Sequence[int]) -> list[Image.Image]:
        """Returns selected frames of a clip, 80 x 48 pixels around the mouth; none without video."""
        if self._lips is None or not numbers:
            return []
        height, width = _FRAME
        strip = self._lips.decode(index)
        return [strip.crop((0, number * height, width, (number + 1) * height)) for number in numbers]

    def sizes(self) -> list[int]:
        """Returns the size of each clip's frames in bytes; empty without video."""
        return [] if self._lips is None else self._lips.sizes()

    def splice(self) -> Speech:
        """Returns a sentence whose words are taken from different clips; see :func:`draw_pieces`."""
        pieces = draw_pieces(len(self), lambda index: (self.read(index).words, len(self.read(index).tokens)))
        return join([Speech(self.read(piece.clip).tokens[piece.start : piece.end], (piece.word,)) for piece in pieces])


def lip_motion(clips: JpegFiles, index: int, count: int) -> Tokens:
    """Returns the lips in each frame, ``(count, 384)``, minus their mean over the clip.

    Args:
        clips: the clips of ``mouth.npz``.
        index: index of the clip.
        count: number of frames.

    Raises:
        DataError: the image is damaged or has another size; names it.
    """
    lips = stacked_frames(clips, index, count, *_FRAME)[:, *_LIPS].astype(np.float32)
    return less_mean(block_means(lips, 2))


def stacked_frames(
    clips: JpegFiles, index: int, count: int, height: int, width: int, mode: Literal["L", "RGB"] = "L"
) -> NDArray[np.uint8]:
    """Returns the frames of a clip, stacked vertically in one image: ``(count, height, width)``, also ``(..., 3)``.

    Args:
        clips: the clips of an archive.
        index: index of the clip.
        count: number of frames.
        height: of a frame, pixels.
        width: of a frame, pixels.
        mode: grey, or in colour.

    Raises:
        DataError: the image is damaged or has another size; names it.
    """
    strip = clips.decode(index)
    if strip.size != (width, height * count) or not count:
        raise DataError(
            f"{clips.name(index)} is {strip.width} x {strip.height} pixels, not {count} frames of {width} x {height}; "
            "the n_frames of its line in captions.jsonl doesn't match"
        )
    pixels = np.asarray(strip.convert(mode))
    return pixels.reshape(count, height, *pixels.shape[1:])


def block_means(frames: Tokens, side: int) -> Tokens:
    """Returns the means of blocks of ``side`` x ``side`` pixels, ``(N, H, W)`` to ``(N, H / side, W / side)``."""
    count, height, width = frames.shape
    return frames.reshape(count, height // side, side, width // side, side).mean(axis=(2, 4))


def less_mean(frames: Tokens) -> Tokens:
    """Subtracts the mean of frames ``(N, H, W)`` and flattens each: ``(N, H * W)``."""
    return (frames - frames.mean(axis=0)).reshape(len(frames), -1)


def scaled(features: Tokens) -> Tokens:
    """Divides features by their standard deviation; constant features are returned unchanged."""
    return features / max(float(features.std()), 1e-5)


def said_at(words: Words, times: NDArray[np.floating], number: Callable[[str], int]) -> NDArray[np.int64]:
    """Returns the number of the word spoken at each of the times ``(N,)``, seconds: ``(N,)``, 0 for no word."""
    said = np.zeros(len(times), dtype=np.int64)
    for word, start, end in words:
        said[(times >= start) & (times < end)] = number(word)
    return said


def timed_words(line: Mapping[str, Any]) -> Words:
    """Returns the words of a line of ``captions.jsonl``."""
    return tuple((word, float(first), float(last)) for word, first, last in line["words"])


def read_sound(path: Path, count: int) -> NDArray[np.uint8]:
    """Returns the spectra of all clips, ``(count, hops, 64)``; 25.5 steps are a factor of ten, 0 is a power of 1e-8.

    Raises:
        DataError: the file does not exist, is damaged, or doesn't have ``count`` clips.
    """
    if not file_exists(path):
        raise DataError(f"{path.parent} has no {path.name}")
    sound: NDArray[np.uint8] = read_npz(path, ["logmel"])["logmel"]
    if sound.dtype != np.uint8 or sound.ndim != 3 or sound.shape[::2] != (count, BANDS) or sound.shape[1] % HOPS:
        raise DataError(
            f"{path}: logmel is {sound.dtype} {sound.shape}; the {count} lines of captions.jsonl need uint8 ({count}, "
            f"a multiple of {HOPS}, {BANDS})"
        )
    return sound
