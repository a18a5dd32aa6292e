"""The file of a video index: embeddings with their source files and provenance."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lamzoo.data.video.sampling import FrameSampling
from lamzoo.errors import ConfigError, DataError
from lamzoo.files import atomic_files, is_inner_path
from lamzoo.reading import open_regular, parse_json, to_json
from lamzoo.records import Record, build
from lamzoo.version import __version__

SUFFIX = ".safetensors"

_FACTS = "lamzoo.video-index"  # the key of the index in the metadata of the file
_WAY_OUT = "choose another file with --index, or build this one again with --force (force=True)"


@dataclass(frozen=True)
class IndexedVideo:
    """A video file at the time of reading.

    Attributes:
        path: path relative to the indexed folder, with ``/`` as separator.
        size: bytes.
        mtime_ns: modification time, nanoseconds.
        duration: seconds; 0 if the video could not be read.
        reason: why the video could not be read; None if it was read.
    """

    path: str
    size: int
    mtime_ns: int
    duration: float = 0.0
    reason: str | None = None


@dataclass(frozen=True)
class Origin:
    """Provenance of embeddings; only embeddings of the same origin are comparable.

    Attributes:
        model: name of the model, with its tag if it has one.
        weights: sha256 of its state dict.
        similarity: its head.
        sampling: the frame sampling.
        preprocessing: timm's data configuration of the frames.
        masks: the LamConfig of the model as plain values, empty without masks; None in files of 0.1.0, which lack it.
        reduction: its token reduction as plain values, empty without one and in files of 0.1.0.
    """

    model: str
    weights: str
    similarity: str
    sampling: FrameSampling
    preprocessing: dict[str, Any]
    masks: dict[str, Any] | None = None
    reduction: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredIndex:
    """Content of the file.

    Attributes:
        origin: provenance of the embeddings.
        folder: the folder of the videos, absolute or relative to the folder of the file.
        videos: the embedded videos.
        rows: embedding of each of them, float32: ``(D,)``, or for a tight head ``(F, D)``, one row per frame, or with
            patches ``(F, 1 + P, D)``.
        unreadable: the videos that could not be read.
    """

    origin: Origin
    folder: str
    videos: Sequence[IndexedVideo]
    rows: Sequence[Tensor]
    unreadable: Sequence[IndexedVideo]

    def folder_seen_from(self, path: Path) -> Path:
        """Returns the folder of the videos for an index at ``path``."""
        return path.parent / self.folder


class GrowingIndex:
    """An index under construction.

    Attributes:
        rows: the embeddings so far, by path of the video.
        passing: reasons of the files that could not be read this time, by path; the next run tries them again.

    Args:
        path: the file.
        folder: the folder of the videos.
        found: the videos in the folder.
        origin: provenance of the embeddings.
    """

    def __init__(self, path: Path, folder: Path, found: Iterable[IndexedVideo], origin: Origin) -> None:
        self.path, self.folder, self.origin = path, folder, origin
        self.rows: dict[str, Tensor] = {}
        self.passing: dict[str, str] = {}
        self._found = {video.path: video for video in found}
        self._read: dict[str, IndexedVideo] = {}
        self._unsaved = 0

    def take_over(self, stored: StoredIndex, *, unreadable: bool, source: Path | None = None) -> None:
        """Takes over the entries of unchanged files; those of unreadable files only with ``unreadable``.

        Args:
            stored: an index.
            unreadable: whether to take over unreadable files.
            source: the file that it was read from, for error messages; by default that of this index.

        Raises:
            DataError: the stored index has another origin or folder.
        """
        source = source or self.path
        check_origin(source, stored.origin, self.origin)
        rows = dict(zip((video.path for video in stored.videos), stored.rows, strict=True))
        shared = False
        for video in (*stored.videos, *stored.unreadable):
            now = self._found.get(video.path)
            if now is None or (now.size, now.mtime_ns) != (video.size, video.mtime_ns):
                continue
            shared = True
            if video.reason is None:
                self.rows[video.path] = rows[video.path]
            if video.reason is None or unreadable:
                self._read[video.path] = video
        elsewhere = stored.folder_seen_from(self.path).resolve() != self.folder.resolve()
        if elsewhere and rows and not shared:
            raise DataError(
                f"{source} is an index of other videos, in {stored.folder_seen_from(self.path)}; {_WAY_OUT}"
            )

    def merge_parts(self, *, unreadable: bool) -> None:
        """Takes over the parts of the index, as :meth:`take_over`, saves it, and removes them.

        Raises:
            DataError: a part has another origin, or can't be read; the file can't be written.
        """
        parts = part_paths(self.path)
        for part in parts:
            self.take_over(read_index(part), unreadable=unreadable, source=part)
        if parts:
            self.save()
        for part in parts:
            part.unlink(missing_ok=True)

    def missing(self) -> list[IndexedVideo]:
        """Returns the files without an entry."""
        return [video for path, video in self._found.items() if path not in self._read]

    def add(self, video: IndexedVideo, row: Tensor | None, *, lasting: bool = True) -> None:
        """Adds an embedded or unreadable file.

        Args:
            video: the file, with its duration or reason.
            row: its embedding; None if it could not be read.
            lasting: whether the reason is the content of the file; if not, the next run tries it again.
        """
        if row is not None:
            self.rows[video.path] = row
        elif not lasting:
            self.passing[video.path] = str(video.reason)
            return
        self._read[video.path] = video
        self._unsaved += 1

    @property
    def size(self) -> int:
        """Number of files in the index."""
        return len(self._read)

    @property
    def unreadable(self) -> dict[Path, str]:
        """The files that could not be read, with the reason."""
        known = {path: video.reason for path, video in self._read.items() if video.reason is not None}
        reasons = known | self.passing
        return {self.folder / path: reasons[path] for path in self._found if path in reasons}

    def stored(self) -> StoredIndex:
        """Returns the content so far, in natural order."""
        read = [self._read[path] for path in self._found if path in self._read]
        videos = [video for video in read if video.reason is None]
        return StoredIndex(
            self.origin,
            _folder_from(self.path, self.folder),
            videos,
            [self.rows[video.path] for video in videos],
            [video for video in read if video.reason is not None],
        )

    def save(self, after: int = 0) -> None:
        """Writes the file if at least ``after`` videos were added since the last time."""
        if self._unsaved >= after:
            write_index(self.path, self.stored())
            self._unsaved = 0


def part_path(path: Path, rank: int) -> Path:
    """Returns the file, beside an index, in which a process other than the first one saves its share."""
    return path.with_name(f"{path.name}.part{rank}")


def part_paths(path: Path) -> list[Path]:
    """Returns the parts that are there, also those of a run that was interrupted."""
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.part*"))


def stack_rows(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Stacks the embeddings of at least one video.

    Returns:
        ``(N, D)`` and None; or, for embeddings of frames, ``(N, F, D)``, padded with zeros, and the frame mask
        ``(N, F)``, bool, True where there is a frame.
    """
    if rows[0].ndim == 1:
        return torch.stack(list(rows)), None
    lengths = torch.tensor([len(row) for row in rows])
    return pad_sequence(list(rows), batch_first=True), torch.arange(int(lengths.max())) < lengths[:, None]


def write_index(path: Path, index: StoredIndex) -> None:
    """Writes the file atomically.

    Raises:
        DataError: the file can't be written.
    """
    facts = {"lamzoo": __version__, "folder": index.folder, **dataclasses.asdict(index.origin)}
    listed = to_json([dataclasses.astuple(video) for video in (*index.videos, *index.unreadable)])
    # The list is a tensor of bytes, because the size of the header, with the metadata, is limited.
    tensors = {"videos": torch.frombuffer(bytearray(listed.encode()), dtype=torch.uint8)}
    if index.rows:
        embeddings, mask = stack_rows(index.rows)
        tensors |= {"embeddings": embeddings} if mask is None else {"embeddings": embeddings, "frame_mask": mask}
    with atomic_files(DataError) as stage:
        # A single entry, because safetensors writes several in a random order.
        save_file(tensors, stage(path), metadata={_FACTS: to_json(facts)})


def read_index(path: Path) -> StoredIndex:
    """Reads the file.

    Raises:
        DataError: the file does not exist, can't be read, is damaged, or is not an index.
    """
    try:
        facts = _facts(path)
        if facts is None:
            raise _foreign(path)
        with _opened(path) as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - it is no dict
        return _parse(facts, tensors)
    except OSError as error:
        raise DataError(f"cannot read the index {path}: {error.strerror or error}; {_WAY_OUT}") from error
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise DataError(f"{path} is not a video index, or is damaged; {_WAY_OUT}") from error


def check_replaceable(path: Path) -> None:
    """Checks that an index may replace the file: a damaged file may be replaced, other tensors may not.

    Raises:
        DataError: the file contains other tensors, or is a folder.
    """
    if path.is_dir():
        raise DataError(f"the index {path} is a folder; it must be a file")
    try:
        ours = not path.exists() or _facts(path) is not None
    except (OSError, SafetensorError, ValueError):
        return
    if not ours:
        raise _foreign(path)


def check_origin(path: Path, there: Origin, here: Origin) -> None:
    """Checks that embeddings are comparable.

    Args:
        path: the index.
        there: origin of the index.
        here: origin of the embeddings to compare with it.

    Raises:
        DataError: the origins differ; names the difference.
    """
    if there.weights != here.weights:
        model = f"other weights of {there.model}" if there.model == here.model else f"{there.model}, not {here.model}"
        difference = f"with {model}"
    elif (there.similarity, there.preprocessing) != (here.similarity, here.preprocessing):
        difference = f"with another head or preprocessing of {there.model}"
    elif there.masks is not None and there.masks != here.masks:
        difference = f"with masks of another LamConfig of {there.model}"
    elif there.reduction != here.reduction:
        difference = f"with another token reduction of {there.model}"
    elif there.sampling != here.sampling:
        difference = f"with {_words(there.sampling)}, not {_words(here.sampling)}"
    else:
        return
    raise DataError(f"the index {path} was built {difference}; use the same, {_WAY_OUT}")


def _folder_from(path: Path, folder: Path) -> str:
    """Returns ``StoredIndex.folder`` for an index at ``path``; relative, so that both can be moved together."""
    try:
        return os.path.relpath(folder, path.parent)
    except ValueError:  # on another Windows drive
        return str(folder.absolute())


def _foreign(path: Path) -> DataError:
    return DataError(f"{path} contains tensors that are not a video index; choose another file with --index")


def _facts(path: Path) -> dict[str, Any] | None:
    """Returns the index entry in the metadata of a safetensors file; None if there is none."""
    with _opened(path) as file:
        facts = (file.metadata() or {}).get(_FACTS)
    return None if facts is None else parse_json(facts, file_names=True)


def _opened(path: Path) -> safe_open:
    with open_regular(path):  # safetensors would wait for the other end of a pipe
        return safe_open(path, "pt")


def _parse(facts: dict[str, Any], tensors: dict[str, Tensor]) -> StoredIndex:
    facts = {"masks": None, "reduction": {}, **facts}  # which files of 0.1.0 lack
    origin = _built(Origin, [facts[name] for name in _names(Origin)])
    listed = [
        _built(IndexedVideo, values) for values in parse_json(tensors["videos"].numpy().tobytes(), file_names=True)
    ]
    if any(video.duration < 0 for video in listed):
        raise ValueError("a video has a negative duration")
    if odd := [video.path for video in listed if not is_inner_path(video.path)]:
        raise ValueError(f"the video {odd[0]!r} is not below the folder of the index")
    videos = [video for video in listed if video.reason is None]
    unreadable = [video for video in listed if video.reason is not None]
    return StoredIndex(origin, str(facts["folder"]), videos, _rows(tensors, len(videos)), unreadable)


def _names(cls: type) -> list[str]:
    return [each.name for each in dataclasses.fields(cls)]


def _built(cls: type[Record], values: list[Any]) -> Record:
    return build(cls, dict(zip(_names(cls), values, strict=True)), source="video index", error=ConfigError)


def _rows(tensors: dict[str, Tensor], count: int) -> list[Tensor]:
    if not count:
        return []
    embeddings, mask = tensors["embeddings"], tensors.get("frame_mask")
    right = embeddings.ndim in ((2,) if mask is None else (3, 4)) and embeddings.dtype == torch.float32
    if not right or len(embeddings) != count or not embeddings.isfinite().all():
        raise ValueError("the embeddings don't match the videos")
    if mask is None:
        return list(embeddings)
    return [row[seen] for row, seen in zip(embeddings, mask, strict=True)]


def _words(sampling: FrameSampling) -> str:
    rate = "every frame" if sampling.fps is None else f"fps {sampling.fps:g}"
    if sampling.max_frames is None:
        return rate
    return f"{rate}, max_frames {sampling.max_frames}, slicing {sampling.slicing}"
