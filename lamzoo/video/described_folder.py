"""Description of many videos: for each one a record of its windows, and subtitles, which an interrupted run keeps."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamzoo.data import OnBadInput
from lamzoo.data.fingerprint import file_sizes
from lamzoo.data.images.decode import unreadable_because
from lamzoo.data.validation import check_on_bad
from lamzoo.data.video.packets import import_av
from lamzoo.data.video.reader import video_targets
from lamzoo.errors import DataError
from lamzoo.evaluation.captions.evaluate import check_streams
from lamzoo.evaluation.resume import origin_difference, settings_of, weights_sha256
from lamzoo.evaluation.retrieval.evaluate import preprocessing_of
from lamzoo.evaluation.runtime import resolve_device
from lamzoo.files import atomic_files, make_folder
from lamzoo.models.describer.generation import GenerationConfig
from lamzoo.reading import parse_json, read_text, reason, to_json
from lamzoo.registry.factory import create_model
from lamzoo.video.describe import TOWERS, VideoWindows, as_record, check_towers, describe_windows
from lamzoo.video.processes import Processes
from lamzoo.video.webvtt import Cue, format_webvtt

_logger = logging.getLogger(__name__)

# Of a record, as of as_record().
_KEYS = {"video", "duration", "rate", "seconds", "modalities", "missing", "windows", "skipped"}


@dataclass(frozen=True)
class DescribedVideos:
    """Result of :func:`describe_videos`.

    Attributes:
        records: the record of each described video, as JSON values, in natural order.
        new: number of those described in this run.
        unreadable: videos that could not be described, with the reason.
    """

    records: Sequence[Mapping[str, Any]]
    new: int
    unreadable: Mapping[Path, str]


def describe_videos(
    videos: Sequence[str | Path],
    out: str | Path,
    model: str | nn.Module,
    *,
    towers: str | nn.Module = TOWERS,
    rate: float | None = None,
    seconds: float | None = None,
    generation: GenerationConfig | None = None,
    context: bool | None = None,
    device: str | torch.device = "auto",
    on_bad_input: OnBadInput = "stop",
    force: bool = False,
    processes: Processes = Processes(),  # noqa: B008 - it is frozen
    progress: Callable[[int, int], None] | None = None,
) -> DescribedVideos:
    """Writes ``NAME.json`` and subtitles, ``NAME.vtt``, for each video; see :func:`lamzoo.describe_video`.

    Both files of a video are written atomically as soon as it is described, and complete ones are kept, so an
    interrupted run resumes. Several processes write the same files as one. The record has the windows, as ``lamzoo
    describe --json``, and under ``origin`` the weights and settings that they were generated with.

    Args:
        videos: files, and folders including their subfolders.
        out: output folder; created if missing.
        model: a model of the family ``lam_describer``, or the name of one with weights; it is moved to the device.
        towers: name or model of the towers that compute the frame features.
        rate: frames per second, as for :class:`VideoWindows`.
        seconds: length of a window.
        generation: decoding settings; greedy search by default.
        context: whether to condition on the previous sentences, as for :func:`describe_windows`.
        device: a torch device, or ``"auto"``.
        on_bad_input: ``"stop"`` raises an error if a video can't be described; ``"skip"`` skips it with a warning.
        force: describe all videos again.
        processes: the processes that share the videos, as of :func:`launched_processes`; each calls this function.
        progress: called with the number of videos done in this run by this process, and its total.

    Raises:
        ConfigError: an argument is invalid.
        DataError: there are no videos, two have the same name, a video can't be described and ``on_bad_input`` is
            ``"stop"``, no video can be described, a file can't be written, or an existing file has another origin.
        UnsupportedHostError: the model is not a describer, or the features of the towers don't fit it.
        MissingExtraError: PyAV is not installed.
        WeightsError: the weights of a model are not available.
    """
    check_on_bad(on_bad_input)
    device = resolve_device(device)
    import_av()
    # Once, as other machines may see a folder later.
    paths = processes.on_main(lambda: video_targets(videos, Path(out), ".json"))
    network: Any = create_model(model, pretrained=True) if isinstance(model, str) else model
    check_streams(network, {})
    if isinstance(towers, str) and "video" in network.features:
        check_towers(network, towers)
        towers = create_model(towers, pretrained=True)  # once, not for each video
    generation = generation or GenerationConfig()
    origin = _origin(network, towers, rate, seconds, generation, context)
    network.to(device)

    def missing() -> list[Path]:
        make_folder(Path(out))  # at once, so that an error occurs before the work
        return [target for target, path in paths.items() if force or _read(target, path, origin) is None]

    todo = processes.on_main(missing)
    share, bad = processes.share(todo), dict[Path, str]()
    for done, target in enumerate(share, start=1):
        path = paths[target]
        size = file_sizes([path])[0]  # before it is read, so that a change meanwhile is noticed
        try:
            windows = VideoWindows(path, network, towers=towers, rate=rate, seconds=seconds, device=device)
            described = describe_windows(network, windows, generation=generation, context=context)
        except DataError as error:
            if on_bad_input == "stop":
                raise DataError(f"{error}, or skip it with --on-bad-input skip") from error
            bad[path] = unreadable_because(error)
            _logger.warning("skipped %s: %s", path, bad[path])
        else:
            _write(target, {**as_record(windows, described), "origin": {**origin, "bytes": size}})
        if progress is not None:
            progress(done, len(share))
    bad = {path: why for part in processes.gather(bad) for path, why in part.items()}
    bad = {path: bad[path] for path in paths.values() if path in bad}
    if len(bad) == len(paths):
        path, why = next(iter(bad.items()))
        raise DataError(f"none of the {len(paths)} videos can be described: {path} ({why}); replace them")
    records = [_read(target, path, origin) for target, path in paths.items() if path not in bad]
    if None in records:
        raise DataError(f"{out} lacks records that were written in this run; use a folder that all machines share")
    return DescribedVideos([record for record in records if record is not None], len(todo) - len(bad), bad)


def _origin(
    model: Any,
    towers: Any,
    rate: float | None,
    seconds: float | None,
    generation: GenerationConfig,
    context: bool | None,
) -> dict[str, Any]:
    """Returns what the sentences depend on, besides the video, as JSON values."""
    return {
        "weights": weights_sha256(model),
        **settings_of(model),
        "towers": None,
        **(_towers_origin(towers) if isinstance(towers, nn.Module) and "video" in model.features else {}),
        "rate": rate,
        "seconds": seconds,
        "generation": dataclasses.asdict(generation),
        "context": context,
    }


def _towers_origin(towers: nn.Module) -> dict[str, Any]:
    settings = {**settings_of(towers), "preprocessing": preprocessing_of(towers)}
    return {"towers": weights_sha256(towers), **{f"towers' {name}": value for name, value in settings.items()}}


def _read(target: Path, video: Path, origin: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the record of a video; None if it, or the subtitles, are missing or damaged.

    Raises:
        DataError: the record is of another video, or has another origin.
    """
    if not target.exists() or not target.with_suffix(".vtt").exists():
        return None
    try:
        record = parse_json(read_text(target), file_names=True)
        there = dict(record["origin"])
        if lacking := _KEYS - record.keys():
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
        _cues(record)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _logger.warning("described again: %s can't be read (%s)", target, reason(error))
        return None
    now = {**origin, "bytes": file_sizes([video])[0]}
    if (name := origin_difference(there, now)) is not None:
        other = "another video of this name" if name == "bytes" else f"other {name}"
        raise DataError(
            f"{target} was made of or with {other}; choose another folder (--out), remove the file, or describe all "
            "videos again with --force (force=True)"
        )
    return dict(record)


def _write(target: Path, record: Mapping[str, Any]) -> None:
    with atomic_files(DataError) as stage:
        stage(target.with_suffix(".vtt")).write_text(format_webvtt(_cues(record)), encoding="utf-8", newline="\n")
        stage(target).write_text(to_json(record, indent=2) + "\n", encoding="utf-8", newline="\n")


def _cues(record: Mapping[str, Any]) -> list[Cue]:
    return [Cue(each["start"], each["end"], each["text"]) for each in record["windows"]]
