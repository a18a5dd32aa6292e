"""Videos with captions in local webdataset tar shards, read at random."""

from __future__ import annotations

import json
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, NamedTuple

from lamzoo.data.packed import find_shards
from lamzoo.data.retrieval.base import VideoSource
from lamzoo.data.sampling import FrameSampling
from lamzoo.data.video import VIDEO_EXTENSIONS, VideoClip, read_video
from lamzoo.errors import DataError


class _Member(NamedTuple):
    shard: Path
    key: str
    extension: str
    start: int
    size: int
    captions: list[str]


class ShardSource(VideoSource):
    """Webdataset shards: every sample is ``KEY.mp4`` (or avi, webm, ...) with ``KEY.txt`` or ``KEY.json``.

    The text file has one caption a line; the JSON an object whose ``captions`` or ``caption`` is a text or a list of
    them, and it is read where there is no text file. The shards' headers and captions are read once, at the start. A
    video is called by its key, or, where two shards have the same, by ``SHARD/KEY``.

    Args:
        pattern: a path with ``*``, ``{000..012}``, ``{a,b}`` and ``{split}``.
        split: replaces ``{split}``; a pattern without it says alone what is read.

    Raises:
        DataError: no such shard, a remote one, a broken one, or a sample without video or caption.
    """

    def __init__(self, pattern: str, split: str) -> None:
        shards, self.split = find_shards(pattern, split)
        self._members = [member for shard in shards for member in _index(shard)]
        keys = [member.key for member in self._members]
        if len(set(keys)) < len(keys):
            keys = [f"{member.shard.name}/{member.key}" for member in self._members]
        self.videos = keys
        self.captions = [member.captions for member in self._members]

    def read(self, index: int, sampling: FrameSampling, threads: int = 1) -> VideoClip:
        member = self._members[index]
        # Videos are read by path, more than once: each is unpacked into a file of its own, which goes at the end.
        with tempfile.NamedTemporaryFile(suffix=f".{member.extension}") as file:
            _copy(member, file)
            try:
                return read_video(Path(file.name), sampling, threads=threads)
            except DataError as error:
                raise DataError(str(error).replace(file.name, self.name(index))) from (error.__cause__ or error)

    def name(self, index: int) -> str:
        return f"{self._members[index].shard}[{self._members[index].key}]"


def _copy(member: _Member, target: IO[bytes]) -> None:
    try:
        with member.shard.open("rb") as file:
            file.seek(member.start)
            target.write(file.read(member.size))
            target.flush()
    except OSError as error:
        raise DataError(f"cannot unpack {member.key} of {member.shard}: {error.strerror}") from error


def _index(shard: Path) -> list[_Member]:
    videos: dict[str, tuple[str, int, int]] = {}
    texts: dict[str, bytes] = {}
    records: dict[str, bytes] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for entry in archive:
                folder, _, name = entry.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if not entry.isfile():
                    continue
                if extension in ("txt", "json"):
                    file = archive.extractfile(entry)
                    (texts if extension == "txt" else records)[key] = b"" if file is None else file.read()
                elif f".{extension}".lower() in VIDEO_EXTENSIONS:
                    if key in videos:
                        raise DataError(f"{shard} has the sample {key!r} twice; rename one of them")
                    videos[key] = (extension, entry.offset_data, entry.size)
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise DataError(f"{shard} is no whole, uncompressed webdataset shard: {error}") from error
    odd = sorted((texts.keys() | records.keys()) - videos.keys())
    if odd:
        raise DataError(f"{shard}: the sample {odd[0]!r} has no video ({', '.join(sorted(VIDEO_EXTENSIONS))})")
    return [_Member(shard, key, *place, _captions(key, texts, records, shard)) for key, place in videos.items()]


def _captions(key: str, texts: Mapping[str, bytes], records: Mapping[str, bytes], shard: Path) -> list[str]:
    """Returns the captions of a sample: the lines of its text file, else those that its JSON names."""
    captions = None
    try:
        if key in texts:
            captions = texts[key].decode("utf-8-sig").strip().split("\n")
        elif key in records:
            record = json.loads(records[key])
            captions = record.get("captions", record.get("caption")) if isinstance(record, dict) else None
    except ValueError as error:
        raise DataError(f"{shard}: the caption of the sample {key!r} cannot be read: {error}") from error
    captions = [captions] if isinstance(captions, str) else captions
    if not captions or not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise DataError(f"{shard}: the sample {key!r} has no caption, in a .txt or as the 'caption' of a .json")
    return captions
