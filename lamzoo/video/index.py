"""The file of a video index: embeddings, whose they are and what made them; knows neither models nor videos."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lamzoo.data.video.sampling import FrameSampling
from lamzoo.errors import DataError
from lamzoo.files import atomic_files
from lamzoo.version import __version__

SUFFIX = ".safetensors"

_FACTS = "lamzoo.video-index"  # the key, in the file's metadata, that says what it is
_WAY_OUT = "name another file with --index, or make this one anew with --force (force=True)"


@dataclass(frozen=True)
class IndexedVideo:
    """A video file as it was when it was read.

    Attributes:
        path: from the folder that was indexed, with ``/`` between its parts.
        size: bytes.
        mtime_ns: when its content last changed, nanoseconds.
        duration: seconds; 0 where it could not be read.
        reason: why it could not be read; None where it could.
    """

    path: str
    size: int
    mtime_ns: int
    duration: float = 0.0
    reason: str | None = None


@dataclass(frozen=True)
class Origin:
    """What embeddings were made with; only those of one origin can be compared.

    Attributes:
        model: name of the model, with its tag where it has one.
        weights: sha256 of its state dict.
        similarity: its head.
        sampling: which frames were looked at.
        preprocessing: of each frame, timm's data configuration.
        masks: the model's LamConfig as plain values, empty without masks; None in files of 0.1.0, which don't say it.
    """

    model: str
    weights: str
    similarity: str
    sampling: FrameSampling
    preprocessing: dict[str, Any]
    masks: dict[str, Any] | None = None


@dataclass(frozen=True)
class StoredIndex:
    """All that the file holds.

    Attributes:
        origin: what the embeddings were made with.
        folder: the folder of the videos, absolute or from the file's own.
        videos: those that were embedded.
        rows: of each of them the embedding, float32: ``(D,)``, or ``(F, D)`` of its frames for a tight head.
        unreadable: those that were not.
    """

    origin: Origin
    folder: str
    videos: Sequence[IndexedVideo]
    rows: Sequence[Tensor]
    unreadable: Sequence[IndexedVideo]

    def folder_seen_from(self, path: Path) -> Path:
        """Returns the folder of the videos, where the index lies at ``path``."""
        return path.parent / self.folder


class GrowingIndex:
    """What the file will hold, while videos are being embedded.

    Attributes:
        rows: the embeddings so far, by the video's path.

    Args:
        path: the file.
        folder: with the videos.
        found: the videos that are there now.
        origin: what their embeddings are made with.
    """

    def __init__(self, path: Path, folder: Path, found: Iterable[IndexedVideo], origin: Origin) -> None:
        self.path, self.folder, self.origin = path, folder, origin
        self.rows: dict[str, Tensor] = {}
        self._found = {video.path: video for video in found}
        self._read: dict[str, IndexedVideo] = {}
        self._passing: dict[str, str] = {}
        self._unsaved = 0

    def take_over(self, stored: StoredIndex, *, unreadable: bool) -> None:
        """Keeps what is known of files that have not changed; of those that could not be read only if asked to.

        Raises:
            DataError: it was made with something else, or of other videos.
        """
        check_origin(self.path, stored.origin, self.origin)
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
                f"{self.path} is an index of other videos, in {stored.folder_seen_from(self.path)}; {_WAY_OUT}"
            )

    def missing(self) -> list[IndexedVideo]:
        """Returns the files that nothing is known of."""
        return [video for path, video in self._found.items() if path not in self._read]

    def add(self, video: IndexedVideo, row: Tensor | None, *, lasting: bool = True) -> None:
        """Adds a file that was embedded, or could not be read.

        Args:
            video: with its duration or reason.
            row: its embedding, None where it could not be read.
            lasting: the reason is in the file itself. If not, the next run is to try it again.
        """
        if row is not None:
            self.rows[video.path] = row
        elif not lasting:
            self._passing[video.path] = str(video.reason)
            return
        self._read[video.path] = video
        self._unsaved += 1

    @property
    def size(self) -> int:
        """How many files the index will list."""
        return len(self._read)

    @property
    def unreadable(self) -> dict[Path, str]:
        """The files that could not be read, and why."""
        known = {path: video.reason for path, video in self._read.items() if video.reason is not None}
        reasons = known | self._passing
        return {self.folder / path: reasons[path] for path in self._found if path in reasons}

    def stored(self) -> StoredIndex:
        """Returns all that is known so far, in natural order."""
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
        """Writes the file, if at least so many videos were added since it was last written."""
        if self._unsaved >= after:
            write_index(self.path, self.stored())
            self._unsaved = 0


def stack_rows(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Puts the embeddings of at least one video together.

    Returns:
        ``(N, D)`` and None; or, of rows of frames, ``(N, F, D)``, zeros where a video has ended, and ``(N, F)``, bool,
        True where it has not.
    """
    if rows[0].ndim == 1:
        return torch.stack(list(rows)), None
    lengths = torch.tensor([len(row) for row in rows])
    return pad_sequence(list(rows), batch_first=True), torch.arange(int(lengths.max())) < lengths[:, None]


def write_index(path: Path, index: StoredIndex) -> None:
    """Replaces the file in one step.

    Raises:
        DataError: it can't be written there.
    """
    facts = {"lamzoo": __version__, "folder": index.folder, **dataclasses.asdict(index.origin)}
    listed = json.dumps([dataclasses.astuple(video) for video in (*index.videos, *index.unreadable)])
    # The list is a tensor of bytes, since the header that holds the metadata has an upper limit.
    tensors = {"videos": torch.frombuffer(bytearray(listed.encode()), dtype=torch.uint8)}
    if index.rows:
        embeddings, mask = stack_rows(index.rows)
        tensors |= {"embeddings": embeddings} if mask is None else {"embeddings": embeddings, "frame_mask": mask}
    with atomic_files(DataError) as stage:
        save_file(tensors, stage(path), metadata={"format": "pt", _FACTS: json.dumps(facts)})


def read_index(path: Path) -> StoredIndex:
    """Reads the file.

    Raises:
        DataError: there is none, it can't be read, it is damaged, or it is something else.
    """
    try:
        facts = _facts(path)
        if facts is None:
            raise _foreign(path)
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - it is no dict
        return _parse(facts, tensors)
    except OSError as error:
        raise DataError(f"cannot read the index {path}: {error.strerror or error}; {_WAY_OUT}") from error
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise DataError(f"{path} is no index of videos, or a damaged one; {_WAY_OUT}") from error


def check_replaceable(path: Path) -> None:
    """Refuses to write an index over something else: what is damaged may go, other tensors may not.

    Raises:
        DataError: the file holds other tensors, or is a folder.
    """
    if path.is_dir():
        raise DataError(f"the index {path} is a folder; name a file")
    try:
        ours = not path.exists() or _facts(path) is not None
    except (OSError, SafetensorError, ValueError):
        return
    if not ours:
        raise _foreign(path)


def check_origin(path: Path, there: Origin, here: Origin) -> None:
    """Checks that embeddings can be compared.

    Args:
        path: the index.
        there: what made it.
        here: what is to be used with it.

    Raises:
        DataError: they differ; says in what.
    """
    if there.weights != here.weights:
        model = f"other weights of {there.model}" if there.model == here.model else f"{there.model}, not {here.model}"
        difference = f"with {model}"
    elif (there.similarity, there.preprocessing) != (here.similarity, here.preprocessing):
        difference = f"with another head or preprocessing of {there.model}"
    elif there.masks is not None and there.masks != here.masks:
        difference = f"with masks of another LamConfig of {there.model}"
    elif there.sampling != here.sampling:
        difference = f"with {_words(there.sampling)}, not {_words(here.sampling)}"
    else:
        return
    raise DataError(f"the index {path} was made {difference}; use the same, {_WAY_OUT}")


def _folder_from(path: Path, folder: Path) -> str:
    """Returns what ``StoredIndex.folder`` is for an index at ``path``, so that both can be moved together."""
    try:
        return os.path.relpath(folder, path.parent)
    except ValueError:  # on another drive of Windows
        return str(folder.absolute())


def _foreign(path: Path) -> DataError:
    return DataError(f"{path} holds other tensors than an index of videos; name another file with --index")


def _facts(path: Path) -> dict[str, Any] | None:
    """Returns what the metadata of a safetensors file say of an index; None where they say nothing."""
    with safe_open(path, "pt") as file:
        facts = (file.metadata() or {}).get(_FACTS)
    return None if facts is None else json.loads(facts)


def _parse(facts: dict[str, Any], tensors: dict[str, Tensor]) -> StoredIndex:
    names = [field.name for field in dataclasses.fields(Origin)]
    known = {name: facts[name] for name in names if name in facts}
    origin = Origin(**{**known, "sampling": FrameSampling(**facts["sampling"])})
    listed = [IndexedVideo(*values) for values in json.loads(tensors["videos"].numpy().tobytes())]
    videos = [video for video in listed if video.reason is None]
    unreadable = [video for video in listed if video.reason is not None]
    return StoredIndex(origin, str(facts["folder"]), videos, _rows(tensors, len(videos)), unreadable)


def _rows(tensors: dict[str, Tensor], count: int) -> list[Tensor]:
    if not count:
        return []
    embeddings, mask = tensors["embeddings"], tensors.get("frame_mask")
    right = embeddings.ndim == (2 if mask is None else 3) and embeddings.dtype == torch.float32
    if not right or len(embeddings) != count or not embeddings.isfinite().all():
        raise ValueError("the embeddings are not those of the videos")
    if mask is None:
        return list(embeddings)
    return [row[seen] for row, seen in zip(embeddings, mask, strict=True)]


def _words(sampling: FrameSampling) -> str:
    rate = "every frame" if sampling.fps is None else f"fps {sampling.fps:g}"
    if sampling.max_frames is None:
        return rate
    return f"{rate}, max_frames {sampling.max_frames}, slicing {sampling.slicing}"
