"""MAD and MADv2: their annotations, the frames of a sentence, and how what is wrong is named."""

import json
import logging
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lamzoo.data.captions import CaptionDataset, create_caption_dataset
from lamzoo.errors import DataError, MissingExtraError, MissingSplitError

h5py = pytest.importorskip("h5py", reason="MAD's features are HDF5 files")

FRAMES = "CLIP_B32_frames_features_5fps.h5"


def rows(count: int, width: int = 4) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, width)).astype(np.float32)


def line(movie: str, start: float, end: float, sentence: str = " SOMEONE waits.") -> dict[str, Any]:
    return {
        "movie": movie, "sentence": sentence, "timestamps": [start, end], "ext_timestamps": [start - 1, end + 1],
        "movie_duration": 20.0, "tokens": sentence.split(),
    }  # fmt: skip


def write_h5(path: Path, **movies: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in movies.items():
            file[name] = values


@pytest.fixture
def mad(tmp_path: Path) -> Path:
    annotations = tmp_path / "annotations"
    annotations.mkdir()
    splits = {
        "train": {"0": line("10142", 4.0, 8.0), "1": line("10142", 9.9, 10.1, " A dog, \"Rex\".")},
        "val": {"2": line("1026_Legion", 1.0, 4.0, " He runs."), "3": line("0003_CASABLANCA", 2.0, 4.0)},
        "test": {"4": line("1005_Signs", 0.0, 3.0)},
    }  # fmt: skip
    for split, lines in splits.items():
        (annotations / f"MAD_{split}.json").write_text(json.dumps(lines))
    movies = {name: rows(100) for name in ("10142", "1026_Legion", "0003_CASABLANCA", "1005_Signs")}
    write_h5(tmp_path / "features" / FRAMES, **movies)
    return tmp_path


def opened(folder: Path, split: str = "train", options: str = "") -> CaptionDataset:
    return create_caption_dataset(f"mad:{folder}{options}", split)


def test_a_sentence_has_the_frames_that_are_shown_with_it(mad: Path) -> None:
    dataset = opened(mad)
    assert (dataset.split, len(dataset), dataset.modalities) == ("train", 2, {"video": 4})
    first, second = dataset.items
    assert (first.id, first.video, first.start, first.end) == ("0", "10142", 4.0, 8.0)
    assert (first.captions, second.captions) == (("SOMEONE waits.",), ('A dog, "Rex".',))
    video = dataset.read(0)["video"]
    expected = rows(100)[20:40]  # 5 a second
    assert video.features == pytest.approx(expected / np.linalg.norm(expected, axis=1)[:, None])
    assert video.times == pytest.approx(np.arange(20) / 5 + 0.1, abs=1e-5)
    assert dataset.context(1, 2) == ("SOMEONE waits.",)
    assert [dataset.place(0), dataset.place(1)] == [("10142", 4.0, 8.0), ("10142", 9.0, 11.0)]


@pytest.mark.parametrize(("options", "first", "count"), [("", 45, 10), (":4", 40, 20), (":0.2", 49, 2), (":0", 49, 2)])
def test_a_short_sentence_has_frames_around_it(mad: Path, options: str, first: int, count: int) -> None:
    video = opened(mad, "train", options).read(1)["video"]
    expected = rows(100)[first : first + count]
    assert video.features == pytest.approx(expected / np.linalg.norm(expected, axis=1)[:, None])
    assert (video.times >= -0.01).all()


def test_at_the_ends_of_a_movie_there_are_fewer_frames(mad: Path) -> None:
    lines = {"0": line("10142", -0.5, 0.3), "1": line("10142", 19.5, 21.0), "2": line("10142", 50.0, 52.0)}
    (mad / "annotations" / "MAD_train.json").write_text(json.dumps(lines))
    dataset = opened(mad)
    assert dataset.items[0].start == 0.0
    assert [len(dataset.read(index)["video"].features) for index in range(3)] == [6, 4, 1]


def test_sentences_that_are_none_are_left_out_and_counted(mad: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = {"0": line("10142", 4.0, 8.0), "1": line("10142", 8.0, 4.0), "2": line("10142", 4.0, 8.0, "  ")}
    (mad / "annotations" / "MAD_train.json").write_text(json.dumps(lines))
    with caplog.at_level(logging.INFO, "lamzoo"):
        assert len(opened(mad)) == 1
    assert "dropped 2 of the 3 sentences" in caplog.text


def test_files_may_lie_as_they_are_handed_out_or_all_in_one_folder(mad: Path) -> None:
    (mad / "annotations" / "MAD-v1").mkdir()
    (mad / "annotations" / "MAD_train.json").rename(mad / "annotations" / "MAD-v1" / "MAD_train.json")
    assert len(opened(mad)) == 2
    (mad / "annotations" / "MAD-v1" / "MAD_train.json").rename(mad / "MAD_train.json")
    (mad / "features" / FRAMES).rename(mad / "CLIP_frames_features_5fps.h5")
    assert opened(mad).modalities == {"video": 4}
    write_h5(mad / "CLIP_L14_frames_features_5fps.h5", **{"10142": rows(100, 6)})
    assert opened(mad).read(0)["video"].features.shape == (20, 6)


def test_mad_v2_has_sentences_with_names_and_without(mad: Path) -> None:
    tables = mad / "annotations" / "MAD-v2"
    tables.mkdir()
    (tables / "mad-v2-ad-named.csv").write_text(
        'text,start,end,movie\n"Rex, a dog, waits.",4.0,8.0,10142\n,1,2,10142\n'
    )
    (tables / "mad-v2-ad-unnamed.csv").write_text("movie,start,end,text\n10142,4.0,8.0,A dog waits.\n")
    named, unnamed = opened(mad, "train-named"), opened(mad, "train-unnamed")
    assert [item.captions for item in named.items] == [("Rex, a dog, waits.",)]  # the empty one is left out
    assert (unnamed.split, unnamed.items[0].id, unnamed.items[0].captions) == (
        "train-unnamed", "train-unnamed0", ("A dog waits.",),
    )  # fmt: skip
    assert unnamed.read(0)["video"].features.shape == (20, 4)
    (tables / "mad-v2-ad-unnamed.csv").write_text(
        "movie,start,end,text,text_unnamed\n10142,4.0,8.0,Rex waits.,It waits.\n"
    )
    assert opened(mad, "train-unnamed").items[0].captions == ("It waits.",)


def test_the_evaluation_of_mad_v2_is_of_ten_movies(mad: Path) -> None:
    dataset = opened(mad, "mad-eval")
    assert {item.video for item in dataset.items} == {"1026_Legion", "1005_Signs"}
    assert dataset.references() == {"2": ("He runs.",), "4": ("SOMEONE waits.",)}
    with pytest.raises(MissingSplitError, match="no split 'dev-x'; it has 'train', 'val', 'test', 'mad-eval'"):
        opened(mad, "dev-x")


def test_sound_is_a_modality_where_it_has_a_file(mad: Path) -> None:
    write_h5(mad / "features" / "some_audio_features_2fps.h5", **{"10142": rows(40, 3)})
    dataset = opened(mad)
    assert dataset.modalities == {"video": 4, "audio": 3}
    found = dataset.read(0)
    assert found["audio"].features.shape == (8, 3)
    assert found["audio"].times == pytest.approx(np.arange(8) / 2 + 0.25)
    assert list(opened(mad, "val").read(0)) == ["video"]  # that movie has none
    write_h5(mad / "audio_features_5fps.h5", **{"10142": rows(40, 3)})
    with pytest.raises(DataError, match="are both features of sound"):
        opened(mad)


def test_it_travels_to_workers(mad: Path) -> None:
    dataset = opened(mad)
    there = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(there.read(1)["video"].features, dataset.read(1)["video"].features)


def annotate(text: str) -> Any:
    return lambda folder: (folder / "annotations" / "MAD_train.json").write_text(text)


def tabulate(text: str) -> Any:
    return lambda folder: (folder / "annotations" / "mad-v2-ad-named.csv").write_text(text)


def no_frames(folder: Path) -> None:
    (folder / "features" / FRAMES).unlink()


def other_movies(folder: Path) -> None:
    write_h5(folder / "features" / FRAMES, x=rows(100))


def nested(folder: Path) -> None:
    with h5py.File(folder / "features" / FRAMES, "w") as file:
        file["10142/features"] = rows(100)


def not_finite(folder: Path) -> None:
    write_h5(folder / "features" / FRAMES, **{"10142": rows(100) * np.inf})


def cut_off(folder: Path) -> None:
    path = folder / "features" / FRAMES
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("change", "split", "says"),
    [
        (annotate("{"), "train", r"MAD_train\.json is not readable JSON"),
        (annotate("[]"), "train", r"MAD_train\.json must be a JSON object of sentences"),
        (
            annotate('{"7": {"movie": "m"}}'),
            "train",
            r"sentence '7' of .*MAD_train\.json must have movie, sentence and",
        ),
        (annotate(json.dumps({"7": line("m", 1, 2) | {"timestamps": [1]}})), "train", "sentence '7' of"),
        (annotate("{}"), "train", "has no items"),
        (tabulate("movie,start,text\nm,1,t\n"), "train-named", r"named\.csv has no column 'end'; its first line must"),
        (
            tabulate("movie,start,end,text\nm,1,x,t\n"),
            "train-named",
            r"line 2 of .*named\.csv has no start and end in sec",
        ),
        (no_frames, "train", r"has no CLIP_L14_frames_features_5fps\.h5 or CLIP_B32"),
        (other_movies, "train", "item '0' of mad:.* has no features of video"),
        (nested, "train", f"{FRAMES} must have one data set per movie"),
        (not_finite, "train", f"10142 in .*{FRAMES} has values that are not finite"),
        (cut_off, "train", f"{FRAMES} is not a complete HDF5 file"),
    ],
)
def test_what_is_wrong_is_named(mad: Path, change: Any, split: str, says: str) -> None:
    change(mad)
    with pytest.raises(DataError, match=says):
        opened(mad, split).read(0)


def test_without_h5py_the_extra_is_named(mad: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(
        MissingExtraError, match=r"needs h5py, which is not installed; pip install 'lamzoo\[captions\]'"
    ):
        opened(mad)


def test_data_of_other_files_is_not_read(mad: Path) -> None:
    with h5py.File(mad / "other.h5", "w") as file:
        file["secret"] = rows(100)
    (mad / "raw").write_bytes(rows(100).tobytes())
    layout = h5py.VirtualLayout((100, 4), np.float32)
    layout[:] = h5py.VirtualSource(str(mad / "other.h5"), "secret", (100, 4), np.float32)
    for name in ("external link", "soft link", "virtual", "external data"):
        with h5py.File(mad / "features" / FRAMES, "w") as file:
            if name == "external link":
                file["10142"] = h5py.ExternalLink(str(mad / "other.h5"), "secret")
            elif name == "soft link":
                file["10142"] = h5py.SoftLink("/nothing")
            elif name == "virtual":
                file.create_virtual_dataset("10142", layout)
            else:
                file.create_dataset("10142", (100, 4), np.float32, external=[(str(mad / "raw"), 0, 1600)])
        with pytest.raises(DataError, match="must have one data set per movie, .* '10142' is none"):
            opened(mad).read(0)
