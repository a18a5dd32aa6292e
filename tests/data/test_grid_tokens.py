"""GRID's clips as tokens, and recordings of them in which words are looked for."""

import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lamzoo.data.grid_tokens import GridTokens, Modalities, Speech, join
from lamzoo.data.moments import create_moment_dataset
from lamzoo.errors import DataError
from tests.speech import ALL, write_speech

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "grid_s1"


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speech(tmp_path_factory.mktemp("speech"))


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    return write_speech(tmp_path)


@pytest.mark.parametrize(("modalities", "features"), [("both", 640), ("video", 384), ("audio", 256)])
def test_a_clip_is_a_token_a_frame_and_each_modality_weighs_the_same(
    speech: Path, modalities: Modalities, features: int
) -> None:
    clips = GridTokens(speech, "train", modalities)
    clip = clips.read(0)
    assert (clips.split, len(clips)) == ("train", 24)
    assert clip.tokens.shape == (75, features)
    assert clip.tokens.dtype == np.float32
    parts = [clip.tokens[:, :384], clip.tokens[:, 384:]] if modalities == "both" else [clip.tokens]
    for part in parts:
        assert part.std() == pytest.approx(1.0, abs=1e-3)
    assert clips.read(0) is clip


def test_what_is_seen_and_heard_is_where_the_word_is_said(speech: Path) -> None:
    clips = GridTokens(speech, "train")
    lips = clips.read(0).tokens[:, :384].reshape(75, 16, 24)
    spectra = clips.read(0).tokens[:, 384:].reshape(75, 4, 64)
    for word, start, end in clips.read(0).words:
        said = np.zeros(75, dtype=bool)
        said[round(start * 25) : round(end * 25)] = True
        number = ALL.index(word)
        band = spectra[:, :, 10 * number : 10 * number + 9].mean(axis=(1, 2))
        assert band[said].min() > band[~said].max() + 1
        left = (26 + 7 * number - 24) // 2 + 1  # the lips begin at column 24, and two pixels are one
        place = lips[:, 4:12, left : left + 2].mean(axis=(1, 2))
        assert place[said].min() > place[~said].max() + 1


def test_pieces_are_cut_and_joined_with_their_words() -> None:
    tokens = np.arange(50, dtype=np.float32)[:, None]
    whole = Speech(tokens, (("red", 0.2, 0.6), ("now", 0.8, 1.6)))
    assert whole.cut(5, 15).words == (("red", 0.0, pytest.approx(0.4)),)
    assert whole.cut(6, 40).words == (("now", pytest.approx(0.56), pytest.approx(1.36)),)
    both = join([whole.cut(0, 25), whole])
    assert both.tokens[:, 0].tolist() == [*range(25), *range(50)]
    assert both.words == (
        ("red", 0.2, 0.6),
        ("red", pytest.approx(1.2), pytest.approx(1.6)),
        ("now", pytest.approx(1.8), pytest.approx(2.6)),
    )


def test_a_spliced_sentence_has_its_words_where_it_says(speech: Path) -> None:
    clips = GridTokens(speech, "train", "audio")
    random.seed(0)
    sentences = set()
    for _ in range(20):
        spliced = clips.splice()
        assert len(spliced.words) == 3
        sentences.add(tuple(word for word, *_ in spliced.words))
        spectra = spliced.tokens.reshape(len(spliced.tokens), 4, 64).mean(axis=1)
        for word, start, end in spliced.words:
            number = ALL.index(word)
            inside = spectra[round(start * 25) : round(end * 25), 10 * number : 10 * number + 9]
            assert inside.mean() > 1
    assert len(sentences) > 4


def test_recordings_are_the_same_each_time_and_every_word_in_one_is_asked_for(speech: Path) -> None:
    first, again = (create_moment_dataset(f"grid:{speech}:both:5", "val") for _ in range(2))
    assert first.queries == again.queries
    assert np.array_equal(first.read(3).video, again.read(3).video)
    assert {query.duration for query in first.queries} == {5.0}
    assert len({query.video for query in first.queries}) == 4  # eight clips of 3 s, two in each
    by_video: dict[str, int] = {}
    for number, query in enumerate(first.queries):
        features = first.read(number)
        assert features.video.shape == (125, 642)
        assert features.text.tolist() == [[float(word == query.text) for word in sorted(ALL)]]
        by_video[query.video] = by_video.get(query.video, 0) + len(query.windows)
    assert set(by_video.values()) <= {5, 6}  # the last word of the second clip may be cut off
    assert [a["relevant_windows"] for a in first.annotations()] == [[list(w) for w in q.windows] for q in first.queries]


def test_frames_of_a_recording_show_the_words_that_are_said(speech: Path) -> None:
    dataset = create_moment_dataset(f"grid:{speech}:both:5", "val")
    query, frames = dataset.queries[-1], dataset.frames(len(dataset) - 1, 125)
    assert {frame.size for frame in frames} == {(80, 48)}
    for word, start, end in query.words:
        left = 26 + 7 * ALL.index(word)
        shown = np.array([np.asarray(frame)[18:38, left + 1 : left + 5].mean() for frame in frames])
        assert shown[round(start * 25) : round(end * 25)].min() > 180 > shown[round(start * 25) - 1]
    few = dataset.frames(len(dataset) - 1, 5)
    assert [frame.tobytes() for frame in few] == [frames[number].tobytes() for number in (12, 37, 62, 87, 112)]
    assert create_moment_dataset(f"grid:{speech}:audio:5", "val").frames(0, 5) == []


def test_recordings_may_be_of_many_lengths(speech: Path) -> None:
    dataset = create_moment_dataset(f"grid:{speech}:audio:4-9", "train")
    durations = {query.duration for query in dataset.queries}
    assert len(durations) > 3
    assert min(durations) >= 4
    assert max(durations) <= 9
    random.seed(0)
    spliced = [dataset.splice() for _ in range(10)]
    assert len({query.duration for query, _ in spliced}) > 3
    for query, features in spliced:
        assert len(features.video) == round(query.duration * 25)
        spectra = features.video[:, :256].reshape(-1, 4, 64).mean(axis=1)
        number = ALL.index(query.text)
        for start, end in query.windows:
            assert spectra[round(start * 25) : round(end * 25), 10 * number : 10 * number + 9].mean() > 1


def test_one_modality_needs_no_file_of_the_other(broken: Path) -> None:
    (broken / "mouth.npz").unlink()
    assert create_moment_dataset(f"grid:{broken}:audio:3", "test").read(0).video.shape == (75, 258)
    with pytest.raises(DataError, match=r"has no mouth\.npz"):
        create_moment_dataset(f"grid:{broken}", "test")


def test_it_travels_to_workers(speech: Path) -> None:
    dataset = create_moment_dataset(f"grid:{speech}:video:5", "test")
    there = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(there.read(1).video, dataset.read(1).video)


def cut_sound(folder: Path) -> None:
    (folder / "logmel.npz").write_bytes((folder / "logmel.npz").read_bytes()[:500])


def fewer_sounds(folder: Path) -> None:
    np.savez(folder / "logmel.npz", logmel=np.zeros((3, 300, 64), np.uint8))


def longer_clip(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    lines = [{**line, "n_frames": 74} for line in lines]
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (cut_sound, "", "logmel.npz is not a complete npz archive"),
        (fewer_sounds, "", r"logmel is uint8 \(3, 300, 64\); the 40 lines"),
        (longer_clip, "", r"not 74 frames of 80 x 48; the n_frames of its line"),
        (None, ":both:100", "8 clips of GRID's split 'val' don't fill a recording"),
        (None, ":both:0.5", "durations must be 1 to 600 s"),
        (None, ":both:9-4", "can't last 9 to 4 s"),
        (None, ":smell", "no such folder: .*:smell"),
    ],
)
def test_what_is_wrong_is_named(broken: Path, change: Any, options: str, says: str) -> None:
    if change is not None:
        change(broken)
    with pytest.raises(DataError, match=says):
        create_moment_dataset(f"grid:{broken}{options}", "val")


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there")
@pytest.mark.parametrize(("split", "recordings"), [("val", 25), ("test", 50)])
def test_the_corpus_gives_ten_second_recordings(split: str, recordings: int) -> None:
    dataset = create_moment_dataset(f"grid:{SHARED}:audio", split)
    assert len({query.video for query in dataset.queries}) == recordings
    assert dataset.read(0).video.shape == (250, 258)
    assert dataset.read(0).text.shape == (1, 51)
    assert all(len(query.windows) <= 10 for query in dataset.queries)
