"""Video search by text: embeds a folder of videos once, then ranks them for any query."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import timm.data
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lamzoo.data import OnBadInput
from lamzoo.data.images.decode import unreadable_because
from lamzoo.data.paths import file_exists
from lamzoo.data.retrieval.clips import EachFrame, FramesTransform, pad_clips
from lamzoo.data.validation import check_on_bad
from lamzoo.data.video.packets import UnreadableVideo, import_av
from lamzoo.data.video.reader import find_videos, read_video
from lamzoo.data.video.sampling import FrameSampling
from lamzoo.errors import ConfigError, DataError
from lamzoo.evaluation.resume import settings_of, weights_sha256
from lamzoo.evaluation.retrieval.evaluate import compare, encode_texts, frames_config, preprocessing_of
from lamzoo.evaluation.retrieval.reranking import check_rerank
from lamzoo.evaluation.runtime import Precision, check_batches, check_finite, inference, resolve_device
from lamzoo.files import cache_folder, file_lock
from lamzoo.registry.factory import create_model
from lamzoo.registry.refs import name_of
from lamzoo.video.clusters import APPROXIMATE_FROM, ClusteredSearch, import_faiss, stored_search
from lamzoo.video.index import (
    SUFFIX,
    GrowingIndex,
    IndexedVideo,
    Origin,
    StoredIndex,
    check_origin,
    check_replaceable,
    part_path,
    part_paths,
    read_index,
    stack_rows,
)
from lamzoo.video.processes import Processes

_logger = logging.getLogger(__name__)

_ODD = r"[^\w.-]+"  # characters to replace in file names
_NAMED = 48  # maximum characters of the folder's and of the model's name in the name of an index
_SAVE_EVERY = 64  # videos; a large index is saved after 5 % more, which keeps the cost of writing low


@dataclass(frozen=True)
class Match:
    """A video that matches a query.

    Attributes:
        path: the file.
        score: cosine similarity of text and video, -1 to 1; with ``similarity="tight"`` the logit of the head.
        duration: seconds.
    """

    path: Path
    score: float
    duration: float


@dataclass(frozen=True, eq=False)
class VideoIndex:
    """Embedded videos with the model that compares texts with them; built by :func:`index_videos`.

    Attributes:
        model: a model of the family ``lam_clip4clip``.
        path: the file of the embeddings.
        videos: the files, in natural order.
        durations: duration of each video, seconds.
        embeddings: ``(N, D)``, float32, of length 1; for ``similarity="tight"`` ``(N, F, D)``, one row per frame.
        frame_mask: None; for ``similarity="tight"`` ``(N, F)``, bool, True where there is a frame.
        unreadable: files that could not be read, with the reason.
        precision: precision of the autocast for queries.
        embedded: number of videos that were embedded in this call; the others were in the file.
        clusters: the approximate search; None for exact search.
    """

    model: Any = field(repr=False)
    path: Path
    videos: Sequence[Path] = field(repr=False)
    durations: Sequence[float] = field(repr=False)
    embeddings: Tensor = field(repr=False)
    frame_mask: Tensor | None = field(default=None, repr=False)
    unreadable: Mapping[Path, str] = field(default_factory=dict, repr=False)
    precision: Precision = "float32"
    embedded: int = 0
    clusters: ClusteredSearch | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.videos)

    def search(self, query: str, top: int = 10, *, rerank: int | None = None) -> list[Match]:
        """Returns the up to ``top`` videos that match a text best, the best first.

        Args:
            query: the text.
            top: maximum number of videos.
            rerank: for ``similarity="tight"``, search in two stages: embeddings select this many candidates, at least
                ``top``, and the head orders them. By default the head compares the text with every video.

        Raises:
            ConfigError: the query is empty, ``top`` is below 1, ``rerank`` is below ``top`` or the model has no head
                for it, or the query's embedding is not finite.
        """
        if not query.strip():
            raise ConfigError("the query is empty; describe the video")
        if top < 1:
            raise ConfigError(f"top is {top}; it must be at least 1")
        if rerank is not None:
            check_rerank(self.model, rerank, top)
        return [Match(self.videos[i], score, self.durations[i]) for score, i in self._best(query, top, rerank)]

    def _best(self, query: str, top: int, rerank: int | None) -> list[tuple[float, int]]:
        """Returns the best scores with the numbers of their videos."""
        with inference(self.model, self.embeddings.device, self.precision, 1):
            text = encode_texts(self.model, [query], 1)
            check_finite(text)
            if self.frame_mask is not None and rerank is None:
                return _highest(compare(self.model, text, self.embeddings, self.frame_mask)[0], top)
        with torch.inference_mode():  # without autocast, whose rounding would cause ties
            unit = F.normalize(text[0, 0] if text.ndim == 3 else text[0], dim=0)  # without words
            if self.clusters is not None:
                found = self.clusters.search(unit.cpu(), top)
                if len(found) == min(top, len(self)):  # otherwise the clusters that were read have fewer
                    return found
            if self.frame_mask is None or rerank is None:
                return _highest(self.embeddings @ unit, top)
            near = torch.tensor([place for _, place in _highest(self._pooled @ unit, rerank)])
        with inference(self.model, self.embeddings.device, self.precision, 1):
            logits = compare(self.model, text, self.embeddings[near], self.frame_mask[near])[0]
        return [(score, int(near[place])) for score, place in _highest(logits, top)]

    @cached_property
    def _pooled(self) -> Tensor:
        """Video embeddings of the first stage, ``(N, D)``, of length 1."""
        return F.normalize(self.model.pool_frames(self.embeddings, self.frame_mask), dim=-1)


def index_videos(
    folder: str | Path,
    model: str | nn.Module = "lam_clip4clip",
    *,
    index: str | Path | None = None,
    sampling: FrameSampling | None = None,
    batch_size: int = 16,
    device: str | torch.device = "auto",
    precision: Precision = "float32",
    workers: int = 0,
    on_bad_input: OnBadInput = "skip",
    force: bool = False,
    processes: Processes = Processes(),  # noqa: B008 - it is frozen
    approximate: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VideoIndex:
    """Embeds the videos of a folder and its subfolders for search by text.

    The embeddings are stored in a file, which is saved at intervals, so an interrupted run resumes. Later runs embed
    only new and changed videos (by size and modification time) and remove those that no longer exist.

    Several processes share the new videos in whole batches. Each but the first saves its share in a part beside the
    file, ``INDEX.part<rank>``; at the end, or at the start of a later run, the parts are merged into the file, which is
    then that of a single process.

    Args:
        folder: folder of the videos, which are recognised by their extension.
        model: name or model of the family ``lam_clip4clip``: a name is created with its weights, a model is moved to
            the device.
        index: the file, a ``.safetensors``; by default a file in the user's cache folder for this folder and the
            weights, masks, token reduction, head and preprocessing of this model. An index that an earlier release
            wrote into the folder, ``lamzoo-index.<model>.safetensors``, is taken over if it was built with the same.
        sampling: the frame sampling; by default that of the existing index, otherwise that of the model.
        batch_size: videos per batch.
        device: a torch device, or ``"auto"``.
        precision: precision of the autocast, for videos and queries.
        workers: worker processes that read videos; 0 runs in the main process.
        on_bad_input: ``"skip"`` skips a video that can't be read with a warning, and tries it again when the file has
            changed; ``"stop"`` raises an error.
        force: embed all videos again.
        processes: the processes that share the work, as of :func:`lamzoo.video.processes.launched_processes`; each
            calls this function, and the index must be on storage that all of them see.
        approximate: search with faiss in clusters of the embeddings, which are kept beside the index. By default from
            100,000 videos on if faiss is installed, on the CPU; not for ``similarity="tight"``.
        progress: called with the number of videos read in this run by this process, and its total.

    Returns:
        The index.

    Raises:
        ConfigError: an argument is invalid, or an embedding is not finite.
        DataError: the folder has no readable video; a video can't be read and ``on_bad_input`` is ``"stop"``; the file
            can't be read or written, is damaged or not an index, is in use by another run, or was built for another
            folder or with other weights or another sampling.
        UnsupportedHostError: the model is not a retrieval model.
        MissingExtraError: PyAV is not installed, or faiss for ``approximate=True``.
        WeightsError: the weights of the model are not available.
    """
    check_batches(batch_size, workers, precision)
    check_on_bad(on_bad_input)
    device, folder = resolve_device(device), Path(folder)
    found = processes.on_main(lambda: _listed(folder))
    import_av()
    network: Any = create_model(model, pretrained=True) if isinstance(model, str) else model
    frames_config(network)
    origin = _origin(network, network.sampling)
    path = _default_path(folder, origin) if index is None else Path(index)
    if path.suffix != SUFFIX:
        raise ConfigError(f"the index {path} is written as safetensors; its name must end in {SUFFIX}")
    if approximate:
        _check_approximate(network)  # before the work
    content = GrowingIndex(path, folder, found, origin)
    locks = ExitStack()

    def begin() -> tuple[list[IndexedVideo], FrameSampling]:
        """Opens the index, and returns the videos to embed and the sampling."""
        check_replaceable(path)
        locks.enter_context(_reserved(path))
        stored = None
        if force:
            for part in part_paths(path):
                part.unlink()
        elif path.exists():
            stored = read_index(path)
        elif index is None:
            stored = _earlier(folder, origin, sampling)
        used = sampling or (network.sampling if stored is None else stored.origin.sampling)
        if used.fps is not None:
            used = replace(used, fps=float(used.fps))  # as it is read back, so that resuming changes no byte
        content.origin = replace(origin, sampling=used)
        if stored is not None:
            content.take_over(stored, unreadable=on_bad_input == "skip")
        content.merge_parts(unreadable=on_bad_input == "skip")
        if network.similarity_type != "mean" and (used.max_frames or sys.maxsize) > network.max_frames:
            raise ConfigError(
                f"max_frames is {used.max_frames or 'all'}, and the model has positions for {network.max_frames} "
                "frames; set max_frames (--max-frames) to that, or less"
            )
        todo = content.missing()
        if todo or not path.exists() or stored is None or content.size < len(stored.videos) + len(stored.unreadable):
            content.save()  # at once, so that a folder that is not writable raises an error before the work
        return todo, used

    with locks:  # until the parts are merged
        todo, used = processes.on_main(begin)
        own = content
        if not processes.is_main:
            own = GrowingIndex(part_path(path, processes.rank), folder, todo, replace(origin, sampling=used))
        # Whole batches are shared, because the last digits of embeddings depend on the other videos of their batch.
        batches = [todo[start : start + batch_size] for start in range(0, len(todo), batch_size)]
        share = [video for batch in processes.share(batches) for video in batch]
        network.to(device)
        _embed(network, own, share, device, precision, batch_size, workers, on_bad_input, progress)
        passing = {name: why for part in processes.gather(own.passing) for name, why in part.items()}

        def end() -> tuple[dict[Path, str], int]:
            """Merges the parts, and returns the unreadable videos and the number of embedded ones."""
            content.merge_parts(unreadable=True)
            content.passing.update(passing)
            lost = [video.path for video in content.missing() if video.path not in passing]
            if lost:
                raise DataError(
                    f"{len(lost)} videos that other processes embedded, such as {lost[0]}, are in no part of {path} "
                    "here; choose an --index on storage that all machines share"
                )
            bad = content.unreadable
            if not content.rows:
                name, reason = next(iter(bad.items()))
                raise DataError(
                    f"none of the {len(found)} videos in {folder} can be read: {name} ({reason}); replace them"
                )
            return bad, sum(video.path in content.rows for video in todo)

        bad, embedded = processes.on_main(end)
    stored = content.stored() if processes.is_main else read_index(path)
    opened = _opened(path, folder, stored, network, device, precision, approximate if processes.is_main else False)
    return replace(opened, unreadable=bad, embedded=embedded)


def load_index(
    path: str | Path,
    model: str | nn.Module = "lam_clip4clip",
    *,
    device: str | torch.device = "auto",
    precision: Precision = "float32",
    approximate: bool | None = None,
) -> VideoIndex:
    """Opens an index without accessing its videos, which may be elsewhere.

    Args:
        path: a file of :func:`index_videos`.
        model: name or model that the index was built with; a model is moved to the device.
        device: a torch device, or ``"auto"``.
        precision: precision of the autocast for queries.
        approximate: as for :func:`index_videos`.

    Raises:
        ConfigError: the device or precision is invalid, or the model compares each frame, for ``approximate=True``.
        DataError: the file can't be read, is damaged or not an index, was built with other weights, or is empty.
        UnsupportedHostError: the model is not a retrieval model.
        MissingExtraError: faiss is not installed, for ``approximate=True``.
        WeightsError: the weights of the model are not available.
    """
    check_batches(1, precision=precision)
    device, path = resolve_device(device), Path(path)
    stored = read_index(path)
    if not stored.videos:
        raise DataError(f"the index {path} is still empty; complete it with index_videos (lamzoo search)")
    network: Any = create_model(model, pretrained=True) if isinstance(model, str) else model
    check_origin(path, stored.origin, _origin(network, stored.origin.sampling))
    return _opened(path, stored.folder_seen_from(path), stored, network.to(device), device, precision, approximate)


class _Read(NamedTuple):
    """A video that was read, or the reason why it can't be read."""

    video: IndexedVideo  # with its duration or reason
    frames: Tensor | None = None  # (F, 3, H, W)
    error: str = ""
    lasting: bool = True  # whether the reason is the content of the file


class _Videos(Dataset[_Read]):
    """The frames of video files, or the reasons why they can't be read."""

    def __init__(
        self, folder: Path, videos: Sequence[IndexedVideo], sampling: FrameSampling, transform: FramesTransform
    ) -> None:
        self._folder, self._videos, self._sampling, self._transform = folder, videos, sampling, transform

    def __len__(self) -> int:
        return len(self._videos)

    def __getitem__(self, index: int) -> _Read:
        video = self._videos[index]
        try:
            clip = read_video(self._folder / video.path, self._sampling)
        except DataError as error:
            lasting = isinstance(error.__cause__, UnreadableVideo) and not isinstance(error.__context__, OSError)
            return _Read(replace(video, reason=unreadable_because(error)), error=str(error), lasting=lasting)
        return _Read(replace(video, duration=clip.duration), self._transform(clip.frames))


def _collate(batch: Sequence[_Read]) -> tuple[tuple[Tensor, Tensor] | None, list[_Read]]:
    """Batches the frames of the readable videos, and removes them from the items."""
    clips = [read.frames for read in batch if read.frames is not None]
    return pad_clips(clips) if clips else None, [read._replace(frames=None) for read in batch]


def _embed(
    model: Any,
    content: GrowingIndex,
    todo: Sequence[IndexedVideo],
    device: torch.device,
    precision: Precision,
    batch_size: int,
    workers: int,
    on_bad_input: OnBadInput,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Reads and embeds videos; saves the embeddings so far, also when interrupted."""
    transform = EachFrame(timm.data.create_transform(**frames_config(model)))
    videos = _Videos(content.folder, todo, content.origin.sampling, transform)
    # The loader draws a seed for its workers, which are deterministic here: the caller's random state is preserved.
    seed = torch.Generator().manual_seed(0)
    loader = DataLoader(videos, batch_size, collate_fn=_collate, num_workers=workers, generator=seed)
    done = 0
    try:
        with inference(model, device, precision, batch_size):
            for clips, batch in loader:
                bad = [read for read in batch if read.video.reason is not None]
                if bad and on_bad_input == "stop":
                    raise DataError(f"{bad[0].error}, or skip it with --on-bad-input skip")
                for read in bad:
                    _logger.warning("skipped %s: %s", content.folder / read.video.path, read.video.reason)
                    content.add(read.video, None, lasting=read.lasting)
                if clips is not None:
                    frames, mask = clips
                    good = [read.video for read in batch if read.video.reason is None]
                    for video, row in zip(good, _rows(model, frames, mask, device), strict=True):
                        _check_finite(row, content.folder / video.path, precision)
                        content.add(video, row)
                done += len(batch)
                content.save(after=max(_SAVE_EVERY, content.size // 20))
                if progress is not None:
                    progress(done, len(todo))
    finally:
        content.save(after=1)


def _rows(model: Any, frames: Tensor, mask: Tensor, device: torch.device) -> list[Tensor]:
    """Returns the embeddings of videos, float32 on the CPU: ``(D,)`` of length 1, or ``(F, D)``, one row per frame."""
    videos = model.encode_video(frames.to(device), mask.to(device)).float().cpu()
    if videos.ndim == 2:
        return list(F.normalize(videos, dim=-1))
    return [video[seen] for video, seen in zip(videos, mask, strict=True)]


def _check_finite(row: Tensor, path: Path, precision: Precision) -> None:
    if not row.isfinite().all():
        raise ConfigError(
            f"the model's embedding of {path} is not finite in {precision}; use float32, or other weights"
        )


def _highest(scores: Tensor, top: int) -> list[tuple[float, int]]:
    """Returns the ``top`` highest of the scores ``(N,)`` with their indices; of equal ones, the first ones."""
    scores = scores.cpu()
    least = scores.topk(min(top, len(scores))).values[-1]  # sorting a million scores would take longer than they took
    (near,) = (scores >= least).nonzero(as_tuple=True)
    best = near[scores[near].argsort(descending=True, stable=True)[:top]].tolist()
    return [(float(scores[i]), i) for i in best]


def _check_approximate(model: Any) -> None:
    if model.similarity_type == "tight":
        raise ConfigError(
            'approximate search compares one embedding per video, and similarity="tight" compares each frame; search '
            "exactly (--exact)"
        )
    import_faiss()


def _opened(
    path: Path,
    folder: Path,
    stored: StoredIndex,
    model: Any,
    device: torch.device,
    precision: Precision,
    approximate: bool | None,
) -> VideoIndex:
    embeddings, mask = stack_rows(stored.rows)
    if approximate is None:
        large = mask is None and len(embeddings) >= APPROXIMATE_FROM and device.type == "cpu"
        approximate = large and find_spec("faiss") is not None
    elif approximate:
        _check_approximate(model)
    return VideoIndex(
        model=model,
        path=path,
        videos=[folder / video.path for video in stored.videos],
        durations=[video.duration for video in stored.videos],
        embeddings=embeddings.to(device),
        frame_mask=None if mask is None else mask.to(device),
        unreadable={folder / video.path: str(video.reason) for video in stored.unreadable},
        precision=precision,
        clusters=stored_search(path, embeddings) if approximate else None,
    )


def _default_path(folder: Path, origin: Origin) -> Path:
    """Returns the default path of an index, which depends on the folder and on all that determines embeddings.

    The sampling is not part of it: by default, a later run uses that of the index.
    """
    place = folder.resolve()
    fields = [origin.weights, origin.similarity, origin.preprocessing, origin.masks]
    fields += [origin.reduction] if origin.reduction else []  # without one, the path of an earlier release
    made = json.dumps(fields, sort_keys=True)
    key = hashlib.sha256(os.fsencode(place) + b"\0" + made.encode()).hexdigest()
    return cache_folder() / "search" / f"{_slug(place.name)}.{_slug(origin.model)}.{key[:16]}{SUFFIX}"


@contextmanager
def _reserved(path: Path) -> Iterator[None]:
    """Keeps other runs from the index and its parts, where the file system has locks."""
    with file_lock(path.with_name(f"{path.name}.lock")) as held:
        if held is False:
            raise DataError(
                f"the index {path} is in use by another run; wait for its end, or choose another file with --index"
            )
        yield


def _earlier(folder: Path, origin: Origin, sampling: FrameSampling | None) -> StoredIndex | None:
    """Returns the index that an earlier release wrote into the folder, if it has the same origin."""
    path = folder / f"lamzoo-index.{re.sub(_ODD, '-', origin.model)}{SUFFIX}"
    if not path.is_file():
        return None
    try:
        stored = read_index(path)
        check_origin(path, stored.origin, replace(origin, sampling=sampling or stored.origin.sampling))
    except DataError as error:
        _logger.info("%s, of an earlier release, is not used: %s", path, error)
        return None
    return replace(stored, folder=str(folder.absolute()))


def _listed(folder: Path) -> list[IndexedVideo]:
    """Lists the videos of a folder with their current size and modification time."""
    if file_exists(folder):
        raise DataError(f"{folder} is a file; give the folder of the videos")
    listed = []
    for path in find_videos([folder]):
        name = path.relative_to(folder).as_posix()
        try:
            stat = path.stat()
        except OSError:  # a dangling link, or just removed; reported when it is read
            listed.append(IndexedVideo(name, -1, 0))
        else:
            listed.append(IndexedVideo(name, stat.st_size, stat.st_mtime_ns))
    return listed


def _origin(model: Any, sampling: FrameSampling) -> Origin:
    return Origin(
        _name(model), weights_sha256(model), model.similarity_type, sampling, preprocessing_of(model),
        **settings_of(model),
    )  # fmt: skip


def _name(model: Any) -> str:
    """Returns the registry name of a model, with the tag of its weights if they have one."""
    name = name_of(model)
    source = getattr(model, "weights_source", None) or ""
    return source if source.startswith(f"{name}.") else name


def _slug(name: str) -> str:
    return re.sub(_ODD, "-", name, flags=re.ASCII)[:_NAMED]
