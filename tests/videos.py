"""Small real video clips, made with PyAV out of the photographs that come inside scikit-image."""

from collections.abc import Hashable, Iterator, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

av = pytest.importorskip("av", reason="making clips needs PyAV")
photographs = pytest.importorskip("skimage.data", reason="the clips are made of scikit-image's photographs")

SIZE = (96, 64)
_TIME_BASE = Fraction(1, 90_000)  # of clips with a variable rate, before the container rounds to its own
_USUAL = {
    "libx264": {"mbtree": "0"},  # with it, one clip in twenty differs by what memory held before
    "libx265": {"x265-params": "log-level=none"},  # it prints by itself
}
_WRITTEN: dict[Hashable, bytes] = {}  # clips by their arguments, since many tests write the same ones


@cache
def photograph(name: str = "astronaut") -> Image.Image:
    return Image.fromarray(getattr(photographs, name)()).convert("RGB")


def pictures(count: int, size: tuple[int, int] = SIZE, name: str = "astronaut") -> list[Image.Image]:
    """Crops of a photograph, from left to right while the camera comes nearer; no two are alike."""
    return list(_pictures(count, size, name))


@cache
def _pictures(count: int, size: tuple[int, int], name: str) -> list[Image.Image]:
    whole = photograph(name)
    made = []
    for number in range(count):
        way = number / max(1, count - 1)
        width = whole.width * (0.6 - 0.3 * way)
        height = min(whole.height, width * size[1] / size[0])
        left, top = (whole.width - width) * way, (whole.height - height) * 0.4
        made.append(whole.resize(size, Image.Resampling.BILINEAR, (left, top, left + width, top + height)))
    return made


def nearest(frame: Image.Image, among: Sequence[Image.Image]) -> int:
    """Which of the pictures a decoded frame shows."""
    shown = np.asarray(frame, np.int16)
    return int(np.argmin([np.abs(shown - np.asarray(picture)).mean() for picture in among]))


def write_clip(
    path: Path,
    frames: int | Sequence[Image.Image] = 10,
    *,
    fps: int | Fraction = 10,
    times: Sequence[float] | None = None,
    size: tuple[int, int] = SIZE,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    container: str | None = None,
    gop: int = 12,
    b_frames: int = 0,
    rotation: int = 0,
    mirrored: bool = False,
    pixel_aspect: Fraction | None = None,
    audio: float = 0.0,
    title: str = "",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Writes a clip.

    Args:
        path: of the file; its extension names the container, unless ``container`` does.
        frames: the pictures, or how many of :func:`pictures`.
        fps: their rate, where ``times`` says nothing else.
        times: when each appears, in seconds, rising: a variable rate.
        size: width and height, where they are made here.
        codec: FFmpeg's name of the encoder.
        pix_fmt: how it stores pixels; ``yuv420p10le`` has ten bits.
        container: FFmpeg's name of the format.
        gop: frames from one key frame to the next.
        b_frames: how many in a row may be predicted from both sides, and so be stored after what they precede.
        rotation: degrees, clockwise, that a player has to turn the picture by.
        mirrored: a player has to mirror it from left to right, too.
        pixel_aspect: width over height of a pixel.
        audio: seconds of a tone beside the pictures; 0 for none.
        title: a tag.
        options: more of the encoder's.
        container_options: of the container, such as ``movflags``.
    """
    given = {name: value for name, value in locals().items() if name not in ("path", "frames")}
    drawn = pictures(frames, size) if isinstance(frames, int) else list(frames)
    key = path.suffix, repr(given), tuple((each.mode, each.size, each.tobytes()) for each in drawn)
    if key in _WRITTEN:
        path.write_bytes(_WRITTEN[key])
        return path
    base = 1 / Fraction(fps) if times is None else _TIME_BASE
    stamps = list(range(len(drawn))) if times is None else [round(time / base) for time in times]
    with av.open(str(path), "w", format=container, container_options=container_options or {}) as file:
        stream = file.add_stream(codec, rate=fps, options={**_USUAL.get(codec, {}), **(options or {})})
        stream.width, stream.height = drawn[0].size if drawn else size
        stream.pix_fmt, stream.thread_count = pix_fmt, 1
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = gop, b_frames
        stream.codec_context.time_base = base
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if rotation or mirrored:
            stream.set_display_rotation(-rotation, hflip=mirrored)
        if title:
            file.metadata["title"] = title
        sound = file.add_stream("aac", rate=44_100) if audio else None
        file.start_encoding()  # writes the header of a clip without frames, too
        for picture, stamp in zip(drawn, stamps, strict=True):
            frame = av.VideoFrame.from_image(picture)
            frame.time_base, frame.pts = base, stamp
            file.mux(stream.encode(frame))
        if drawn:
            file.mux(stream.encode(None))
        if sound is not None:
            for packet in _tone(sound, audio):
                file.mux(packet)
    _WRITTEN[key] = path.read_bytes()
    return path


def write_sound(path: Path, seconds: float = 0.5, *, cover: bool = False) -> Path:
    """Writes a tone, with a cover as music files have it if asked, and no video."""
    with av.open(str(path), "w") as file:
        sound = file.add_stream("libmp3lame" if path.suffix == ".mp3" else "aac", rate=44_100)
        if cover:
            picture = file.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 64, 64, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            frame = av.VideoFrame.from_image(pictures(1, (64, 64))[0])
            for packet in [*picture.encode(frame), *picture.encode(None)]:
                file.mux(packet)
        for packet in _tone(sound, seconds):
            file.mux(packet)
    return path


def _tone(stream: "av.AudioStream", seconds: float) -> Iterator["av.Packet"]:
    """The packets of a tone of 440 Hz."""
    count = max(1, round(seconds * stream.rate))
    wave = (np.sin(np.arange(count) * 2 * np.pi * 440 / stream.rate) * 8000).astype(np.int16)
    for start in range(0, count, 1024):
        frame = av.AudioFrame.from_ndarray(wave[None, start : start + 1024], format="s16", layout="mono")
        frame.sample_rate, frame.pts = stream.rate, start
        yield from stream.encode(frame)
    yield from stream.encode(None)
