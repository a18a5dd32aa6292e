"""Reading of video files through PyAV: frames at exact times, metadata, and listing of video files."""

from __future__ import annotations

import bisect
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lamzoo.data.paths import find_files, list_files, open_listed
from lamzoo.data.video.packets import (
    KeyPacket,
    PacketIndex,
    UnreadableVideo,
    import_av,
    is_flush,
    open_container,
    read_bytes,
    read_index,
)
from lamzoo.data.video.sampling import FrameSampling
from lamzoo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

#: Extensions of videos in folders; files given by path are read whatever their extension.
VIDEO_EXTENSIONS = frozenset(
    {".3g2", ".3gp", ".asf", ".avi", ".f4v", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"}
    | {".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv"}
)

_WORTH_A_SEEK = 16  # packets; decoding fewer is faster than seeking
# Formats that FFmpeg opens besides videos: text as terminal art, and lists of other files.
_OTHER_FORMATS = ("tty", "concat", "hls", "dash", "imf")
# By the signs of a display matrix's (a, b) and (c, d): pixel (x, y) is shown at (ax + cy, bx + dy), y downwards.
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
    """Sampled frames of a video.

    Attributes:
        frames: RGB, upright. A repeated frame is the same object.
        times: time of each frame, seconds from the first frame of the video.
        duration: duration of the whole video, seconds.
    """

    frames: list[Image.Image]
    times: list[float]
    duration: float


@dataclass(frozen=True)
class VideoInfo:
    """Metadata of a video file.

    Attributes:
        duration: seconds from the start of the first frame to the end of the last one.
        has_audio: whether the file has an audio track.
    """

    duration: float
    has_audio: bool


def read_video(path: str | Path, sampling: FrameSampling = FrameSampling(), *, threads: int = 1) -> VideoClip:  # noqa: B008
    """Reads sampled frames of a video.

    Times are those of the frames, independent of the headers, so variable frame rates are handled correctly. The
    packets of the file are read once for that; only the frames that the sampling requires are decoded, on the CPU.
    Frames are rotated upright according to the file. Non-square pixels are not resampled, as in CLIP4Clip, decord and
    torchcodec; 10-bit video is converted to 8 bits.

    Args:
        path: the file; its content, not its extension, determines the format.
        sampling: the frame sampling; by default one frame per second, at most 12, spread over the video.
        threads: decoding threads; 0 lets FFmpeg choose. Several threads give the same frames and speed up long videos,
            but let FFmpeg miss some damage; if several videos are read in parallel, as in workers, use one.

    Returns:
        The frames, their times and the duration of the video.

    Raises:
        DataError: the file does not exist; it is a still image, audio or not a video; it has no frames; it is
            truncated, or damaged in the decoded part, as far as its container or the decoder can tell: an MPEG
            transport stream cut between two frames is a valid shorter one.
        ConfigError: the number of threads is negative.
        MissingExtraError: PyAV is not installed.
    """
    if threads < 0:
        raise ConfigError(f"the number of decoding threads is {threads}; it must be 0 or more")
    return next(read_video_pieces(path, sampling, threads=threads))


def read_video_pieces(
    path: str | Path, sampling: FrameSampling, size: int | None = None, *, threads: int = 1
) -> Iterator[VideoClip]:
    """Reads sampled frames of a video in chunks, so that memory doesn't grow with its length.

    The packet index is read once; only frames between a chunk and the key frame before it are decoded twice.

    Args:
        path: as for :func:`read_video`.
        sampling: the frame sampling.
        size: frames per chunk; None for a single chunk.
        threads: decoding threads.

    Yields:
        The next frames; a single empty chunk if no frame is sampled.

    Raises:
        DataError: as for :func:`read_video`, possibly after some chunks.
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
            # Frames don't match their packets, or seeking failed: decode everything in order.
            index = _decode_index(file, index)
        picked = sampling.pick(index.times, index.duration)[done:]
        if done and not picked:
            raise UnreadableVideo("it is damaged: its frames end sooner than its packets say")
        pieces = _pieces(picked, size)
        for piece, images in zip(pieces, _read_in_turn(file, index, pieces), strict=True):
            yield _clip(index, piece, images)


def probe_video(path: str | Path) -> VideoInfo:
    """Returns the metadata of a video file; reads all packets, but decodes no frame.

    Raises:
        DataError: as for :func:`read_video`, except for damage that only decoding shows.
        MissingExtraError: PyAV is not installed.
    """
    with _naming(path) as file, _opened(file) as (container, stream):
        return VideoInfo(read_index(container, stream, file).duration, bool(container.streams.audio))


def find_videos(paths: Iterable[str | Path]) -> list[Path]:
    """Lists video files: given files, and the videos of given folders and their subfolders in natural order.

    Args:
        paths: files and folders. A file is listed whatever its name; in folders, files are selected by extension, and
            hidden ones are skipped.

    Returns:
        The files, in the order of the arguments.

    Raises:
        DataError: a path does not exist, or a folder has no videos.
    """
    return find_files(paths, VIDEO_EXTENSIONS, "video")


def video_targets(videos: Iterable[str | Path], folder: Path, suffix: str) -> dict[Path, Path]:
    """Returns the file to write for each video, with the video.

    Args:
        videos: files and folders, as for :func:`find_videos`.
        folder: the folder of the files to write.
        suffix: their suffix, after the name of the video: ``".npz"``.

    Raises:
        DataError: as of :func:`find_videos`, or two videos have the same name.
    """
    found: dict[Path, Path] = {}
    for path in find_videos(videos):
        target = folder / f"{path.stem}{suffix}"
        other = found.setdefault(target, path)
        if other.resolve() != path.resolve():
            raise DataError(f"{other} and {path} would both be written to {target}; rename one, or use two folders")
    return found


def videos_below(folder: Path) -> list[Path]:
    """Lists the video files of a folder and its subfolders as :func:`lamzoo.data.paths.list_files` does."""
    return list_files(folder, VIDEO_EXTENSIONS).files


class _Astray(Exception):
    """The decoded frames don't match the packet index."""


@contextmanager
def _naming(path: str | Path) -> Iterator[Path]:
    """Yields the path of an existing file; an :class:`UnreadableVideo` is raised as an error that names the file."""
    ffmpeg_error = import_av().FFmpegError
    path = Path(path)
    try:
        open_listed(path).close()  # FFmpeg would wait for the other end of a pipe
    except FileNotFoundError:
        raise DataError(f"no such video: {path}") from None
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder, not a video") from error
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"cannot read the video {path}: {why}; replace or remove it") from error
    try:
        yield path
    except (UnreadableVideo, ffmpeg_error, OSError) as error:
        reason = error if isinstance(error, UnreadableVideo) else UnreadableVideo(error.strerror or str(error))
        raise DataError(f"cannot read the video {path}: {reason}; replace or remove it") from reason


@contextmanager
def _opened(path: Path, threads: int = 1) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Opens a file and yields it with its main video stream."""
    av = import_av()
    if path.stat().st_size == 0:
        raise UnreadableVideo("it is empty")
    try:
        container = open_container(path)
    except (av.error.InvalidDataError, av.error.EOFError) as error:
        is_mp4 = read_bytes(path, 8)[4:] == b"ftyp"
        no_index = "it is an MP4 without its index (moov), as from an interrupted recording or download"
        raise UnreadableVideo(no_index if is_mp4 else "it is not a video in a format that FFmpeg supports") from error
    with container:
        name = container.format.name
        if name == "image2" or name.endswith("_pipe"):
            raise UnreadableVideo("it is an image file")
        if name in _OTHER_FORMATS:
            raise UnreadableVideo(f"it is not a video ({container.format.long_name})")
        stream: Any = container.streams.best("video")
        if stream is None or av.stream.Disposition.attached_pic in stream.disposition:
            raise UnreadableVideo("it has no video stream")  # cover art of music doesn't count
        if stream.codec_context is None:
            raise UnreadableVideo("its codec is not supported by this FFmpeg")
        stream.codec_context.thread_type = "AUTO"
        stream.codec_context.thread_count = threads
        if threads != 1:  # several threads mark some damaged frames too late, so every suspect frame is an error
            stream.codec_context.options = {"err_detect": "explode"}
        yield container, stream


def _frames(
    container: InputContainer, stream: VideoStream, index: PacketIndex, key: KeyPacket | None = None
) -> Iterator[VideoFrame]:
    """Decodes from the current position; yields the frames from the key packet on, or all frames of the video.

    Raises:
        _Astray: the position is after the key packet.
        UnreadableVideo: a frame can't be decoded without errors.
    """
    since = key.stamp if key else index.stamps[0]
    begun, count, total = not index.keys, 0, len(index.stamps)
    for packet in container.demux(stream):
        if not packet.size and not is_flush(packet):
            continue  # the previous frame stays; the decoder would interpret it as the end
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
    """Decodes the selected frames, and as few others as the key frames allow.

    Raises:
        _Astray: the frames don't match the index.
        UnreadableVideo: as for :func:`_frames`; with several threads possibly a false alarm.
    """
    if not index.trusted:
        raise _Astray
    if index.open_ended:  # only a single thread can tell by the last frame whether the file is truncated
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
    """Divides ascending frame numbers into runs to decode without seeking, each with the key packet to seek to."""
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
    """Decodes the whole video to determine the times of its frames.

    These are the timestamps of the frames if ascending, otherwise the sorted timestamps of the packets, since frames
    are decoded in display order.
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
    if there < total - 1:  # some codecs end with a packet that repeats a frame
        raise UnreadableVideo(f"it is cut short: the last {total - there} of its {total} frames cannot be decoded")
    return replace(index, stamps=stamps)


def _read_in_turn(path: Path, index: PacketIndex, pieces: Sequence[Sequence[int]]) -> Iterator[dict[int, Image.Image]]:
    """Decodes the video once, from its start to the last selected frame, and yields the frames of each chunk."""
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
    """Converts a frame to RGB, rotated by the nearest quarter turn of its display matrix, or mirrored."""
    if frame.width * frame.height > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):  # Pillow's limit for images
        raise UnreadableVideo(f"its frames are too large, {frame.width} x {frame.height} pixels")
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
