"""Sound as log-mel spectra: the filters, the transform, and reading it from files of many kinds."""

import os
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from lamzoo.data.audio.spectra import HOP, log_mel, mel_filters, read_log_mel, stack_spectra
from lamzoo.errors import DataError
from tests.videos import av, write_clip, write_sound

SECONDS = 3.0


def chirp(rate: int = 44_100, seconds: float = SECONDS) -> np.ndarray:
    """A tone that rises by 400 Hz a second from 300 Hz, so that any two moments sound different."""
    time = np.arange(round(rate * seconds)) / rate
    return (np.sin(2 * np.pi * (300 * time + 200 * time**2)) * 12_000).astype(np.int16)


def write(
    path: Path, codec: str, wave: np.ndarray, *, rate: int = 44_100, channels: int = 1, video: bool = True
) -> Path:
    """Writes a wave, beside pictures if asked, which begin with it."""
    with av.open(str(path), "w") as file:
        if video:
            pictures = file.add_stream("libx264", rate=25)
            pictures.width, pictures.height, pictures.pix_fmt = 64, 64, "yuv420p"
        sound = file.add_stream(codec, rate=rate, layout={1: "mono", 2: "stereo"}[channels])
        packets = []
        if video:
            for number in range(round(len(wave) / rate * 25)):
                frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), number % 256, np.uint8), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 25)
                packets += pictures.encode(frame)
            packets += pictures.encode(None)
        resampler = av.AudioResampler(format=sound.format, layout=sound.layout, rate=rate, frame_size=sound.frame_size)
        frame = av.AudioFrame.from_ndarray(np.repeat(wave, channels)[None], format="s16", layout=sound.layout.name)
        frame.sample_rate, frame.pts = rate, 0
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            packets += sound.encode(part)
        packets += sound.encode(None)
        for packet in sorted(packets, key=lambda packet: float(packet.dts * packet.time_base)):
            file.mux(packet)
    return path


def write_pieces(path: Path, codec: str, pieces: list[tuple[float, int, str, float]], seconds: float = 0.0) -> Path:
    """Writes tones into one track, each from its own encoder: start in seconds, sample rate, layout and pitch in Hz.

    Each is 2 s long. ``seconds`` of pictures lie beside them; 0 for none.
    """
    with av.open(str(path), "w") as file:
        packets = []
        if seconds:
            pictures = file.add_stream("libx264", rate=25)
            pictures.width, pictures.height, pictures.pix_fmt = 64, 64, "yuv420p"
            for number in range(round(seconds * 25)):
                frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), number % 256, np.uint8), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 25)
                packets += pictures.encode(frame)
            packets += pictures.encode(None)
        track = file.add_stream(codec, rate=pieces[0][1], layout=pieces[0][2])
        for number, (start, rate, layout, frequency) in enumerate(pieces):
            sound = av.CodecContext.create(codec, "w") if number else track.codec_context
            sound.sample_rate, sound.layout, sound.format = rate, layout, track.format
            sound.time_base = Fraction(1, rate)
            wave = (np.sin(2 * np.pi * frequency * np.arange(2 * rate) / rate) * 12_000).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(np.repeat(wave, sound.layout.nb_channels)[None], "s16", layout)
            frame.sample_rate, frame.pts = rate, round(start * rate)
            resampler = av.AudioResampler(sound.format, sound.layout, rate, frame_size=sound.frame_size or 1152)
            for part in [*resampler.resample(frame), *resampler.resample(None), None]:
                for packet in sound.encode(part):
                    packet.stream = track
                    packets.append(packet)
        for packet in sorted(packets, key=lambda packet: float(packet.dts * packet.time_base)):
            file.mux(packet)
    return path


def spans_of(spectra: np.ndarray, frequency: float) -> list[tuple[float, float]]:
    """Start and end, in seconds, of the parts in which a tone is the loudest sound."""
    tone = np.sin(2 * np.pi * frequency * np.arange(1600) / 16_000).astype(np.float32)
    band = int(log_mel(tone)[5].argmax())
    there = np.concatenate([[False], (spectra.max(axis=1) > 0) & (pitch(spectra) == band), [False]])
    edges = np.flatnonzero(there[1:] != there[:-1]) * 0.01
    return [(float(start), float(end)) for start, end in edges.reshape(-1, 2)]


def pitch(spectra: np.ndarray) -> np.ndarray:
    """The loudest band of each spectrum."""
    return spectra.argmax(axis=1)


def test_filters_are_triangles_on_htks_mel_scale() -> None:
    mel = np.linspace(2595 * np.log10(1 + 20 / 700), 2595 * np.log10(1 + 7600 / 700), 66)
    edges = [700 * (10 ** (m / 2595) - 1) for m in mel]
    expected = np.zeros((257, 64))
    for band, ((low, middle), (_, high)) in enumerate(pairwise(pairwise(edges))):
        for bin_ in range(257):
            frequency = bin_ * 16_000 / 512
            if low < frequency <= middle:
                expected[bin_, band] = (frequency - low) / (middle - low)
            elif middle < frequency < high:
                expected[bin_, band] = (high - frequency) / (high - middle)
    assert mel_filters() == pytest.approx(expected)
    assert mel_filters().max(axis=0).min() > 0  # no band is empty
    assert mel_filters(20).shape == (257, 20)


def test_a_spectrum_is_the_power_of_a_hann_window_of_25_ms_every_10_ms() -> None:
    samples = np.random.default_rng(0).standard_normal(1600).astype(np.float32)
    spectra = log_mel(samples)
    assert (spectra.shape, spectra.dtype) == ((10, 64), np.float32)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    for number in (2, 5, 7):
        piece = samples[160 * number - 200 : 160 * number + 200] * window
        power = np.abs(np.fft.rfft(piece, 512)) ** 2
        assert spectra[number] == pytest.approx(np.log10(power @ mel_filters()), abs=1e-4)


def test_silence_has_a_floor_and_short_sound_is_enough() -> None:
    assert log_mel(np.zeros(1600, np.float32)) == pytest.approx(-8)
    assert log_mel(np.ones(160, np.float32)).shape == (1, 64)
    assert log_mel(np.ones(100, np.float32)).shape == (0, 64)


def test_spectra_are_stacked_without_their_mean() -> None:
    spectra = np.arange(10, dtype=np.float32).reshape(5, 2)
    assert stack_spectra(spectra, 2).tolist() == [[-4, -4, -2, -2], [0, 0, 2, 2]]


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "aac"), ("a.mkv", "libopus"), ("a.ts", "aac"), ("a.avi", "libmp3lame"), ("a.mov", "pcm_s16le")],
)
def test_a_track_of_any_kind_is_heard_as_it_was_written(tmp_path: Path, name: str, codec: str) -> None:
    rate = 48_000 if codec == "libopus" else 44_100
    heard = read_log_mel(write(tmp_path / name, codec, chirp(rate), rate=rate))
    assert heard is not None
    assert heard.dtype == np.float32
    assert len(heard) == pytest.approx(300, abs=12)
    expected = pitch(log_mel(np.sin(2 * np.pi * (300 * (t := np.arange(48_000) / 16_000) + 200 * t**2)).astype("f4")))
    shown = slice(20, 270)
    assert np.abs(pitch(heard)[shown] - expected[shown]).max() <= 1


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "aac"), ("a.mkv", "libopus"), ("a.ts", "aac"), ("a.avi", "libmp3lame"), ("a.mpg", "mp2")],
)
def test_a_span_sounds_as_it_does_in_the_whole(tmp_path: Path, name: str, codec: str) -> None:
    path = write(tmp_path / name, codec, chirp(48_000), rate=48_000)
    whole, part = read_log_mel(path), read_log_mel(path, 1.2, 2.0)
    assert whole is not None
    assert part is not None
    assert part.shape == (80, 64)
    assert np.abs(pitch(part) - pitch(whole[120:200]))[3:-3].max() <= 1
    tail = read_log_mel(path, 2.5)
    assert tail is not None
    assert len(tail) == pytest.approx(len(whole) - 250, abs=2)


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "aac"), ("a.mkv", "libopus"), ("a.ts", "aac"), ("a.mp3", "libmp3lame")]
)
def test_sound_is_when_it_is_said_to_be(tmp_path: Path, name: str, codec: str) -> None:
    wave = chirp(48_000)
    wave[:48_000] = 0
    path = write(tmp_path / name, codec, wave, rate=48_000, video=not name.endswith("mp3"))
    for start in (0.0, 0.8):
        heard = read_log_mel(path, start, 1.5)
        assert heard is not None
        loudness = heard.max(axis=1)
        onset = int((loudness > 1).argmax()) * HOP + start
        assert onset == pytest.approx(1.0, abs=0.0201)  # a window begins before the middle of its spectrum


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "aac"), ("a.mkv", "pcm_s16le"), ("a.mkv", "mp2"), ("a.ts", "aac")]
)
def test_a_gap_between_frames_is_silence(tmp_path: Path, name: str, codec: str) -> None:
    path = write_pieces(tmp_path / name, codec, [(0, 44_100, "mono", 440), (4, 44_100, "mono", 880)], seconds=6)
    heard = read_log_mel(path)
    assert heard is not None
    assert spans_of(heard, 440) == [pytest.approx((0, 2), abs=0.06)]
    assert spans_of(heard, 880) == [pytest.approx((4, 6), abs=0.06)]
    assert (heard[210:390] == -8).all()
    part = read_log_mel(path, 3.0, 5.0)
    assert part is not None
    assert part.shape == (200, 64)
    assert spans_of(part, 880) == [pytest.approx((1, 2), abs=0.03)]
    assert read_log_mel(path, 2.5, 3.5) is None
    assert read_log_mel(path, 1.0, 2.0) is not None


def test_of_overlapping_sound_the_first_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.ts"
    pieces = [(1, 48_000, "mono", 440), (2, 48_000, "mono", 880)]
    path.write_bytes(b"".join(write_pieces(path, "mp2", [piece]).read_bytes() for piece in pieces))
    heard = read_log_mel(path)
    assert heard is not None
    assert len(heard) == pytest.approx(300, abs=5)
    assert spans_of(heard, 440) == [pytest.approx((0, 2), abs=0.06)]
    assert spans_of(heard, 880) == [pytest.approx((2, 3), abs=0.06)]
    assert "1.0" in caplog.text
    assert f"s of sound in {path} that overlap other sound" in caplog.text


def test_sound_whose_times_start_again_is_named(tmp_path: Path) -> None:
    path = write_pieces(tmp_path / "a.ts", "mp2", [(0, 48_000, "mono", 440)])
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(DataError, match=r"sound of .*a\.ts: its timestamps restart .*; remux, replace or remove"):
        read_log_mel(path)


@pytest.mark.parametrize(
    ("name", "codec", "formats"),
    [
        ("a.mkv", "mp2", [(44_100, "mono"), (48_000, "mono")]),
        ("a.mkv", "ac3", [(48_000, "5.1"), (48_000, "stereo"), (44_100, "mono")]),
        ("a.ts", "mp2", [(32_000, "stereo"), (48_000, "mono")]),
    ],
)
def test_the_format_of_sound_may_change(tmp_path: Path, name: str, codec: str, formats: list[tuple[int, str]]) -> None:
    pieces = [(2.0 * number, *each, 440.0 * (number + 1)) for number, each in enumerate(formats)]
    path = write_pieces(tmp_path / name, codec, pieces, seconds=2 * len(pieces))
    for start in (0.0, 1.0):
        heard = read_log_mel(path, start)
        assert heard is not None
        for begin, _, _, frequency in pieces:
            place = pytest.approx((max(0, begin - start), begin + 2 - start), abs=0.08)
            assert spans_of(heard, frequency) == [place]


@pytest.mark.parametrize("tagged", [False, True])
def test_joined_mp3_files_are_heard_one_after_the_other(tmp_path: Path, tagged: bool) -> None:
    content = b""
    for number, (rate, layout) in enumerate([(44_100, "mono"), (48_000, "stereo")]):
        path = write_pieces(tmp_path / f"{number}.mp3", "libmp3lame", [(0, rate, layout, 440.0 * (number + 1))])
        content += path.read_bytes() if tagged else path.read_bytes()[45:]
    (tmp_path / "a.mp3").write_bytes(content)
    heard = read_log_mel(tmp_path / "a.mp3")
    assert heard is not None
    assert spans_of(heard, 440)[0] == pytest.approx((0, 2), abs=0.1)
    assert spans_of(heard, 880)[0][0] == pytest.approx(2, abs=0.15)
    assert spans_of(heard, 880)[-1][1] == pytest.approx(4, abs=0.3)


def test_channels_are_mixed(tmp_path: Path) -> None:
    mono = read_log_mel(write(tmp_path / "a.wav", "pcm_s16le", chirp(), video=False))
    stereo = read_log_mel(write(tmp_path / "b.wav", "pcm_s16le", chirp(), channels=2, video=False))
    assert mono is not None
    assert stereo is not None
    assert stereo == pytest.approx(mono, abs=1e-3)


def test_no_track_and_silence_are_none(tmp_path: Path) -> None:
    assert read_log_mel(write_clip(tmp_path / "a.mp4", 10)) is None
    silence = write(tmp_path / "b.wav", "pcm_s16le", np.zeros(44_100, np.int16), video=False)
    assert read_log_mel(silence) is None
    late = np.concatenate([np.zeros(44_100, np.int16), chirp()])
    assert read_log_mel(write(tmp_path / "c.wav", "pcm_s16le", late, video=False), 0.0, 0.9) is None
    assert read_log_mel(tmp_path / "c.wav", 100.0) is None  # behind the end


def test_what_can_t_be_heard_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file: .*a\.mp4"):
        read_log_mel(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes(b"no sound")
    with pytest.raises(DataError, match=r"cannot read the sound of .*b\.mp4: Invalid data.*; replace or remove it"):
        read_log_mel(tmp_path / "b.mp4")
    write_sound(tmp_path / "c.m4a", 3.0)
    content = (tmp_path / "c.m4a").read_bytes()
    (tmp_path / "c.m4a").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"cannot read the sound of .*c\.m4a"):
        read_log_mel(tmp_path / "c.m4a")


def test_sound_that_claims_to_last_over_half_a_day_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "long.mkv"
    with av.open(str(path), "w") as file:
        track = file.add_stream("pcm_s16le", rate=16_000, layout="mono")
        for second in (0, 0.1, 13 * 3600):
            frame = av.AudioFrame.from_ndarray(np.full((1, 1600), 3000, np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.time_base, frame.pts = 16_000, Fraction(1, 16_000), round(16_000 * second)
            file.mux(track.encode(frame))
    with pytest.raises(
        DataError, match=r"long\.mkv: it lasts over 12 hours, or its timestamps are damaged; read a span"
    ):
        read_log_mel(path)
    assert read_log_mel(path, 0, 0.2) is not None


def test_a_pipe_is_no_sound(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(DataError, match=r"pipe\.wav: it is a pipe, socket or device, not a regular file"):
        read_log_mel(tmp_path / "pipe.wav")
