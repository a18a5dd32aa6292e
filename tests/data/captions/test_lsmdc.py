"""LSMDC: its tables, clips of several sentences, and features of each clip."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lamzoo.data.captions import CaptionDataset, create_caption_dataset
from lamzoo.errors import DataError, MissingSplitError
from lamzoo.video.feature_files import write_features

FIRST = "1006_Slumdog_Millionaire_01.25.49.077-01.25.54.718"
SECOND = "1006_Slumdog_Millionaire_01.25.55.000-01.25.56.000"
LINES = [
    f'{FIRST}\t01.25.49.077\t01.25.54.718\t01.25.49.077\t01.25.54.718\tSOMEONE says "no.',
    f"{SECOND}\t01.25.55.000\t01.25.56.000\t01.25.54.500\t01.25.56.500\tHe goes.",
    f"{SECOND}\t01.25.55.000\t01.25.56.000\t01.25.54.500\t01.25.56.500\tHe is gone.",
]


def rows(count: int, width: int = 4) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, width)).astype(np.float32)


@pytest.fixture
def lsmdc(tmp_path: Path) -> Path:
    (tmp_path / "LSMDC16_annos_training.csv").write_text("\n".join(LINES) + "\n")
    (tmp_path / "LSMDC16_annos_val.csv").write_text(LINES[0])
    (tmp_path / "features" / "video").mkdir(parents=True)
    np.save(tmp_path / "features" / "video" / f"{SECOND}.npy", rows(8))
    write_features(tmp_path / "features" / "video" / f"{FIRST}.npz", "features", rows(3), {"clip_seconds": 2.0})
    write_features(tmp_path / "features" / "audio" / f"{FIRST}.npz", "features", rows(10, 3), {})
    return tmp_path


def opened(folder: Path, split: str = "train") -> CaptionDataset:
    return create_caption_dataset(f"lsmdc:{folder}", split)


def test_a_clip_has_its_sentences_its_movie_and_its_features(lsmdc: Path) -> None:
    dataset = opened(lsmdc)
    assert (dataset.split, dataset.modalities) == ("training", {"video": 4, "audio": 3})
    first, second = dataset.items
    assert first.captions == ('SOMEONE says "no.',)
    assert second.captions == ("He goes.", "He is gone.")
    assert (first.id, first.video, second.video) == (FIRST, "1006_Slumdog_Millionaire", "1006_Slumdog_Millionaire")
    assert (first.start, first.end) == pytest.approx((5149.077, 5154.718))
    assert dataset.context(1, 3) == first.captions
    assert dataset.place(0) == (FIRST, 0.0, pytest.approx(5.641))
    found = dataset.read(0)
    assert found["video"].times == pytest.approx([1, 3, 5])  # clips of 2 s
    assert found["audio"].times == pytest.approx((np.arange(10) + 0.5) * 0.5641, abs=1e-5)  # spread over the clip
    assert found["video"].features == pytest.approx(rows(3) / np.linalg.norm(rows(3), axis=1)[:, None])
    (only,) = dataset.read(1).values()
    assert only.times == pytest.approx((np.arange(8) + 0.5) / 4)  # the clip was made 2 s long


def test_times_may_be_seconds_and_of_the_clip_alone(lsmdc: Path) -> None:
    (lsmdc / "test.csv").write_text("clip7\t3.5\t5.5\tA dog.\n\n")
    np.save(lsmdc / "features" / "video" / "clip7.npy", rows(4))
    dataset = opened(lsmdc, "test")
    (item,) = dataset.items
    assert (item.id, item.video, item.start, item.end) == ("clip7", "clip7", 3.5, 5.5)
    assert dataset.read(0)["video"].times == pytest.approx([0.25, 0.75, 1.25, 1.75])


def test_it_travels_to_workers(lsmdc: Path) -> None:
    dataset = opened(lsmdc)
    there = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(there.read(0)["audio"].features, dataset.read(0)["audio"].features)


def table(text: str) -> Any:
    return lambda folder: (folder / "LSMDC16_annos_training.csv").write_text(text)


def no_features(folder: Path) -> None:
    (folder / "features").rename(folder / "away")


def one_less(folder: Path) -> None:
    for path in folder.glob(f"features/*/{FIRST}.npz"):
        path.unlink()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (table("a\t0\t1\t0\t1\n"), r"line 1 of .*training\.csv has 5 tab-separated fields"),
        (table("A dog.\n"), "has 1 tab-separated fields"),
        (table("a\t0\tlater\tA dog.\n"), r"line 1 of .* has the time 'later'; it must be in the form 01\.02\.27\.034"),
        (table("a\t0\tinf\tA dog.\n"), "line 1 of .* has the time 'inf'; it must be in the form"),
        (table("a\tnan\t1\t0\t3\tA dog.\n"), "line 1 of .* has the time 'nan'; it must be in the form"),
        (table("a\t2\t1\tA dog.\n"), "line 1 of .* has a clip from 2 to 1 s"),
        (table("a\t0\t1\t \n"), "item 'a' of lsmdc:.* has an empty caption"),
        (table("a\t2\t1\t0\t3\tA dog.\n"), "item 'a' of .* is from 2 to 1 s"),
        (table("\n"), "has no items"),
        (lambda folder: (folder / "LSMDC16_annos_training.csv").write_bytes(b"\xff"), "cannot read .*training"),
        (no_features, "features has no features in video or audio; `lamzoo extract-features`"),
        (one_less, f"item '{FIRST}' of lsmdc:.* has no features of video"),
    ],
)
def test_what_is_wrong_is_named(lsmdc: Path, change: Any, says: str) -> None:
    change(lsmdc)
    with pytest.raises(DataError, match=says):
        opened(lsmdc).read(0)


def test_a_missing_split_is_named(lsmdc: Path) -> None:
    with pytest.raises(MissingSplitError, match="no split 'test'; it has 'training', 'val'"):
        opened(lsmdc, "test")
