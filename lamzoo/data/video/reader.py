"""Reading video files through PyAV: chosen frames at exact times, what a file holds, and finding them in folders."""

from __future__ import annotations

import bisect
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lamzoo.data.paths import files_below, find_files
from lamzoo.data.video.packets import (
    KeyPacket,
    PacketIndex,
    UnreadableVideo,
    import_av,
    is_flush,
    read_bytes,
    read_index,
)
from lamzoo.data.video.sampling import FrameSampling
from lamzoo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

#: What counts as a video in a folder; a file that is named is read whatever its extension.
VIDEO_EXTENSIONS = frozenset(
    {".3g2", ".3gp", ".asf", ".avi", ".f4v", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"}
    | {".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv"}
)

_WORTH_A_SEEK = 16  # packets; fewer are decoded sooner than the decoder starts anew
# What FFmpeg opens besides videos: text as terminal art, and lists of other files.
_OTHER_FORMATS = ("tty", "concat", "hls", "dash", "imf")
# By the signs of a display matrix's (a, b) and (c, d): what is at (x, y) is shown at (ax + cy, bx + dy), y downwards.
_TURNS = {
    ((0, 1), (-1, 0)): Image.Transpose.ROTATE_270,
    ((-1, 0), (0, -1)): Image.Transpose.ROTATE_180,
    ((0, -1), (1, 0)): Image.Transpose.ROTATE_90,
    ((-1, 0), (0, 1)): Image.Transpose.FLIP_LEFT_RIGHT,
    ((1, 0), (0, -1)): Image.Transpose.FLIP_TOP_BOTTOM,
    ((0, 1), (1, 0)): Image.Transpose.TRANSPOSE,
    ((0, -1), (-1, 0)): Image.Transpose.TRANSVERSE,
}


@dataclass(frozen=True)
class VideoClip:
    """The chosen frames of a video.

    Attributes:
        frames: RGB, upright. One that was chosen twice is the same object twice.
        times: when each of them appears, in seconds from the first frame of the video.
        duration: of the whole video, in seconds.
    """

    frames: list[Image.Image]
    times: list[float]
    duration: float


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds.

    Attributes:
        duration: seconds from the first frame's appearance to the last one's end.
        width: of the upright picture, in pixels.
        height: likewise.
        frame_rate: frames per second, on average; 0 for a video without duration.
        has_audio: there is sound beside the pictures.
    """

    duration: float
    width: int
    height: int
    frame_rate: float
    has_audio: bool


def read_video(path: str | Path, sampling: FrameSampling = FrameSampling(), *, threads: int = 1) -> VideoClip:  # noqa: B008
    """Reads chosen frames of a video.

    The times are those of the frames themselves, whatever the headers say, so variable rates are right. The file is
    read through once for them; decoded is only what the chosen frames need, on the CPU everywhere. Frames are turned
    upright as the file says. Pixels that are not square stay as they are stored, as in CLIP4Clip, decord and
    torchcodec; ten bits become eight.

    Args:
        path: the file, of any extension: its content says what it is.
        sampling: which frames; by default at most 12 of one a second, spread over the video.
        threads: for decoding; 0 lets FFmpeg choose. Several give the same frames and hasten long videos, but make
            FFmpeg overlook some damage; where several videos are read at once, as in workers, one is best.

    Returns:
        The frames, their times and the video's duration.

    Raises:
        DataError: no such file; it is not a video but a still image, sound or something else; it has no frames;
            it is cut short, or damaged in what was decoded, as far as its container or the decoder can tell: an MPEG
            transport stream that was cut between two frames is only a shorter one.
        ConfigError: a negative number of threads.
        MissingExtraError: PyAV is not installed.
    """
    if threads < 0:
        raise ConfigError(f"the number of decoding threads is {threads}; it must be 0 or more")
    return next(read_video_pieces(path, sampling, threads=threads))


def read_video_pieces(
    path: str | Path, sampling: FrameSampling, size: int | None = None, *, threads: int = 1
) -> Iterator[VideoClip]:
    """Reads chosen frames of a video, some at a time, so that a long one needs no more memory than a short one.

    Where each frame lies is found out once; what is decoded twice lies between the key frame before a piece and the
    piece.

    Args:
        path: see :func:`read_video`, and so the rest.
        sampling: which frames.
        size: of a piece; None for all of them at once.
        threads: for decoding.

    Yields:
        Their next frames; of none, one empty piece.

    Raises:
        DataError: see :func:`read_video`, perhaps after some pieces.
        MissingExtraError: PyAV is not installed.
    """
    with _naming(path) as file:
        with _opened(file) as (container, stream):
            index = read_index(container, stream, file)
        picked, done = sampling.pick(index.times, index.duration), 0
        try:
            for piece in _pieces(picked, size):
                images = _read_by_stamp(file, index, set(piece), threads)
                done += len(piece)
                yield _clip(index, piece, images)
            return
        except (_Astray, UnreadableVideo):
            # Frames are not where their packets say, or a jump went wrong: decoding everything in turn decides.
            index = _decode_index(file, index)
        picked = sampling.pick(index.times, index.duration)[done:]
        if done and not picked:
            raise UnreadableVideo("it is damaged: its frames end sooner than its packets say")
        pieces = _pieces(picked, size)
        for piece, images in zip(pieces, _read_in_turn(file, index, pieces), strict=True):
            yield _clip(index, piece, images)


def probe_video(path: str | Path) -> VideoInfo:
    """Says what a video file holds: reads it through, but decodes its first frame only.

    Raises:
        DataError: see :func:`read_video`, for as much as it looks at.
        MissingExtraError: PyAV is not installed.
    """
    with _naming(path) as file:
        with _opened(file) as (container, stream):
            has_audio = bool(container.streams.audio)
            index = read_index(container, stream, file)
        with _opened(file) as (container, stream):
            width, height = _upright(next(_frames(container, stream, index))).size
    rate = len(index.stamps) / index.duration if index.duration else 0.0
    return VideoInfo(index.duration, width, height, rate, has_audio)


def find_videos(paths: Iterable[str | Path]) -> list[Path]:
    """Lists video files: each file as it is, each folder's videos with all its subfolders', in natural order.

    Args:
        paths: files and folders. A file is taken whatever its name; in a folder the extension decides, and what is
            hidden is skipped.

    Returns:
        The files, in the order of the arguments.

    Raises:
        DataError: a path does not exist, or a folder holds no video.
    """
    return find_files(paths, VIDEO_EXTENSIONS, "video")


def videos_below(folder: Path) -> list[Path]:
    """Lists the video files of a folder and its subfolders by extension, in natural order; none is an empty list."""
    return files_below(folder, VIDEO_EXTENSIONS)


class _Astray(Exception):
    """Frames did not come out of the decoder as their packets promised."""


@contextmanager
def _naming(path: str | Path) -> Iterator[Path]:
    """Yields the path of a file that is there; what turns out to be wrong with it becomes an error that names it."""
    ffmpeg_error = import_av().FFmpegError
    path = Path(path)
    if not path.exists():
        raise DataError(f"no such video: {path}")
    if path.is_dir():
        raise DataError(f"{path} is a folder, not a video")
    try:
        yield path
    except (UnreadableVideo, ffmpeg_error, OSError) as error:
        reason = error if isinstance(error, UnreadableVideo) else UnreadableVideo(error.strerror or str(error))
        raise DataError(f"cannot read the video {path}: {reason}; replace or remove it") from reason


@contextmanager
def _opened(path: Path, threads: int = 1) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Opens a file and yields it with the stream that a player would show."""
    av = import_av()
    if path.stat().st_size == 0:
        raise UnreadableVideo("it is empty")
    # Whatever the file refers to, nothing but files is opened. Tags in unknown encodings do not matter here.
    options = {"protocol_whitelist": "file"}
    try:
        container = av.open(f"file:{path}", container_options=options, metadata_errors="replace")
    except (av.error.InvalidDataError, av.error.EOFError) as error:
        is_mp4 = read_bytes(path, 8)[4:] == b"ftyp"
        no_index = "it is an MP4 without its index (moov), as of a recording or download that broke off"
        raise UnreadableVideo(no_index if is_mp4 else "it is not a video in a format that FFmpeg knows") from error
    with container:
        name = container.format.name
        if name == "image2" or name.endswith("_pipe"):
            raise UnreadableVideo("it is an image file")
        if name in _OTHER_FORMATS:
            raise UnreadableVideo(f"it is not a video ({container.format.long_name})")
        stream = container.streams.best("video")
        if stream is None or av.stream.Disposition.attached_pic in stream.disposition:
            raise UnreadableVideo("it holds no video stream")  # the cover of a piece of music is none
        if stream.codec_context is None:
            raise UnreadableVideo("its pictures are in a codec that this FFmpeg cannot decode")
        stream.codec_context.thread_type = "AUTO"
        stream.codec_context.thread_count = threads
        if threads != 1:  # several mark some damaged frames too late: rather stop at all that look odd
            stream.codec_context.options = {"err_detect": "explode"}
        yield container, stream


def _frames(
    container: InputContainer, stream: VideoStream, index: PacketIndex, key: KeyPacket | None = None
) -> Iterator[VideoFrame]:
    """Decodes from where the container stands; yields the frames from the key packet on, or all of the video's.

    Raises:
        _Astray: the container is past the key packet.
        UnreadableVideo: a frame cannot be decoded, or not without errors.
    """
    since = key.stamp if key else index.stamps[0]
    begun, count, total = not index.keys, 0, len(index.stamps)
    for packet in container.demux(stream):
        if not packet.size and not is_flush(packet):
            continue  # the frame before stays; the decoder would take it for the end
        if not begun and packet.is_keyframe:
            begun = True
            if key is not None and (packet.pts is None or packet.pts > key.stamp):
                raise _Astray
        if not begun:
            continue
        try:
            frames = packet.decode()
        except import_av().FFmpegError as error:
            raise UnreadableVideo(f"it is damaged: decoding fails after {count} of its {total} frames") from error
        for frame in frames:
            if index.trusted and frame.pts is not None and frame.pts < since:
                continue
            if frame.is_corrupt:
                raise UnreadableVideo(f"it is damaged after {count} of its {total} frames")
            yield frame
            count += 1
    if not count:
        raise UnreadableVideo("none of its frames can be decoded")


def _read_by_stamp(path: Path, index: PacketIndex, chosen: set[int], threads: int) -> dict[int, Image.Image]:
    """Decodes the chosen frames, and as few others as the key frames allow.

    Raises:
        _Astray: the file does not keep to its index.
        UnreadableVideo: see :func:`_frames`; with several threads it may only be a trifle.
    """
    if not index.trusted:
        raise _Astray
    if index.open_ended:  # its last frame shows whether it was cut, but not to several threads
        chosen, threads = chosen | {len(index.stamps) - 1}, 1
    images: dict[int, Image.Image] = {}
    with _opened(path, threads) as (container, stream):
        for key, run in _runs(index, sorted(chosen)):
            if key is not None:
                try:
                    container.seek(key.stamp if key.sought is None else key.sought, stream=stream)
                except import_av().FFmpegError as error:
                    raise _Astray from error
            left = run[::-1]
            before = None
            for frame in _frames(container, stream, index, key):
                stamp, wanted = frame.pts, index.stamps[left[-1]]
                if stamp is None or stamp > wanted or (before is not None and stamp <= before):
                    raise _Astray
                if before is None and key is not None and stamp != key.stamp:
                    raise _Astray  # the picture builds up over several frames
                if stamp == wanted:
                    images[left.pop()] = _upright(frame)
                if not left:
                    break
                before = stamp
            if left:
                raise _Astray
    return images


def _runs(index: PacketIndex, chosen: list[int]) -> Iterator[tuple[KeyPacket | None, list[int]]]:
    """Divides rising frame numbers into runs to decode without a jump, each with the key packet to jump to before."""
    stamps = [key.stamp for key in index.keys]
    jump: KeyPacket | None = None
    run: list[int] = []
    reached = index.keys[0].number if index.keys else 0
    for number in chosen:
        stamp = index.stamps[number]
        if stamps:
            key = index.keys[bisect.bisect_right(stamps, stamp) - 1]
            if key.number - reached > _WORTH_A_SEEK:
                if run:
                    yield jump, run
                jump, run = key, []
        run.append(number)
        reached = max(reached, index.numbers[stamp])
    yield jump, run


def _decode_index(path: Path, index: PacketIndex) -> PacketIndex:
    """Decodes the whole video for the times of its frames.

    Their own, where they rise; otherwise the packets' in rising order, since frames come out as they are shown.
    """
    with _opened(path) as (container, stream):
        found = [frame.pts for frame in _frames(container, stream, index)]
    stamps = [stamp for stamp in found if stamp is not None]
    if len(stamps) < len(found) or any(later <= stamp for stamp, later in pairwise(stamps)):
        stamps = index.stamps[: len(found)]
    total = len(index.stamps)
    if index.suspect and len(found) < total:
        raise UnreadableVideo(f"it is damaged: {total - len(found)} of its {total} frames cannot be decoded")
    there = bisect.bisect_right(index.stamps, stamps[-1])
    if there < total - 1:  # some codecs end with a packet that only repeats
        raise UnreadableVideo(f"it is cut short: the last {total - there} of its {total} frames cannot be decoded")
    return replace(index, stamps=stamps)


def _read_in_turn(path: Path, index: PacketIndex, pieces: Sequence[Sequence[int]]) -> Iterator[dict[int, Image.Image]]:
    """Decodes the video once, from its start to the last chosen frame, and yields those of each piece."""
    chosen, images = {number for piece in pieces for number in piece}, {}
    left = list(pieces)
    with _opened(path) as (container, stream):
        for number, frame in enumerate(_frames(container, stream, index)):
            if number in chosen:
                images[number] = _upright(frame)
            while left and (not left[0] or left[0][-1] <= number):
                yield images
                del left[0]
                images = {known: image for known, image in images.items() if left and known >= left[0][0]}
            if not left:
                return


def _pieces(picked: list[int], size: int | None) -> list[list[int]]:
    size = size or max(1, len(picked))
    return [picked[start : start + size] for start in range(0, max(1, len(picked)), size)]


def _clip(index: PacketIndex, picked: Sequence[int], images: Mapping[int, Image.Image]) -> VideoClip:
    times = index.times
    return VideoClip([images[number] for number in picked], [times[number] for number in picked], index.duration)


def _upright(frame: VideoFrame) -> Image.Image:
    """Converts a frame to RGB, turned by the quarter that its display matrix comes nearest to, or mirrored."""
    image = Image.fromarray(frame.to_ndarray(format="rgb24", threads=1))
    side_data: Any = frame.side_data
    if "DISPLAYMATRIX" not in side_data:
        return image
    a, b, _, c, d = struct.unpack_from("=5i", bytes(side_data["DISPLAYMATRIX"]))
    aside = abs(b) + abs(c) > abs(a) + abs(d)
    turn = _TURNS.get(((0, _sign(b)), (_sign(c), 0)) if aside else ((_sign(a), 0), (0, _sign(d))))
    return image if turn is None else image.transpose(turn)


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)
