"""Captioned videos in local webdataset tar shards, with random access."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import IO

from lamzoo.data.images.archives import ShardSample, find_shards, shard_samples
from lamzoo.data.retrieval.base import VideoSource
from lamzoo.data.video.reader import VIDEO_EXTENSIONS, VideoClip, read_video
from lamzoo.data.video.sampling import FrameSampling
from lamzoo.errors import DataError
from lamzoo.reading import decode, open_regular, parse_json

_NO_CAPTION = "caption, in a .txt or as the 'caption' of a .json"


class ShardSource(VideoSource):
    """Webdataset shards: every sample is ``KEY.mp4`` (or avi, webm, ...) with ``KEY.txt`` or ``KEY.json``.

    The text file has one caption per line; the JSON file, which is read if there is no text file, is an object whose
    ``captions`` or ``caption`` is a string or a list of strings. Keys may contain dots, and extensions may be in upper
    case; see :func:`shard_samples`. The headers and captions of the shards are read once, at the start. The id of a
    video is its key, or ``SHARD/KEY`` if two shards have the same key.

    Args:
        pattern: a path with ``*``, ``{000..012}``, ``{a,b}`` and ``{split}``.
        split: replaces ``{split}``; not used if the pattern has none.

    Raises:
        DataError: a shard does not exist, is remote or damaged, or a sample has no video or caption.
    """

    how_to_split = "put {split} into the pattern in place of the split's name"

    def __init__(self, pattern: str, split: str) -> None:
        shards, self.split = find_shards(pattern, split)
        self._samples = list(shard_samples(shards, VIDEO_EXTENSIONS, (".txt", ".json"), "video", _NO_CAPTION))
        keys = [sample.key for sample in self._samples]
        if len(set(keys)) < len(keys):
            keys = [f"{sample.shard.name}/{sample.key}" for sample in self._samples]
        self.videos = keys
        self.captions = [_captions(sample) for sample in self._samples]

    def read(self, index: int, sampling: FrameSampling, threads: int = 1) -> VideoClip:
        sample = self._samples[index]
        # Videos are read by path, more than once, so each is unpacked to a temporary file.
        with tempfile.NamedTemporaryFile(suffix=sample.extension) as file:
            _copy(sample, file)
            try:
                return read_video(Path(file.name), sampling, threads=threads)
            except DataError as error:
                raise DataError(str(error).replace(file.name, self.name(index))) from (error.__cause__ or error)

    def sizes(self) -> list[int]:
        return [sample.size for sample in self._samples]

    def name(self, index: int) -> str:
        return f"{self._samples[index].shard}[{self._samples[index].key}]"


def _copy(sample: ShardSample, target: IO[bytes]) -> None:
    try:
        with open_regular(sample.shard) as file:
            file.seek(sample.start)
            target.write(file.read(sample.size))
            target.flush()
    except OSError as error:
        raise DataError(f"cannot unpack {sample.key} of {sample.shard}: {error.strerror}") from error


def _captions(sample: ShardSample) -> list[str]:
    """Returns the captions of a sample: the lines of its text file, or those of its JSON file."""
    captions = None
    try:
        if ".txt" in sample.texts:
            captions = decode(sample.texts[".txt"]).strip().split("\n")
        else:
            record = parse_json(sample.texts[".json"])
            captions = record.get("captions", record.get("caption")) if isinstance(record, dict) else None
    except ValueError as error:
        raise DataError(f"{sample.shard}: the caption of the sample {sample.key!r} cannot be read: {error}") from error
    captions = [captions] if isinstance(captions, str) else captions
    if not captions or not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise DataError(f"{sample.shard}: the sample {sample.key!r} has no {_NO_CAPTION}")
    return captions
