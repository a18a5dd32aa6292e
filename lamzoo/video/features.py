"""Feature files of videos and queries, in the format of QVHighlights' models."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lamzoo.data import OnBadInput, plain_worker_errors
from lamzoo.data.feature_arrays import Features
from lamzoo.data.fingerprint import file_sizes
from lamzoo.data.images.decode import unreadable_because
from lamzoo.data.moments.feature_folder import TEXT_FOLDER
from lamzoo.data.moments.qvhighlights import read_queries
from lamzoo.data.validation import check_on_bad
from lamzoo.data.video.packets import import_av
from lamzoo.data.video.reader import video_targets
from lamzoo.errors import DataError
from lamzoo.evaluation.runtime import Precision, check_batches, resolve_device
from lamzoo.files import make_folder
from lamzoo.video.extractor import FeatureExtractor, VideoFeatures, clip_middles, read_pieces
from lamzoo.video.feature_files import Origin, is_there, write_features
from lamzoo.video.processes import Processes

__all__ = ["Extraction", "FeatureExtractor", "VideoFeatures", "extract_features"]

_logger = logging.getLogger(__name__)

_VIDEO_FOLDER = "clip_features"
_VIDEO_KEY, _TEXT_KEY = "features", "last_hidden_state"


@dataclass(frozen=True)
class Extraction:
    """Result of :func:`extract_features`.

    Attributes:
        videos: number of videos with features in the folder.
        new_videos: number of those computed in this run.
        queries: number of queries with features in the folder.
        new_queries: number of those computed in this run.
        unreadable: videos that could not be read, with the reason.
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
    processes: Processes = Processes(),  # noqa: B008 - it is frozen
    progress: Callable[[str, int, int], None] | None = None,
) -> Extraction:
    """Writes the npz files that QVHighlights' models read: ``clip_features`` and, for queries, ``clip_text_features``.

    The file of a video has the name of the video and contains ``features`` ``(N, D)``; that of a query is
    ``qid<qid>.npz`` and contains ``last_hidden_state`` ``(W, D)``. Both are float32, computed by
    :class:`FeatureExtractor`. Each file is written atomically as soon as it is complete, and complete files are kept,
    so an interrupted run resumes. Several processes write the same files as one.

    Args:
        videos: files, and folders including their subfolders.
        out: output folder; created if missing.
        model: name or model, as for :class:`FeatureExtractor`; a model is moved to the device.
        queries: a file in the format of QVHighlights' annotations, JSON lines with ``qid`` and ``query``.
        clip_seconds: length of a clip; the readers of QVHighlights, TVSum and Charades-STA expect 2.
        device: a torch device, or ``"auto"``.
        precision: precision of the autocast.
        batch_size: frames, or queries, per batch.
        workers: worker processes that read videos; 0 runs in the main process.
        on_bad_input: ``"stop"`` raises an error if a video can't be read; ``"skip"`` skips it with a warning.
        force: compute all files again.
        processes: the processes that share the work, as of :func:`launched_processes`; each calls this function.
        progress: called with the stage (``"queries"`` or ``"videos"``), the number done in this run by this process and
            its total.

    Raises:
        ConfigError: an argument is invalid, or features are not finite.
        DataError: there are no videos, two have the same name, a video can't be read and ``on_bad_input`` is
            ``"stop"``, no video can be read, the queries can't be read, a file can't be written, or an existing file
            has another provenance.
        UnsupportedHostError: the model has no image and text towers, or no end token of texts.
        MissingExtraError: PyAV is not installed.
        WeightsError: the weights of the model are not available.
    """
    check_batches(batch_size, workers, precision)
    check_on_bad(on_bad_input)
    clip_middles(clip_seconds)
    device = resolve_device(device)
    import_av()
    paths, texts = processes.on_main(lambda: _targets(videos, out, queries))  # other machines may see a folder later
    with _folders_of((*paths, *texts)):
        extractor = FeatureExtractor(
            model, clip_seconds=clip_seconds, device=device, precision=precision, batch_size=batch_size
        )
        moved = progress or (lambda what, done, total: None)
        origin = extractor.origin()  # once: it hashes all weights
        new_queries = _make_texts(extractor, origin, texts, batch_size, force, processes, partial(moved, "queries"))
        new_videos, unreadable = _make_videos(
            extractor, origin, paths, workers, on_bad_input, force, processes, partial(moved, "videos")
        )
        if len(unreadable) == len(paths):
            path, reason = next(iter(unreadable.items()))
            raise DataError(f"none of the {len(paths)} videos can be read: {path} ({reason}); replace them")
        return Extraction(len(paths) - len(unreadable), new_videos, len(texts), new_queries, unreadable)


def _targets(
    videos: Sequence[str | Path], out: str | Path, queries: str | Path | None = None
) -> tuple[dict[Path, Path], dict[Path, str]]:
    """Returns the files to write, each with its video or query."""
    of_video = video_targets(videos, Path(out) / _VIDEO_FOLDER, ".npz")
    of_text: dict[Path, str] = {}
    for qid, text in ({} if queries is None else read_queries(Path(queries))).items():
        name = f"qid{qid}.npz"
        if Path(name).name != name:
            raise DataError(f"the qid {qid!r} in {queries} is not a valid file name; use another")
        if (target := Path(out) / TEXT_FOLDER / name) in of_text:
            raise DataError(f"two queries of {queries} would both be written to {target}; rename one of them")
        of_text[target] = text
    return of_video, of_text


@contextmanager
def _folders_of(targets: Iterable[Path]) -> Iterator[None]:
    """Creates the folders of the files, so that errors occur early; removes empty folders at the end."""
    made: list[Path] = []
    try:
        for folder in {target.parent for target in targets}:
            made += [path for path in (folder, *folder.parents) if not path.exists()]
            make_folder(folder)
        yield
    finally:
        for path in sorted(made, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):  # not empty
                path.rmdir()


@dataclass(frozen=True)
class _Piece:
    """A chunk of the frames of a video, or the reason why it can't be read."""

    target: Path
    frames: Tensor | None = None
    last: bool = True
    error: str = ""
    reason: str = ""


class _Pieces(IterableDataset[_Piece]):
    """The frames of videos in chunks; each worker of a loader reads its share of the videos."""

    def __init__(self, videos: Sequence[tuple[Path, Path]], extractor: FeatureExtractor) -> None:
        self._videos, self._sampling = videos, extractor.sampling
        self._transform, self._chunk = extractor.transform, extractor.chunk

    def __iter__(self) -> Iterator[_Piece]:
        worker = get_worker_info()
        share = self._videos if worker is None else self._videos[worker.id :: worker.num_workers]
        for target, path in share:
            try:
                for frames, _, last in read_pieces(path, self._sampling, self._transform, self._chunk):
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
    processes: Processes,
    progress: Callable[[int, int], None],
) -> tuple[int, dict[Path, str]]:
    """Writes missing features of videos; returns their number and the unreadable videos, of all processes."""
    common = {**origin, "clip_seconds": extractor.clip_seconds}
    sizes = file_sizes([*videos.values()])  # -1 for a dangling link, which is reported when it is read
    origins = {target: {**common, "bytes": size} for target, size in zip(videos, sizes, strict=True)}

    def missing() -> list[tuple[Path, Path]]:
        return [
            (target, path) for target, path in videos.items()
            if force or not is_there(target, _VIDEO_KEY, extractor.video_dim, origins[target])
        ]  # fmt: skip

    todo = processes.share(whole := processes.on_main(missing))
    # The loader draws a seed for its workers, which are deterministic here: the caller's random state is preserved.
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
                features = extractor.finite(np.concatenate(parts.pop(target)), path)
                write_features(target, _VIDEO_KEY, features, origins[target])
            elif on_bad_input == "stop":
                raise DataError(f"{piece.error}, or skip it with --on-bad-input skip")
            else:
                parts.pop(target, None)  # it may have been readable up to here
                _logger.warning("skipped %s: %s", path, piece.reason)
                unreadable[path] = piece.reason
            done += 1
            progress(done, len(todo))
    found = {path: reason for part in processes.gather(unreadable) for path, reason in part.items()}
    unreadable = {path: found[path] for _, path in whole if path in found}
    return len(whole) - len(unreadable), unreadable


def _make_texts(
    extractor: FeatureExtractor,
    origin: Origin,
    texts: Mapping[Path, str],
    batch_size: int,
    force: bool,
    processes: Processes,
    progress: Callable[[int, int], None],
) -> int:
    """Writes missing features of queries and returns their number, of all processes."""

    def missing() -> list[tuple[Path, str]]:
        return [
            (target, text) for target, text in texts.items()
            if force or not is_there(target, _TEXT_KEY, extractor.text_dim, {**origin, "query": text})
        ]  # fmt: skip

    todo = processes.on_main(missing)
    # Whole batches are shared, because the last digits of features depend on the size of their batch.
    batches = processes.share([todo[start : start + batch_size] for start in range(0, len(todo), batch_size)])
    for done, some in enumerate(batches, start=1):
        for (target, text), features in zip(some, extractor.texts([text for _, text in some]), strict=True):
            write_features(target, _TEXT_KEY, features, {**origin, "query": text})
        progress(sum(map(len, batches[:done])), sum(map(len, batches)))
    return len(todo)
