import importlib.util
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from lamzoo.data.images.decode import unreadable_because
from lamzoo.data.video import reader
from lamzoo.data.video.instants import ClipMiddles
from lamzoo.data.video.packets import PacketIndex
from lamzoo.data.video.reader import find_videos, probe_video, read_video, read_video_pieces, videos_below
from lamzoo.data.video.sampling import FrameSampling
from lamzoo.errors import ConfigError, DataError, MissingExtraError
from tests.images import encoded
from tests.videos import SIZE, av, nearest, pictures, write_clip, write_sound

EVERY = FrameSampling(fps=None, max_frames=None)
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}
FASTSTART = {"movflags": "faststart"}
OPEN_GOPS = {"x264-params": "open-gop=1:scenecut=0"}
CLIPS = {
    "h264.mp4": {"b_frames": 3},
    "h264.mov": {"b_frames": 3},
    "fragments.mp4": {"b_frames": 3, "container_options": FRAGMENTS},
    "h264.mkv": {"b_frames": 3},
    "open.mkv": {"b_frames": 3, "options": OPEN_GOPS},
    "h264.ts": {"b_frames": 3},
    "open.ts": {"b_frames": 3, "options": OPEN_GOPS},
    "h264.flv": {"b_frames": 3},
    "h264.avi": {"b_frames": 3},
    "refresh.mkv": {"options": {"intra-refresh": "1"}},
    "raw.h264": {"b_frames": 3},
    "hevc.mp4": {"codec": "libx265", "pix_fmt": "yuv420p10le", "b_frames": 3},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mpeg4b.avi": {"codec": "mpeg4", "b_frames": 2},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "mpeg2.mpg": {"codec": "mpeg2video", "fps": 25, "b_frames": 2},
    "vp8.webm": {"codec": "libvpx", "options": {"deadline": "realtime", "auto-alt-ref": "1", "lag-in-frames": "8"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "wmv2.wmv": {"codec": "wmv2"},
    "animation.gif": {"codec": "gif", "pix_fmt": "rgb8"},
}


def clip(folder: Path, name: str, count: int = 40, **more: object) -> Path:
    return write_clip(folder / name, count, **{**CLIPS[name], **more})


def arrays(read: reader.VideoClip) -> np.ndarray:
    return np.stack([np.asarray(frame) for frame in read.frames])


def spoil(path: Path, start: int, count: int) -> None:
    content = bytearray(path.read_bytes())
    content[start : start + count] = np.random.default_rng(0).bytes(count)
    path.write_bytes(content)


def positions(path: Path) -> list[int]:
    """Where each packet of a file begins."""
    with av.open(str(path)) as file:
        return [packet.pos for packet in file.demux(video=0) if packet.size]


@pytest.mark.parametrize("name", CLIPS)
def test_each_frame_is_the_one_on_screen_at_its_time(tmp_path: Path, name: str) -> None:
    path, fps = clip(tmp_path, name), CLIPS[name].get("fps", 10)
    drawn = pictures(40)
    read = read_video(path, FrameSampling(fps=4, max_frames=None))
    wanted = [int(time * fps + 1e-9) for time in np.arange(0, 40 / fps, 0.25)]
    assert [nearest(frame, drawn) for frame in read.frames] == wanted
    assert read.times == pytest.approx([number / fps for number in wanted], abs=1e-3)
    assert read.duration == pytest.approx(40 / fps, abs=1e-3)
    assert {(frame.mode, frame.size) for frame in read.frames} == {("RGB", SIZE)}


@pytest.mark.parametrize("name", CLIPS)
def test_jumping_to_key_frames_gives_the_frames_that_decoding_everything_does(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = clip(tmp_path, name, 90)
    whole = arrays(read_video(path, EVERY))
    assert len(whole) == 90
    monkeypatch.setattr(reader, "_WORTH_A_SEEK", 0)
    for count in (2, 5, 7, 12):
        sampling = FrameSampling(fps=None, max_frames=count)
        assert (arrays(read_video(path, sampling)) == whole[sampling.keep(90)]).all(), count


@pytest.mark.parametrize("name", ["h264.mp4", "open.ts", "h264.avi", "mpeg4b.avi", "vp9.webm"])
def test_pieces_are_the_whole_and_the_packets_are_read_once(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = clip(tmp_path, name)
    sampling = FrameSampling(fps=15, max_frames=None)  # of ten frames a second: some are taken twice
    whole = read_video(path, sampling)
    for function in ("read_index", "_decode_index"):
        original, calls = getattr(reader, function), []
        monkeypatch.setattr(
            reader, function, lambda *args, original=original, calls=calls: calls.append(1) or original(*args)
        )
        for size in (1, 7, 100):
            calls.clear()
            parts = list(read_video_pieces(path, sampling, size))
            assert len(calls) <= 1
            assert all(len(part.frames) == size for part in parts[:-1])
            assert [time for part in parts for time in part.times] == whole.times
            assert (np.concatenate([arrays(part) for part in parts]) == arrays(whole)).all()
            assert {part.duration for part in parts} == {whole.duration}


def test_pieces_before_the_damage_are_read(tmp_path: Path) -> None:
    path = clip(tmp_path, "h264.mkv", 90)
    spoil(path, positions(path)[60] + 20, 2000)
    pieces = read_video_pieces(path, EVERY, 10)
    assert len(next(pieces).frames) == 10
    with pytest.raises(DataError, match="h264.mkv"):
        list(pieces)


def test_a_variable_rate_is_read_by_its_own_times(tmp_path: Path) -> None:
    times = [0.0, 0.1, 0.2, 1.5, 1.6, 3.25, 3.3]
    for name in ("a.mp4", "a.mkv", "a.ts"):
        path = write_clip(tmp_path / name, 7, times=times, b_frames=2)
        own = read_video(path, EVERY)
        assert own.times == pytest.approx(times, abs=1e-3)
        assert [nearest(frame, pictures(7)) for frame in own.frames] == list(range(7))
        assert own.duration == pytest.approx(3.4, abs=0.02) if path.suffix != ".ts" else own.duration > 3.3
        second = read_video(path)
        # At 1 s the third frame is still on screen, at 2 s the fifth, and at 3 s it still is.
        assert second.times == pytest.approx([0.0, 0.2, 1.6, 1.6], abs=1e-3)
        assert second.frames[2] is second.frames[3]
        assert [nearest(frame, pictures(7)) for frame in second.frames] == [0, 2, 4, 4]
        assert second.duration == own.duration


def test_times_are_whole_numbers_of_the_files_own_unit(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 31, fps=Fraction(30_000, 1001))
    read = read_video(path, EVERY)
    assert read.times == [number * 1001 / 30_000 for number in range(31)]
    assert read.duration == 31 * 1001 / 30_000


@pytest.mark.parametrize(
    ("slicing", "seconds"), [("head", [0, 1, 2]), ("middle", [3, 4, 5]), ("tail", [6, 7, 8]), ("uniform", [0, 4, 8])]
)
def test_the_slicing_takes_its_part_of_the_video(tmp_path: Path, slicing: str, seconds: list[int]) -> None:
    path = write_clip(tmp_path / "a.mp4", 45, fps=5, b_frames=2)
    read = read_video(path, FrameSampling(max_frames=3, slicing=slicing))
    assert read.times == seconds
    assert [nearest(frame, pictures(45)) for frame in read.frames] == [5 * second for second in seconds]


def test_the_default_is_a_frame_a_second_from_the_first_on(tmp_path: Path) -> None:
    assert read_video(write_clip(tmp_path / "a.mp4", 31)).times == [0, 1, 2, 3]
    assert read_video(write_clip(tmp_path / "b.mp4", 1)).times == [0]


def test_only_the_frames_that_are_kept_are_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(reader, "_upright", lambda frame, convert=reader._upright: made.append(1) or convert(frame))
    read_video(write_clip(tmp_path / "a.mp4", 60), FrameSampling(fps=None, max_frames=4))
    assert len(made) == 4
    read_video(write_clip(tmp_path / "b.avi", 60, b_frames=3), FrameSampling(fps=None, max_frames=4))
    assert len(made) == 8


def test_what_no_chosen_frame_needs_is_not_decoded(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 96)  # eight groups of twelve
    whole = arrays(read_video(path, EVERY))
    for number in range(37, 47):
        spoil(path, positions(path)[number] + 4, 12)
    head = read_video(path, FrameSampling(fps=None, max_frames=20, slicing="head"))
    assert (arrays(head) == whole[:20]).all()
    ends = FrameSampling(fps=None, max_frames=2)
    assert (arrays(read_video(path, ends)) == whole[[0, 95]]).all()
    with pytest.raises(DataError, match=r"a\.mp4: it is damaged"):
        read_video(path, FrameSampling(fps=None, max_frames=60, slicing="head"))


def test_packed_b_frames_of_old_avis_are_unpacked(tmp_path: Path) -> None:
    drawn = pictures(41)
    options = {"b_strategy": "0", "sc_threshold": "1000000000", "mpv_flags": "strict_gop"}
    plain = write_clip(tmp_path / "plain.avi", drawn, codec="mpeg4", b_frames=1, gop=20, options=options)
    packed = _pack_b_frames(plain, tmp_path / "packed.avi")
    read = read_video(packed, EVERY)
    assert [nearest(frame, drawn) for frame in read.frames] == list(range(41))
    assert read.times == pytest.approx([number / 10 for number in range(41)])
    assert (arrays(read) == arrays(read_video(plain, EVERY))).all()


def _pack_b_frames(plain: Path, packed: Path) -> Path:
    """Puts each B-frame into the packet of the frame that it is shown before, as DivX and Xvid did."""
    start = b"\0\0\1\xb6"
    with av.open(str(plain)) as source, av.open(str(packed), "w") as target:
        packets = [(bytes(packet), packet.is_keyframe) for packet in source.demux(video=0) if packet.size]
        stream = target.add_stream_from_template(source.streams.video[0])
        content: list[tuple[bytes, bool]] = []
        for data, is_key in packets:
            if data[data.index(start) + 4] >> 6 == 2:
                before, was_key = content.pop()
                content += [(before + data, was_key), (start + b"\x50\x9f", False)]  # the second is no frame
            else:
                content.append((data, is_key))
        first, is_key = content[0]
        at = first.index(start)
        content[0] = first[:at] + b"\0\0\1\xb2DivX503b1393p\0" + first[at:], is_key
        for number, (data, is_key) in enumerate(content):
            packet = av.Packet(data)
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, 10), is_key
            packet.pts = packet.dts = number
            packet.duration = 1
            target.mux(packet)
    return packed


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_frames_are_turned_upright(tmp_path: Path, rotation: int, mirrored: bool) -> None:
    upright = pictures(1)[0]
    stored = upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else upright
    stored = stored.rotate(rotation, expand=True)  # anticlockwise; a player turns it clockwise, then mirrors it
    path = write_clip(tmp_path / "a.mp4", [stored] * 3, rotation=rotation, mirrored=mirrored, options={"crf": "10"})
    for frame in read_video(path, EVERY).frames:
        assert frame.size == SIZE
        assert np.abs(np.asarray(frame, float) - np.asarray(upright)).mean() < 4


@pytest.mark.parametrize(
    "pix_fmt", ["yuv444p", "yuv444p10le", "yuv420p10le", "gray", "gray16le", "gbrp10le", "rgb48le"]
)
def test_every_depth_becomes_eight_bits(tmp_path: Path, pix_fmt: str) -> None:
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 96).astype(np.uint8)[None, :, None], (64, 1, 3)))
    read = read_video(write_clip(tmp_path / "a.mkv", [ramp] * 2, codec="ffv1", pix_fmt=pix_fmt), EVERY)
    assert np.abs(np.asarray(read.frames[1], int) - np.asarray(ramp)).max() <= 3


@pytest.mark.parametrize(("codec", "pix_fmt"), [("libx264", "yuv420p"), ("mjpeg", "yuvj420p"), ("libx264", "yuvj420p")])
def test_black_and_white_fill_the_range(tmp_path: Path, codec: str, pix_fmt: str) -> None:
    drawn = [Image.new("RGB", SIZE, colour) for colour in ("black", "white", "red")]
    read = read_video(write_clip(tmp_path / "a.mkv", drawn, codec=codec, pix_fmt=pix_fmt), EVERY)
    for frame, picture in zip(read.frames, drawn, strict=True):
        assert np.abs(np.asarray(frame, int) - np.asarray(picture)).max() <= 8


def test_pixels_that_are_not_square_stay_as_they_are(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 3, pixel_aspect=Fraction(4, 3))
    with av.open(str(path)) as file:
        assert file.streams.video[0].sample_aspect_ratio == Fraction(4, 3)
    assert read_video(path).frames[0].size == SIZE


def test_sound_neither_matters_nor_lengthens(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.mkv"):
        silent = write_clip(tmp_path / f"silent.{name}", 20, b_frames=2)
        loud = write_clip(tmp_path / name, 20, b_frames=2, audio=3.0)
        assert probe_video(loud).has_audio and not probe_video(silent).has_audio
        assert read_video(loud, EVERY).duration == read_video(silent, EVERY).duration == 2.0
        assert (arrays(read_video(loud, EVERY)) == arrays(read_video(silent, EVERY))).all()


def test_a_header_that_lies_about_the_duration_is_not_believed(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mkv", 20)
    content = path.read_bytes()
    at = content.index(b"\x44\x89\x88") + 3
    path.write_bytes(content[:at] + np.array(987_654.0, ">f8").tobytes() + content[at + 8 :])
    with av.open(str(path)) as file:
        assert file.duration == 987_654_000
    assert read_video(path).duration == probe_video(path).duration == 2.0


def test_tags_in_an_unknown_encoding_do_not_matter(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mkv", 5, title="Groesse und Masse")
    path.write_bytes(path.read_bytes().replace(b"Groesse", b"Gr\xf6\xdfe  "))
    assert read_video(path).times == [0]


def test_the_content_says_what_a_file_is(tmp_path: Path) -> None:
    made = write_clip(tmp_path / "a.mkv", 5)
    for name in ("a.mp4", "a.avi", "a", "a.jpg", "-a b%03d:c?ö.ts"):
        other = tmp_path / name
        other.write_bytes(made.read_bytes())
        assert (arrays(read_video(other, EVERY)) == arrays(read_video(made, EVERY))).all()


def test_a_relative_path_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clip(tmp_path / "a:b.mp4", 5)
    monkeypatch.chdir(tmp_path)
    assert read_video("a:b.mp4").duration == 0.5


def test_what_is_no_video_is_named(tmp_path: Path) -> None:
    contents: dict[str, tuple[bytes, str]] = {
        "empty.mp4": (b"", "it is empty"),
        "page.mp4": (b"<!DOCTYPE html><html>404 not found</html>", "not a video in a format that FFmpeg supports"),
        "noise.mkv": (np.random.default_rng(0).bytes(20_000), "not a video in a format that FFmpeg supports"),
        "notes.txt": (b"some notes\n" * 50, "it is not a video"),
        "list.m3u8": (b"#EXTM3U\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n", "cannot read the video"),
        "list.mp4": (b"ffconcat version 1.0\nfile notes.txt\n", "it is not a video"),
        "photo.jpg": (encoded(0, 0), "it is an image file"),
        "photo.mp4": (encoded(0, 0), "it is an image file"),
        "photo.png": (encoded(0, 0, "PNG"), "it is an image file"),
    }
    for name, (content, reason) in contents.items():
        (tmp_path / name).write_bytes(content)
        for read in (read_video, probe_video):
            with pytest.raises(DataError, match=reason) as caught:
                read(tmp_path / name)
            assert str(tmp_path / name) in str(caught.value)
            assert name not in unreadable_because(caught.value)
    with pytest.raises(DataError, match="no such video"):
        read_video(tmp_path / "none.mp4")
    with pytest.raises(DataError, match="is a folder, not a video"):
        read_video(tmp_path)
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(DataError, match=r"pipe\.mp4: it is a pipe, socket or device, not a regular file"):
        read_video(tmp_path / "pipe.mp4")


def test_a_video_that_claims_to_last_over_a_week_is_refused(tmp_path: Path) -> None:
    write_clip(tmp_path / "long.mkv", 3, times=[0, 1, 8 * 24 * 3600])
    with pytest.raises(DataError, match=r"long\.mkv: its timestamps are damaged: they span 6.91e\+05 s"):
        read_video(tmp_path / "long.mkv", ClipMiddles())


def test_frames_beyond_the_limit_of_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 96 * 64 // 2 - 1)
    with pytest.raises(DataError, match=r"clip\.mp4: its frames are too large, 96 x 64 pixels"):
        read_video(write_clip(tmp_path / "clip.mp4", 3))


def test_sound_alone_is_no_video_with_a_cover_or_without(tmp_path: Path) -> None:
    for path in (
        write_sound(tmp_path / "a.mp3"),
        write_sound(tmp_path / "b.mp3", cover=True),
        write_sound(tmp_path / "a.mp4"),
        write_sound(tmp_path / "a.mkv"),
    ):
        with pytest.raises(DataError, match=f"{path.name}: it has no video stream; replace or remove it"):
            read_video(path)


def test_a_video_without_frames_is_named(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 0, container_options=FRAGMENTS, audio=1.0)
    with pytest.raises(DataError, match=r"a\.mp4: it has no frames"):
        read_video(path)


@pytest.mark.parametrize("sampling", [FrameSampling(), FrameSampling(max_frames=1, slicing="head"), EVERY])
@pytest.mark.parametrize("part", [0.4, 0.7])
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("h264.mp4", {}),
        ("h264.mp4", {"container_options": FASTSTART}),
        ("fragments.mp4", {}),
        ("h264.mkv", {}),
        ("vp9.webm", {}),
        ("h264.ts", {}),
        ("mpeg4.avi", {}),
        ("mpeg2.mpg", {}),
        ("h264.flv", {}),
        ("animation.gif", {}),
    ],
)
def test_what_was_cut_short_is_named_whatever_is_read(
    tmp_path: Path, name: str, more: dict, part: float, sampling: FrameSampling
) -> None:
    path = clip(tmp_path, name, **more)
    content = path.read_bytes()
    # An odd number of bytes: never whole packets of a transport stream, which alone would be no damage.
    path.write_bytes(content[: int(len(content) * part) | 1])
    for threads in (1, 2):
        with pytest.raises(
            DataError, match=rf"{path.name}: it is (cut short|damaged|an MP4 without|not a video in a format)"
        ):
            read_video(path, sampling, threads=threads)


@pytest.mark.parametrize("options", [{}, {"mpegts_m2ts_mode": "1"}])
def test_a_transport_stream_is_cut_short_by_its_own_packets(tmp_path: Path, options: dict) -> None:
    path = clip(tmp_path, "h264.ts", container_options=options)
    assert len(read_video(path, EVERY).frames) == 40
    content, own = path.read_bytes(), 192 if options else 188
    for other in {188, 192, 204} - {own}:
        cuts = [size for size in range(other * 20, len(content), other) if size % own]
        for size in cuts[:: len(cuts) // 5]:
            path.write_bytes(content[:size])
            with pytest.raises(
                DataError, match=r"h264\.ts: it is cut short after .* frames: its last packet is incomplete"
            ):
                read_video(path)


def test_the_error_says_how_far_a_video_goes(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 40, container_options=FASTSTART)
    at = positions(path)[30]
    path.write_bytes(path.read_bytes()[:at])
    with pytest.raises(DataError, match=r"a\.mp4: it is cut short: it has 30 of its 40 frames; replace or remove it"):
        read_video(path)


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "h264.ts", "mpeg4.avi", "mpeg2.mpg", "h264.flv"])
def test_damage_in_what_is_decoded_is_named(tmp_path: Path, name: str) -> None:
    path = clip(tmp_path, name, size=(192, 128))
    spoil(path, path.stat().st_size // 2, 400)
    with pytest.raises(DataError, match=rf"{path.name}: it is (damaged|cut short).* frames"):
        read_video(path, EVERY)


def test_a_recording_that_begins_between_key_frames_starts_at_the_first(tmp_path: Path) -> None:
    path = clip(tmp_path, "h264.ts", 60)
    start = positions(path)[5]  # the next key frame is the twelfth
    path.write_bytes(path.read_bytes()[start:])
    read = read_video(path, EVERY)
    assert [nearest(frame, pictures(60)) for frame in read.frames] == list(range(12, 60))
    assert read.times == pytest.approx([number / 10 for number in range(48)])
    assert probe_video(path).duration == read.duration == pytest.approx(4.8)


def test_a_video_whose_times_start_again_is_named(tmp_path: Path) -> None:
    one = write_clip(tmp_path / "a.mpg", codec="mpeg2video", fps=25).read_bytes()
    (tmp_path / "glued.mpg").write_bytes(one + one)
    with pytest.raises(DataError, match=r"glued\.mpg: its timestamps restart in the middle"):
        read_video(tmp_path / "glued.mpg")


def joined(folder: Path, name: str, start: float, **more: object) -> Path:
    """Two transport streams, one behind the other, of 40 frames at 10 a second; the second begins ``start`` later."""
    drawn, path = pictures(80), folder / "joined.ts"
    parts = []
    for begin, half in ((1.0, drawn[:40]), (1.0 + start, drawn[40:])):
        times = [begin + number / 10 for number in range(40)]
        parts.append(clip(folder, name, half, times=times, **more).read_bytes())
    path.write_bytes(b"".join(parts))
    return path


@pytest.mark.parametrize("more", [{}, {"codec": "libx265"}, {"container_options": {"mpegts_m2ts_mode": "1"}}])
def test_a_joint_between_transport_streams_is_no_damage(tmp_path: Path, more: dict) -> None:
    path, drawn = joined(tmp_path, "h264.ts", 4.0, **more), pictures(80)
    with av.open(str(path)) as file:
        assert any(packet.is_corrupt for packet in file.demux(video=0))
    read = read_video(path, EVERY)
    assert [nearest(frame, drawn) for frame in read.frames] == list(range(80))
    assert read.times == pytest.approx([number / 10 for number in range(80)], abs=1e-3)
    assert probe_video(path).duration == pytest.approx(8.0, abs=0.1)


@pytest.mark.parametrize("start", [0.0, 2.0])
@pytest.mark.parametrize("gop", [12, 100])
def test_joined_transport_streams_whose_times_start_again_are_named(tmp_path: Path, start: float, gop: int) -> None:
    path = joined(tmp_path, "h264.ts", start, gop=gop)
    with pytest.raises(
        DataError,
        match=r"joined\.ts: its timestamps restart in the middle, as in concatenated files, which .*; replace",
    ):
        read_video(path)


@pytest.mark.parametrize(
    ("more", "number"), [({}, 1), ({"codec": "mpeg2video", "fps": 25}, 1), ({"codec": "mpeg2video", "fps": 25}, -1)]
)
def test_what_a_transport_stream_lost_within_a_frame_is_damage(tmp_path: Path, more: dict, number: int) -> None:
    path = clip(tmp_path, "h264.ts", size=(192, 128), **{"b_frames": 0, **more})
    content, (begin, end) = path.read_bytes(), positions(path)[12:14]  # a key frame
    same = [at for at in range(begin, end, 188) if content[at + 2] == content[begin + 2]]
    path.write_bytes(content[: same[number]] + content[same[number] + 188 :])
    with pytest.raises(DataError, match=r"h264\.ts: it is damaged.* after \d+ "):
        read_video(path, EVERY)


@pytest.mark.parametrize("name", ["h264.mp4", "hevc.mp4", "h264.avi", "vp9.webm"])
def test_the_number_of_threads_changes_nothing(tmp_path: Path, name: str) -> None:
    path = clip(tmp_path, name, 60)
    one = read_video(path, EVERY)
    for threads in (0, 3):
        several = read_video(path, EVERY, threads=threads)
        assert several.times == one.times
        assert (arrays(several) == arrays(one)).all()
    with pytest.raises(ConfigError, match="-1"):
        read_video(path, threads=-1)


def test_several_threads_may_read_at_once(tmp_path: Path) -> None:
    paths = [clip(tmp_path, name) for name in ("h264.mp4", "h264.avi", "vp9.webm")] * 4
    alone = [arrays(read_video(path)) for path in paths[:3]] * 4
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda path: arrays(read_video(path, threads=2)), paths))
    assert all((one == other).all() for one, other in zip(alone, together, strict=True))


class _Clips(Dataset):
    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray | str:
        try:
            return arrays(read_video(self.paths[index]))
        except DataError as error:
            return unreadable_because(error)


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_what_the_main_process_reads(tmp_path: Path, context: str) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"text")
    paths = [clip(tmp_path, "h264.mp4"), clip(tmp_path, "h264.mkv"), tmp_path / "bad.mp4"]
    clips = _Clips(paths)
    here = [clips[0], clips[1]]  # so that a forked worker inherits a used library
    loader = DataLoader(clips, batch_size=None, num_workers=1, multiprocessing_context=context)
    *there, bad = [item if isinstance(item, str) else np.asarray(item) for item in loader]
    assert all((one == other).all() for one, other in zip(here, there, strict=True))
    assert bad == "it is not a video in a format that FFmpeg supports"


def test_ffmpegs_own_words_do_not_reach_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = clip(tmp_path, "h264.ts", size=(192, 128))
    spoil(path, path.stat().st_size // 2, 400)
    (tmp_path / "page.mp4").write_bytes(b"<html></html>")
    level = av.logging.get_level()
    capfd.readouterr()
    for bad in (path, tmp_path / "page.mp4"):
        with pytest.raises(DataError):
            read_video(bad, EVERY)
    assert capfd.readouterr() == ("", "")
    assert av.logging.get_level() == level


def test_without_pyav_only_reading_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_clip(tmp_path / "a.mp4", 3)
    monkeypatch.setitem(sys.modules, "av", None)
    spec = importlib.util.find_spec("lamzoo.data.video.reader")
    anew = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "anew", anew)
    spec.loader.exec_module(anew)
    assert anew.find_videos([tmp_path]) == [path]
    for read in (read_video, probe_video, anew.read_video):
        with pytest.raises(
            MissingExtraError, match=r"needs PyAV, which is not installed; pip install 'lamzoo\[video\]'"
        ):
            read(path)


def test_probing_opens_a_video_once_and_decodes_no_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    open_container: Callable = reader.open_container
    monkeypatch.setattr(reader, "open_container", lambda path: opened.append(path) or open_container(path))
    monkeypatch.delattr(reader, "_frames")
    path = write_clip(tmp_path / "a.mp4", 50, fps=25, b_frames=3, audio=1.0)
    info = probe_video(path)
    assert (info.duration, info.has_audio) == (2.0, True)
    assert opened == [path]


def test_the_times_of_the_frames_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    seconds: Callable = PacketIndex._seconds
    monkeypatch.setattr(PacketIndex, "_seconds", lambda index, stamp: computed.append(stamp) or seconds(index, stamp))
    path = write_clip(tmp_path / "a.mp4", 50, fps=25)
    assert len(list(read_video_pieces(path, EVERY, 5))) == 10
    assert len(computed) < 100


def test_folders_are_searched_and_files_taken_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "Größe und Maß"
    (folder / "deep").mkdir(parents=True)
    for name in ("10.mp4", "9.MKV", "deep/動画 1.webm", "notes.txt", "photo.jpg"):
        (folder / name).write_bytes(b"")
    found = find_videos([folder / "notes.txt", folder])
    assert [path.name for path in found] == ["notes.txt", "9.MKV", "10.mp4", "動画 1.webm"]
    assert videos_below(folder) == found[1:]
    (tmp_path / "empty").mkdir()
    assert videos_below(tmp_path / "empty") == []
    with pytest.raises(DataError, match="has no video"):
        find_videos([tmp_path / "empty"])
    with pytest.raises(DataError, match="no such video or folder"):
        find_videos([tmp_path / "c"])
