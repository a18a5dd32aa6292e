"""GRID's sentences to be written down: three modalities on clocks of their own, damaged sound, spliced sentences."""

import io
import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lamzoo.data import jpeg_archive
from lamzoo.data.audio.spectra import mel_filters
from lamzoo.data.captions import CaptionDataset, Stream, create_caption_dataset
from lamzoo.data.captions.sound import add_noise, cut_gaps, damage, sound_stream
from lamzoo.data.grid_tokens import GridTokens
from lamzoo.errors import DataError
from tests.speech import ALL, FRAMES, write_speech

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data" / "grid_s1"
EVERY = ":mouth+face+audio"
SPEECH = slice(60, 200)


def write_faces(folder: Path) -> Path:
    """Adds ``face.npz`` to GRID's layout: the word that is said while a face is kept brightens its own columns."""
    generator = np.random.default_rng(1)
    files = []
    for line in map(json.loads, (folder / "captions.jsonl").read_text().splitlines()):
        faces = generator.integers(60, 90, (FRAMES // 5, 64, 64, 3), dtype=np.uint8)
        for word, start, end in line["words"]:
            for number in range(len(faces)):
                if start <= (5 * number + 2.5) / 25 < end:
                    faces[number, :, 8 * ALL.index(word) : 8 * ALL.index(word) + 8] = 220
        buffer = io.BytesIO()
        Image.fromarray(faces.reshape(-1, 64, 3)).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    offsets = np.cumsum([0, *map(len, files)], dtype=np.int64)
    np.savez(folder / "face.npz", jpeg=np.frombuffer(b"".join(files), np.uint8), offsets=offsets)
    return folder


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(write_speech(tmp_path_factory.mktemp("speech")))


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    return write_faces(write_speech(tmp_path))


def opened(folder: Path, options: str = "", split: str = "train") -> CaptionDataset:
    return create_caption_dataset(f"grid:{folder}{options}", split)


def check_words(words: Any, streams: dict[str, Stream]) -> None:
    """Each modality shows a word where the words say it is said, by the clock of that modality."""
    mouth, face, audio = (streams.get(name) for name in ("mouth", "face", "audio"))
    for word, start, end in words:
        number = ALL.index(word)
        if mouth is not None:
            said = (mouth.times > start) & (mouth.times < end)
            left = (26 + 7 * number - 24) // 2 + 1  # the lips begin at column 24, and two pixels are one
            place = mouth.features.reshape(-1, 16, 24)[:, 4:12, left : left + 2].mean(axis=(1, 2))
            assert place[said].min() > place[~said].max() + 1
        if face is not None:
            said = (face.times > start) & (face.times < end)
            place = face.features.reshape(-1, 16, 16)[:, :, 2 * number : 2 * number + 2].mean(axis=(1, 2))
            assert said.any()
            assert place[said].min() > place[~said].max() + 1
        if audio is not None:
            said = (audio.times > start) & (audio.times < end)
            band = audio.features.reshape(-1, 2, 64)[:, :, 10 * number : 10 * number + 9].mean(axis=(1, 2))
            assert band[said].min() > band[~said].max() + 1


def test_the_lines_of_all_modalities_are_read_once(speech: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    read_json_lines = jpeg_archive.read_json_lines
    monkeypatch.setattr(jpeg_archive, "read_json_lines", lambda path: read.append(path) or read_json_lines(path))
    opened(speech, EVERY)
    assert read == [speech / "captions.jsonl"]


def test_each_modality_has_its_own_clock_and_says_the_words_in_time(speech: Path) -> None:
    dataset = opened(speech, EVERY)
    assert (dataset.split, len(dataset)) == ("train", 24)
    assert list(dataset.modalities.items()) == [("mouth", 384), ("face", 256), ("audio", 128)]
    item, streams = dataset.items[0], dataset.read(0)
    assert (item.id, item.video, item.start, item.end) == ("train0-bin-red-now", "train0-bin-red-now", 0.0, 3.0)
    assert item.captions == ("bin red now",)
    assert [word for word, *_ in item.words] == ["bin", "red", "now"]
    assert [streams[name].features.shape for name in dataset.modalities] == [(75, 384), (15, 256), (150, 128)]
    assert streams["mouth"].times == pytest.approx((np.arange(75) + 0.5) / 25)
    assert streams["face"].times == pytest.approx(np.arange(15) / 5 + 0.1)
    assert streams["audio"].times == pytest.approx(np.arange(150) / 50 + 0.005)
    for index in range(5):
        for stream in dataset.read(index).values():
            assert stream.features.dtype == stream.times.dtype == np.float32
            assert stream.features.std() == pytest.approx(1.0, abs=1e-3)
            assert stream.features.mean() == pytest.approx(0.0, abs=1e-3)
        check_words(dataset.items[index].words, dataset.read(index))
    assert dataset.read(0)["mouth"] is streams["mouth"]
    assert dataset.context(3, 2) == ()


def test_lips_and_clean_sound_are_those_of_the_tokens(speech: Path) -> None:
    streams, tokens = opened(speech).read(5), GridTokens(speech, "train").read(5).tokens
    assert list(streams) == ["mouth", "audio"]
    assert np.array_equal(streams["mouth"].features, tokens[:, :384])
    assert streams["audio"].features == pytest.approx(tokens[:, 384:].reshape(150, 128), abs=1e-4)


def test_modalities_come_in_the_order_they_are_named(speech: Path) -> None:
    assert list(opened(speech, ":audio+mouth").read(0)) == ["audio", "mouth"]
    assert list(opened(speech, ":face").read(0)) == ["face"]


def test_only_the_files_of_the_modalities_are_needed(broken: Path) -> None:
    for name in ("mouth.npz", "face.npz"):
        (broken / name).unlink()
    assert list(opened(broken, ":audio:gaps").read(0)) == ["audio"]
    with pytest.raises(DataError, match=r"has no face\.npz"):
        opened(broken, ":face+audio")


def test_a_clip_may_be_a_frame_shorter(broken: Path) -> None:
    lines = [json.loads(line) for line in (broken / "captions.jsonl").read_text().splitlines()]
    lines[0]["n_frames"] = 74
    (broken / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    dataset = opened(broken, ":face+audio")
    assert dataset.items[0].end == 74 / 25
    assert [len(stream.times) for stream in dataset.read(0).values()] == [15, 148]


@pytest.mark.parametrize("options", ["", EVERY, ":audio:noise", ":face+audio:gaps"])
def test_a_spliced_sentence_has_its_words_where_it_says(speech: Path, options: str) -> None:
    dataset = opened(speech, options)
    random.seed(0)
    sentences = set()
    for _ in range(20):
        item, streams = dataset.splice()
        assert item.captions == (" ".join(word for word, *_ in item.words),)
        assert item.start == 0
        sentences.add(item.captions)
        frames = round(item.end * 25)
        for name, rate in (("mouth", 25), ("face", 5), ("audio", 50)):
            if name in streams:
                times = streams[name].times
                assert len(times) == len(streams[name].features)
                assert abs(len(times) - frames * rate / 25) <= (3 if name == "face" else 0)
                assert (np.diff(times) > 0).all()
                assert times[0] > 0
                assert times[-1] < item.end
        if not options.endswith(("noise", "gaps")):
            if "face" in streams:
                streams.pop("face")  # a word may be too short for one; the next test looks at them
            check_words(item.words, streams)
    assert len(sentences) > 4
    random.seed(3)
    first = dataset.splice()
    random.seed(3)
    again = dataset.splice()
    assert first[0] == again[0]
    assert all(np.array_equal(first[1][name].features, again[1][name].features) for name in first[1])


def test_a_spliced_face_belongs_to_the_piece_that_its_middle_lies_in(speech: Path) -> None:
    dataset = opened(speech, ":mouth+face")
    random.seed(1)
    seen = 0
    for _ in range(30):
        item, streams = dataset.splice()
        face = streams["face"]
        for time, pixels in zip(face.times, face.features.reshape(-1, 16, 8, 2), strict=True):
            bright = pixels.mean(axis=(0, 2))
            said = [word for word, start, end in item.words if start + 1e-4 < time < end - 1e-4]
            if said:
                assert bright.argmax() == ALL.index(said[0])
                seen += 1
    assert seen > 50


@pytest.mark.parametrize("kind", ["noise", "gaps", "damaged"])
def test_damage_is_always_the_same_in_validation_and_test(speech: Path, kind: str) -> None:
    for split in ("val", "test"):
        first, again = (opened(speech, f":mouth+audio:{kind}", split) for _ in range(2))
        random.seed(5)
        clean = opened(speech, "", split).read(2)
        taken = first.read(2)["audio"].features
        assert np.array_equal(taken, first.read(2)["audio"].features)
        assert np.array_equal(taken, pickle.loads(pickle.dumps(again)).read(2)["audio"].features)
        assert not np.allclose(taken, clean["audio"].features, atol=0.1)
        assert np.array_equal(first.read(2)["mouth"].features, clean["mouth"].features)
        assert taken.std() == pytest.approx(1.0, abs=1e-3)
    both = [opened(speech, f":audio:{kind}", split).read(0)["audio"].features for split in ("val", "test")]
    assert not np.array_equal(*both)


def test_damage_is_drawn_anew_in_training(speech: Path) -> None:
    dataset = opened(speech, ":audio:damaged")
    random.seed(0)
    first, second = dataset.read(0)["audio"].features, dataset.read(0)["audio"].features
    assert not np.array_equal(first, second)
    random.seed(0)
    assert np.array_equal(dataset.read(0)["audio"].features, first)


def test_noise_is_white_and_as_loud_as_the_speech() -> None:
    generator = np.random.default_rng(0)
    spectra = np.full((3000, 64), -4, np.float32)
    spectra[SPEECH] = generator.uniform(-2, 0, (140, 64))
    noisy = add_noise(spectra, SPEECH, generator)
    noise = 10.0**noisy - 10.0**spectra
    level = (10.0 ** spectra[SPEECH].astype(np.float64)).sum(axis=1).mean()
    assert noise.sum(axis=1).mean() == pytest.approx(level, rel=0.01)
    widths = mel_filters().sum(axis=0)
    assert noise.mean(axis=0) / level == pytest.approx(widths / widths.sum(), rel=0.1)
    # A narrow band fluctuates as one wave does, by as much as it is on average; a wide one less.
    fluctuation = noise.std(axis=0) / noise.mean(axis=0)
    assert fluctuation[0] == pytest.approx(1.0, abs=0.07)
    assert fluctuation[63] == pytest.approx(0.45, abs=0.1)
    assert np.array_equal(add_noise(spectra, slice(9, 9), np.random.default_rng(1)).shape, spectra.shape)


def test_gaps_are_about_a_third_of_the_clip() -> None:
    shares = []
    for seed in range(200):
        silent = cut_gaps(np.zeros((300, 64), np.float32), np.random.default_rng(seed))[:, 0] == -8
        edges = np.flatnonzero(np.diff(np.concatenate([[False], silent, [False]]).astype(int)))
        lengths = edges[1::2] - edges[::2]
        assert (lengths >= 30).all()
        shares.append(silent.mean())
    assert np.mean(shares) == pytest.approx(1 / 3, abs=0.03)
    assert min(shares) > 0.2
    assert max(shares) < 0.5
    assert (cut_gaps(np.zeros((5, 64), np.float32), np.random.default_rng(0)) == 0).all()  # too short for one


def test_both_are_gaps_in_the_noise() -> None:
    spectra = np.zeros((300, 64), np.float32)
    damaged = damage(spectra, SPEECH, "damaged", np.random.default_rng(0))
    silent = (damaged == -8).all(axis=1)
    assert 0.2 < silent.mean() < 0.5
    assert (damaged[~silent] > 0).all()
    assert (damage(spectra, SPEECH, "gaps", np.random.default_rng(0)) <= 0).all()
    assert (damage(spectra, SPEECH, "noise", np.random.default_rng(0)) > 0).all()


def test_sound_is_tokens_of_two_spectra() -> None:
    stream = sound_stream(np.random.default_rng(0).standard_normal((7, 64)).astype(np.float32))
    assert stream.features.shape == (3, 128)
    assert stream.times == pytest.approx([0.005, 0.025, 0.045])


def test_it_travels_to_workers(speech: Path) -> None:
    dataset = opened(speech, EVERY, "test")
    before = len(pickle.dumps(dataset))
    first = dataset.read(1)
    there = pickle.dumps(dataset)
    assert len(there) == before
    assert np.array_equal(pickle.loads(there).read(1)["face"].features, first["face"].features)


def cut_sound(folder: Path) -> None:
    (folder / "logmel.npz").write_bytes((folder / "logmel.npz").read_bytes()[:500])


def longer_clip(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    lines = [{**line, "n_frames": 60} for line in lines]
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (None, ":mouth+mouth", r"are mouth\+mouth; they must be mouth, face, audio, each at most once"),
        (None, ":mouth:noise", "'noise' degrades GRID's sound, which is not among mouth; add audio"),
        (None, ":smell", "no such folder: .*:smell"),
        (cut_sound, "", "logmel.npz is not a complete npz archive"),
        (longer_clip, ":mouth", r"not 60 frames of 80 x 48; the n_frames of its line"),
        (longer_clip, ":face", r"face\.npz\[24\] is 64 x 960 pixels, not 12 frames of 64 x 64"),
    ],
)
def test_what_is_wrong_is_named(broken: Path, change: Any, options: str, says: str) -> None:
    if change is not None:
        change(broken)
    with pytest.raises(DataError, match=says):
        opened(broken, options, "val").read(0)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there")
def test_the_corpus_is_read_whole() -> None:
    dataset = opened(SHARED, f"{EVERY}:damaged", "test")
    assert len(dataset) == 200
    assert all(
        len(item.words) == 6 and " ".join(w for w, *_ in item.words) == item.captions[0] for item in dataset.items
    )
    for index in range(0, 200, 40):
        streams = dataset.read(index)
        assert [len(stream.times) for stream in streams.values()] in ([75, 15, 150], [74, 15, 148])
        assert all(np.isfinite(stream.features).all() for stream in streams.values())
    random.seed(0)
    item, streams = dataset.splice()
    assert len(item.words) == 6
    assert len(streams["mouth"].times) * 2 == len(streams["audio"].times)
