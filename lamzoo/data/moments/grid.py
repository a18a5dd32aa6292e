"""GRID for moment retrieval: recordings of several sentences, with the occurrences of a word as moments."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from PIL import Image

from lamzoo.data.feature_arrays import Features
from lamzoo.data.grid_tokens import RATE, GridTokens, Speech, join
from lamzoo.data.moments.base import MomentQuery, MomentSource
from lamzoo.errors import DataError

LONGEST = 600.0  # maximum duration of a recording, seconds


class GridMoments(MomentSource):
    """Recordings concatenated from the clips of a split and cut to length; every word in a recording is a query.

    Clips are shuffled with the name of the split as seed, and each is used once, so a split always has the same
    recordings. The moments of a query are all occurrences of its word, and its only text feature is one-hot over the
    vocabulary of the corpus. A "clip" of the models is a token of 40 ms.

    Args:
        clips: the clips of the split.
        seconds: minimum and maximum duration of a recording; drawn uniformly between them.

    Raises:
        DataError: the durations are invalid, or the split is shorter than one recording.
    """

    clip_seconds = 1 / RATE

    def __init__(self, clips: GridTokens, seconds: tuple[float, float]) -> None:
        if not 1 <= seconds[0] <= seconds[1] <= LONGEST:
            raise DataError(
                f"GRID's recordings can't last {seconds[0]:g} to {seconds[1]:g} s; durations must be 1 to {LONGEST:g} s"
            )
        self.split, self._clips, self._seconds = clips.split, clips, seconds
        self.vocabulary = clips.vocabulary
        self._members: list[list[int]] = []  # the clips of each recording
        self._recordings = self._record()
        self.queries = [
            self._query(f"{self.split}{number}", word, speech)
            for number, speech in enumerate(self._recordings)
            for word in dict.fromkeys(word for word, *_ in speech.words)
        ]
        self._recording_of = [int(query.video.removeprefix(self.split)) for query in self.queries]

    def video(self, index: int) -> Features:
        return self._recordings[self._recording_of[index]].tokens

    def text(self, index: int) -> Features:
        return self._one_hot(self.queries[index].text)

    def frames(self, index: int, count: int) -> list[Image.Image]:
        recording = self._recording_of[index]
        length = len(self._recordings[recording].tokens)
        left = [int((number + 0.5) / count * length) for number in range(count)]
        found: list[Image.Image] = []
        start = 0
        for clip in self._members[recording]:
            end = start + len(self._clips.read(clip).tokens)
            found += self._clips.frames(clip, [number - start for number in left if start <= number < end])
            start = end
        return found

    def sizes(self) -> list[int]:
        return self._clips.sizes()

    def splice(self) -> tuple[MomentQuery, Features, Features]:
        """Returns a recording of sentences with exchanged words, and one of its words; see the base class."""
        pieces: list[Speech] = []
        length = self._length(random.uniform)
        while sum(len(piece.tokens) for piece in pieces) < length:
            pieces.append(self._clips.splice())
        speech = join(pieces)
        start = random.randint(0, len(speech.tokens) - length)
        speech = speech.cut(start, start + length)
        words = list(dict.fromkeys(word for word, *_ in speech.words))
        if not words:  # pauses may last a second
            return self.splice()
        query = self._query("spliced", random.choice(words), speech)
        return query, speech.tokens, self._one_hot(query.text)

    def _record(self) -> list[Speech]:
        rng = random.Random(self.split)
        order = list(range(len(self._clips)))
        rng.shuffle(order)
        recordings: list[Speech] = []
        clips: list[int] = []
        length = self._length(rng.uniform)
        for index in order:
            clips.append(index)
            pieces = [self._clips.read(clip) for clip in clips]
            if sum(len(piece.tokens) for piece in pieces) >= length:
                recordings.append(join(pieces).cut(0, length))
                self._members.append(clips)
                clips, length = [], self._length(rng.uniform)
        if not recordings:
            raise DataError(
                f"the {len(order)} clips of GRID's split {self.split!r} don't fill a recording; reduce its duration"
            )
        return recordings

    def _length(self, uniform: Callable[[float, float], float]) -> int:
        return round(uniform(*self._seconds) * RATE)

    def _query(self, recording: str, word: str, speech: Speech) -> MomentQuery:
        windows = tuple((first, last) for spoken, first, last in speech.words if spoken == word)
        seconds = len(speech.tokens) / RATE
        return MomentQuery(f"{recording}-{word}", word, recording, seconds, windows, words=speech.words)

    def _one_hot(self, word: str) -> Features:
        return (np.array(self._clips.vocabulary) == word).astype(np.float32)[None]
