"""A folder of videos with captions: their sound, and features that lie beside them."""

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lamzoo.data.captions import CaptionDataset, create_caption_dataset
from lamzoo.errors import DataError, MissingSplitError
from lamzoo.video.feature_files import write_features
from tests.videos import write_clip

TABLE = "video,caption,split\nsub/a.mp4,a tone,train\nsub/a,another,train\nb.mp4,silence,train\nb.mp4,tested,test\n"
SPANS = "video,start,end,caption\nsub/a.mp4,0.5,1.5,first\nsub/a.mp4,1.5,2,second\nsub/a.mp4,0.5,1.5,again\n"


def rows(count: int, width: int = 4) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, width)).astype(np.float32)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "a.mp4", 20, audio=2.0)
    write_clip(folder / "b.mp4", 10)
    return folder


@pytest.fixture
def videos(tmp_path: Path, clips: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.mp4").symlink_to(clips / "a.mp4")
    (tmp_path / "b.mp4").symlink_to(clips / "b.mp4")
    (tmp_path / "captions.csv").write_text(TABLE)
    write_features(tmp_path / "features" / "clip_features" / "a.npz", "features", rows(1), {"clip_seconds": 2.0})
    np.save(tmp_path / "features" / "clip_features" / "b.npy", rows(5))
    return tmp_path


def opened(folder: Path, options: str = ":5", split: str = "train") -> CaptionDataset:
    return create_caption_dataset(f"videos:{folder}{options}", split)


def test_a_video_has_its_captions_its_sound_and_its_features(videos: Path) -> None:
    dataset = opened(videos)
    assert (dataset.split, dataset.modalities) == ("train", {"video": 4, "audio": 128})
    assert dataset.references() == {"sub/a.mp4": ("a tone", "another"), "b.mp4": ("silence",)}
    assert (dataset.items[0].start, dataset.items[0].end) == (0.0, math.inf)
    found = dataset.read(0)
    assert found["video"].times == pytest.approx([1.0])
    audio = found["audio"]
    assert len(audio.features) == pytest.approx(100, abs=5)  # 50 a second
    assert audio.times[:2] == pytest.approx([0.005, 0.025])
    assert audio.features.std() == pytest.approx(1.0, abs=1e-3)
    assert audio.features.mean() == pytest.approx(0.0, abs=1e-3)
    silent = dataset.read(1)
    assert list(silent) == ["video"]
    assert silent["video"].times == pytest.approx(np.arange(5) / 5 + 0.1)
    assert opened(videos, ":5", "test").references() == {"b.mp4": ("tested",)}


def test_spans_of_a_video_are_items(videos: Path) -> None:
    (videos / "captions.csv").write_text(SPANS)
    (videos / "features" / "clip_features" / "a.npz").unlink()
    np.savez(videos / "features" / "clip_features" / "a.npz", features=rows(10))
    with pytest.raises(MissingSplitError, match="no split 'val', since it has no splits; .* to captions.csv"):
        opened(videos, split="val")
    dataset = opened(videos, split="all")
    assert dataset.split is None
    assert dataset.references() == {"sub/a.mp4[0.5-1.5]": ("first", "again"), "sub/a.mp4[1.5-2]": ("second",)}
    assert dataset.context(1, 1) == ("first",)
    found = dataset.read(0)
    assert found["video"].times == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], abs=1e-6)  # middles at 0.5 ... 1.5
    assert found["audio"].features.shape == (50, 128)
    assert found["audio"].times[-1] == pytest.approx(0.985)


def test_sound_may_be_a_file_of_features_too(videos: Path) -> None:
    (videos / "features" / "audio").mkdir()
    np.save(videos / "features" / "audio" / "a.npy", rows(20, 3))
    dataset = opened(videos)
    assert dataset.modalities == {"video": 4, "audio": 3}
    assert dataset.read(0)["audio"].features.shape == (20, 3)
    assert list(dataset.read(1)) == ["video"]


def test_without_features_there_is_the_sound(videos: Path) -> None:
    (videos / "features").rename(videos / "away")
    dataset = opened(videos, "")
    assert dataset.modalities == {"audio": 128}
    assert list(dataset.read(0)) == ["audio"]
    with pytest.raises(DataError, match=r"item 'b\.mp4' of videos:.* has no features of audio"):
        dataset.read(1)


def test_it_travels_to_workers(videos: Path) -> None:
    dataset = opened(videos)
    there = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(there.read(0)["audio"].features, dataset.read(0)["audio"].features)


def table(text: str) -> Any:
    return lambda folder: (folder / "captions.csv").write_text(text)


def no_table(folder: Path) -> None:
    (folder / "captions.csv").unlink()


def same_name(folder: Path) -> None:
    (folder / "a.mp4").symlink_to(folder / "b.mp4")
    (folder / "captions.csv").write_text(TABLE + "a.mp4,one more,train\n")


def broken(folder: Path) -> None:
    (folder / "sub" / "a.mp4").unlink()
    (folder / "sub" / "a.mp4").write_bytes(b"no video")


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (no_table, ":5", r"has no captions\.csv; add one with the columns video,caption or"),
        (table("video,text\na,b\n"), ":5", "has no column 'caption'"),
        (table("video,caption,start\nb.mp4,b,1\n"), ":5", "has only one of the columns start and end"),
        (
            table("video,caption,start,end\nb.mp4,b,2,1\n"),
            ":5",
            r"describes 'b\.mp4' from 2 to 1; both must be seconds",
        ),
        (table("video,caption,start,end\nb.mp4,b,1,end\n"), ":5", "from 1 to end; both must be seconds"),
        (table("video,caption\nc.mp4,c\n"), ":5", r"there is no .*c\.mp4; add the video"),
        (table("video,caption\n../c.mp4,c\n"), ":5", "is not below"),
        (same_name, ":5", r"a\.mp4 and .*a\.mp4 would have the same feature file; rename one of them"),
        (broken, ":5", r"cannot read the sound of .*a\.mp4"),
        (table("video,caption,split\nb.mp4,b,train\n"), "", r"b\.npy doesn't state its rows per second"),
        (table(TABLE), ":0", "can't have 0 rows per second"),
    ],
)
def test_what_is_wrong_is_named(videos: Path, change: Any, options: str, says: str) -> None:
    change(videos)
    with pytest.raises(DataError, match=says):
        opened(videos, options).read(0)
