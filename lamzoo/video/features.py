"""Features of videos and queries as files in a folder, in the form that QVHighlights' models read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lamzoo.data import OnBadInput, plain_worker_errors
from lamzoo.data.images.decode import unreadable_because
from lamzoo.data.moments.base import Features
from lamzoo.data.moments.feature_folder import TEXT_FOLDER
from lamzoo.data.moments.qvhighlights import read_queries
from lamzoo.data.video.packets import import_av
from lamzoo.data.video.reader import find_videos
from lamzoo.errors import ConfigError, DataError
from lamzoo.evaluation.runtime import Precision, check_batches, resolve_device
from lamzoo.video.extractor import FeatureExtractor, VideoFeatures, clip_middles, read_pieces
from lamzoo.video.feature_files import Origin, is_there, write_features

__all__ = ["Extraction", "FeatureExtractor", "VideoFeatures", "extract_features"]

_logger = logging.getLogger(__name__)

_VIDEO_FOLDER = "clip_features"
_VIDEO_KEY, _TEXT_KEY = "features", "last_hidden_state"


@dataclass(frozen=True)
class Extraction:
    """What :func:`extract_features` left in its folder.

    Attributes:
        videos: how many videos have their features there.
        new_videos: how many of them were read by this run.
        queries: how many sentences have theirs.
        new_queries: how many of them were made by this run.
        unreadable: videos that could not be read, and why.
    """

    videos: int
    new_videos: int
    queries: int
    new_queries: int
    unreadable: Mapping[Path, str]


def extract_features(
    videos: Sequence[str | Path],
    out: str | Path,
    model: str | nn.Module = "open_clip/ViT-B-32:openai",
    *,
    queries: str | Path | None = None,
    clip_seconds: float = 2.0,
    device: str | torch.device = "auto",
    precision: Precision = "float32",
    batch_size: int = 64,
    workers: int = 0,
    on_bad_input: OnBadInput = "stop",
    force: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Extraction:
    """Makes the npz files that QVHighlights' models read: ``clip_features`` and, of queries, ``clip_text_features``.

    A video's file is called as the video and holds ``features`` ``(N, D)``, a query's is ``qid<qid>.npz`` and holds
    ``last_hidden_state`` ``(W, D)``; both float32, what :class:`FeatureExtractor` gives. Each is written in one step as
    soon as it is known, so that a run that was killed goes on from there: what is whole is not made again.

    Args:
        videos: files, and folders with their subfolders.
        out: the folder for both; made where it is missing.
        model: as of :class:`FeatureExtractor`; a model itself is left on the device.
        queries: a file like QVHighlights' annotations, JSON lines with ``qid`` and ``query``.
        clip_seconds: length of a clip; the readers of QVHighlights, TVSum and Charades-STA expect 2.
        device: as torch writes it, or ``"auto"``.
        precision: of the autocast.
        batch_size: frames, and queries, that pass through the towers at a time.
        workers: processes that read videos; 0 reads in this one.
        on_bad_input: ``"stop"`` at a video that can't be read, or ``"skip"``: leave it out, and log it.
        force: make all files anew.
        progress: called with what is made (``"queries"``, ``"videos"``), how many of it this run has dealt with, and
            how many it has to.

    Raises:
        ConfigError: an argument that is not possible, or features that are not finite.
        DataError: there is no video, two have one name, a video can't be read and ``on_bad_input`` is ``"stop"``, none
            can be read, the queries can't be read, a file can't be written, or one was made of or by something else.
        UnsupportedHostError: the model has no towers for images and texts, or no token that ends a text.
        MissingExtraError: PyAV is not installed.
        WeightsError: the weights of the model cannot be had.
    """
    check_batches(batch_size, workers, precision)
    if on_bad_input not in get_args(OnBadInput):
        raise ConfigError(f"on_bad_input is {on_bad_input!r}; it must be 'stop' or 'skip'")
    clip_middles(clip_seconds)
    device = resolve_device(device)
    import_av()
    paths, texts = _targets(videos, out, queries)
    with _folders_of((*paths, *texts)):
        extractor = FeatureExtractor(
            model, clip_seconds=clip_seconds, device=device, precision=precision, batch_size=batch_size
        )
        moved = progress or (lambda what, done, total: None)
        origin = extractor.origin()  # once: it hashes all weights
        new_queries = _make_texts(extractor, origin, texts, batch_size, force, partial(moved, "queries"))
        new_videos, unreadable = _make_videos(
            extractor, origin, paths, workers, on_bad_input, force, partial(moved, "videos")
        )
        if len(unreadable) == len(paths):
            path, reason = next(iter(unreadable.items()))
            raise DataError(f"none of the {len(paths)} videos can be read: {path} ({reason}); replace them")
        return Extraction(len(paths) - len(unreadable), new_videos, len(texts), new_queries, unreadable)


def _targets(
    videos: Sequence[str | Path], out: str | Path, queries: str | Path | None = None
) -> tuple[dict[Path, Path], dict[Path, str]]:
    """Returns what is to be made: by the file to write, each video and each query."""
    of_video: dict[Path, Path] = {}
    for path in find_videos(videos):
        target = Path(out) / _VIDEO_FOLDER / f"{path.stem}.npz"
        other = of_video.setdefault(target, path)
        if other.resolve() != path.resolve():
            raise DataError(f"{other} and {path} would both be {target}; rename one of them, or use two folders")
    of_text: dict[Path, str] = {}
    for qid, text in ({} if queries is None else read_queries(Path(queries))).items():
        name = f"qid{qid}.npz"
        if Path(name).name != name:
            raise DataError(f"the query {qid!r} of {queries} can't give a file its name; call it otherwise")
        if (target := Path(out) / TEXT_FOLDER / name) in of_text:
            raise DataError(f"two queries of {queries} would both be {target}; call one of them otherwise")
        of_text[target] = text
    return of_video, of_text


@contextmanager
def _folders_of(targets: Iterable[Path]) -> Iterator[None]:
    """Makes the folders of files, before anything slow begins; what stays empty is gone in the end."""
    made: list[Path] = []
    try:
        for folder in {target.parent for target in targets}:
            made += [path for path in (folder, *folder.parents) if not path.exists()]
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DataError(
                    f"the folder {folder} can't be made ({error.strerror}); name another with --out"
                ) from error
        yield
    finally:
        for path in sorted(made, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):  # it has something
                path.rmdir()


@dataclass(frozen=True)
class _Piece:
    """Some frames of a video, or why there are none."""

    target: Path
    frames: Tensor | None = None
    last: bool = True
    error: str = ""
    reason: str = ""


class _Pieces(IterableDataset[_Piece]):
    """The frames of videos in pieces; each worker of a loader reads its share of the videos."""

    def __init__(self, videos: Sequence[tuple[Path, Path]], extractor: FeatureExtractor) -> None:
        self._videos, self._sampling, self._transform = videos, extractor.sampling, extractor.transform

    def __iter__(self) -> Iterator[_Piece]:
        worker = get_worker_info()
        share = self._videos if worker is None else self._videos[worker.id :: worker.num_workers]
        for target, path in share:
            try:
                for frames, _, last in read_pieces(path, self._sampling, self._transform):
                    yield _Piece(target, frames, last)
            except DataError as error:
                yield _Piece(target, error=str(error), reason=unreadable_because(error))


def _make_videos(
    extractor: FeatureExtractor,
    origin: Origin,
    videos: Mapping[Path, Path],
    workers: int,
    on_bad_input: OnBadInput,
    force: bool,
    progress: Callable[[int, int], None],
) -> tuple[int, dict[Path, str]]:
    """Writes the features of the videos that have none, and returns how many, and what could not be read."""
    common = {**origin, "clip_seconds": extractor.clip_seconds}
    origins = {target: {**common, "bytes": _size(path)} for target, path in videos.items()}
    todo = [
        (target, path) for target, path in videos.items()
        if force or not is_there(target, _VIDEO_KEY, extractor.video_dim, origins[target])
    ]  # fmt: skip
    # The loader draws a seed for its workers, which are deterministic here: the caller's random state is left alone.
    seed = torch.Generator().manual_seed(0)
    loader = DataLoader(_Pieces(todo, extractor), batch_size=None, num_workers=workers, generator=seed)
    parts: dict[Path, list[Features]] = {}
    unreadable: dict[Path, str] = {}
    done = 0
    with plain_worker_errors():
        for piece in loader:
            target, path = piece.target, videos[piece.target]
            if piece.frames is not None:
                parts.setdefault(target, []).append(extractor.frames(piece.frames))
                if not piece.last:
                    continue
                whole = extractor.finite(np.concatenate(parts.pop(target)), path)
                write_features(target, _VIDEO_KEY, whole, origins[target])
            elif on_bad_input == "stop":
                raise DataError(f"{piece.error}, or go on without it with --on-bad-input skip")
            else:
                parts.pop(target, None)  # it may have been readable up to here
                _logger.warning("left out %s: %s", path, piece.reason)
                unreadable[path] = piece.reason
            done += 1
            progress(done, len(todo))
    return len(todo) - len(unreadable), unreadable


def _make_texts(
    extractor: FeatureExtractor,
    origin: Origin,
    texts: Mapping[Path, str],
    batch_size: int,
    force: bool,
    progress: Callable[[int, int], None],
) -> int:
    """Writes the features of the queries that have none, and returns how many."""
    todo = [
        (target, text) for target, text in texts.items()
        if force or not is_there(target, _TEXT_KEY, extractor.text_dim, {**origin, "query": text})
    ]  # fmt: skip
    for start in range(0, len(todo), batch_size):
        some = todo[start : start + batch_size]
        for (target, text), features in zip(some, extractor.texts([text for _, text in some]), strict=True):
            write_features(target, _TEXT_KEY, features, {**origin, "query": text})
        progress(start + len(some), len(todo))
    return len(todo)


def _size(path: Path) -> int:
    """Returns a file's bytes; -1 for a dangling link, which reading it will name."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
