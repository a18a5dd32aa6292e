import pickle
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lamzoo.data import plain_worker_errors
from lamzoo.data.retrieval import CaptionedVideos, create_retrieval_dataset, select_videos
from lamzoo.data.video.sampling import FrameSampling
from lamzoo.errors import DataError, MissingSplitError
from tests.shards import write_shard

SAMPLING = FrameSampling(fps=2.0, max_frames=3)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Two seconds of real video, 64 x 48 pixels."""
    from tests.videos import write_clip  # skips where PyAV or scikit-image is missing

    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 20, fps=10, size=(64, 48)).read_bytes()


@pytest.fixture
def folder(tmp_path: Path, clip: bytes) -> Path:
    """A plain folder of three videos: two for training, one of them with two captions, and one to test."""
    (tmp_path / "dogs").mkdir()
    for name in ("dogs/a.mp4", "dogs/b.mp4", "cat.mp4"):
        (tmp_path / name).write_bytes(clip)
    (tmp_path / "captions.csv").write_text(
        "video,caption,split\n"
        "dogs/b.mp4,a dog runs,train\n"
        "dogs/a,two dogs,train\n"
        'cat.mp4," a cat, asleep ",test\n'
        "dogs/b,a dog runs fast,train\n"
    )
    return tmp_path


def test_a_plain_folder_gives_its_videos_and_captions(folder: Path) -> None:
    dataset = create_retrieval_dataset(f"videos:{folder}", "train")
    assert len(dataset) == 2
    assert dataset.videos == ["dogs/b.mp4", "dogs/a.mp4"]
    assert dataset.texts == ["a dog runs", "a dog runs fast", "two dogs"]
    assert dataset.video_of_text == [0, 0, 1]
    assert [dataset.texts_of(index) for index in range(2)] == [[0, 1], [2]]
    assert dataset.split == "train"
    assert dataset.spec == f"videos:{folder}"
    assert create_retrieval_dataset(f"videos:{folder}", "testing").texts == ["a cat, asleep"]


def test_frames_are_read_as_they_are_sampled(folder: Path) -> None:
    dataset = create_retrieval_dataset(f"videos:{folder}", "test")
    clip = dataset.read(0, SAMPLING)
    assert [(frame.mode, frame.size) for frame in clip.frames] == [("RGB", (64, 48))] * 3
    assert clip.times == pytest.approx([0.0, 0.5, 1.5])
    assert clip.duration == pytest.approx(2.0)
    with pytest.raises(IndexError):
        dataset.read(1, SAMPLING)
    with pytest.raises(IndexError):
        dataset.texts_of(-1)


def test_videos_without_pieces_can_t_be_spliced(folder: Path) -> None:
    with pytest.raises(
        DataError, match=r"these data can't splice videos, since they have no pieces; set augment\.splice to 0"
    ):
        create_retrieval_dataset(f"videos:{folder}", "train").splice(SAMPLING)


def test_a_folder_without_splits_is_taken_whole(folder: Path) -> None:
    (folder / "captions.csv").write_text("\ufeffcaption,id, video\na,1,dogs/a\nb,2,cat\n", "utf-8")
    dataset = create_retrieval_dataset(f"videos:{folder}", "all")
    assert dataset.videos == ["dogs/a.mp4", "cat.mp4"]
    assert dataset.split is None
    with pytest.raises(MissingSplitError, match=r"no split 'val', since it has no splits; .* to captions"):
        create_retrieval_dataset(f"videos:{folder}", "val")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("video,text\ncat,a cat\n", "no column 'caption'"),
        ("video,caption\ncat,\n", "line 2 of .* has no 'caption'"),
        ("video,caption,split\ncat,a cat\n", "line 2 of .* has no 'split'"),
        ("video,caption,split\ncat,a cat,train\n", "no split 'test'; it has 'train'"),
        ("video,caption\nhorse,a horse\n", "no .*horse with a video extension; add the video, or remove"),
        ("video,caption\nhorse.mp4,a horse\n", r"no .*horse\.mp4; add"),
        ("video,caption\n/etc/passwd,a file\n", "'/etc/passwd' in .* is not below"),
        ("video,caption\n../cat,a cat\n", r"'\.\./cat' in .* is not below"),
    ],
)
def test_a_wrong_table_is_named(folder: Path, table: str, message: str) -> None:
    (folder / "captions.csv").write_text(table)
    with pytest.raises(DataError, match=message) as caught:
        create_retrieval_dataset(f"videos:{folder}", "test")
    assert str(folder / "captions.csv") in str(caught.value)


def test_two_files_for_one_video_are_refused(folder: Path) -> None:
    (folder / "dogs" / "a.mkv").touch()
    with pytest.raises(DataError, match=r"'dogs/a' is both .*a\.mkv and .*a\.mp4"):
        create_retrieval_dataset(f"videos:{folder}", "train")


class Lengths(Dataset):
    """How many frames each video gives, as a loader's workers read them."""

    def __init__(self, videos: CaptionedVideos) -> None:
        self.videos = videos

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> int:
        return len(self.videos.read(index, SAMPLING).frames)


@pytest.mark.slow
def test_workers_that_are_spawned_read_the_videos(folder: Path) -> None:
    dataset = create_retrieval_dataset(f"videos:{folder}", "train")
    loader = DataLoader(Lengths(dataset), 2, num_workers=1, multiprocessing_context="spawn")
    assert torch.cat(list(loader)).tolist() == [3, 3]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_video_is_named_and_never_replaced(folder: Path, workers: int) -> None:
    dataset = create_retrieval_dataset(f"videos:{folder}", "train")
    (folder / "dogs" / "a.mp4").write_text("I am a text")
    with pytest.raises(DataError) as caught, plain_worker_errors():
        list(DataLoader(Lengths(dataset), 1, num_workers=workers))
    assert str(folder / "dogs" / "a.mp4") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["val-*.tar", "val-{00..01}.tar", "{split}-{00,01}.tar"])
def test_webdataset_shards_are_read_at_random(tmp_path: Path, clip: bytes, pattern: str) -> None:
    texts = {"a.mp4": clip, "a.txt": b"a dog runs\r\na dog plays \n", "a.json": b'{"caption": "not this"}'}
    write_shard(tmp_path / "val-00.tar", {**texts, "in/b.json": b'{"caption": "a cat"}', "in/b.MP4": clip})
    write_shard(tmp_path / "val-01.tar", {"c.mp4": clip, "c.json": b'{"captions": ["a cow", "a calf"], "fps": 3}'})
    dataset = create_retrieval_dataset(f"wds:{tmp_path}/{pattern}", "validation" if "{split}" in pattern else "all")
    assert dataset.videos == ["a", "in/b", "c"]
    assert dataset.texts == ["a dog runs", "a dog plays", "a cat", "a cow", "a calf"]
    assert dataset.video_of_text == [0, 0, 1, 2, 2]
    assert dataset.split == ("val" if "{split}" in pattern else None)
    assert dataset.filename(1) == f"{tmp_path / 'val-00.tar'}[in/b]"
    for each in (dataset, pickle.loads(pickle.dumps(dataset))):  # the second as for workers that are spawned
        assert each.read(2, SAMPLING).times == pytest.approx([0.0, 0.5, 1.5])


def test_webdataset_writes_what_is_read(tmp_path: Path, clip: bytes) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "train-0.tar")) as writer:
        writer.write({"__key__": "sample", "mp4": clip, "txt": "a dog runs"})
    dataset = create_retrieval_dataset(f"wds:{tmp_path}/{{split}}-*.tar", "train")
    assert dataset.texts == ["a dog runs"]
    assert len(dataset.read(0, SAMPLING).frames) == 3


def test_keys_that_return_in_another_shard_are_told_apart(tmp_path: Path) -> None:
    for shard in range(2):
        write_shard(tmp_path / f"{shard}.tar", {"0.mp4": b"", "0.txt": b"a"})
    assert create_retrieval_dataset(f"wds:{tmp_path}/*.tar", "all").videos == ["0.tar/0", "1.tar/0"]


def test_a_broken_video_in_a_shard_is_named_by_its_key(tmp_path: Path, clip: bytes) -> None:
    shard = write_shard(tmp_path / "0.tar", {"x.mp4": clip[:200], "x.txt": b"a"})
    dataset = create_retrieval_dataset(f"wds:{shard}", "all")
    with pytest.raises(DataError) as caught:
        dataset.read(0, SAMPLING)
    assert f"{shard}[x]" in str(caught.value)
    assert "/tmp/tmp" not in str(caught.value)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"x.mp4": b""}, "the sample 'x' has no caption"),
        ({"x.txt": b"a"}, r"the sample 'x' has no video \(.*\.mp4"),
        ({"x.mp4": b"", "x.json": b'{"duration": 3}'}, "the sample 'x' has no caption"),
        ({"x.mp4": b"", "x.json": b'{"caption": 3}'}, "the sample 'x' has no caption"),
        ({"x.mp4": b"", "x.json": b'{"caption'}, "caption of the sample 'x' cannot be read"),
        ({"x.mp4": b"", "x.txt": b"\xff\xfe\xfd"}, "caption of the sample 'x' cannot be read"),
        ({"x.mp4": b"", "x.txt": b"\n"}, "caption 1 of the video 'x' of .* is empty"),
        ({"x.mp4": b"", "x.txt": b"a\n\nb"}, "caption 2 of the video 'x' of .* is empty"),
        ({"x.mp4": b"", "x.mkv": b"", "x.txt": b"a"}, "has the sample 'x' twice"),
        ({"README": b""}, "has no video"),
    ],
)
def test_wrong_shards_are_refused(tmp_path: Path, samples: dict[str, bytes], message: str) -> None:
    shard = write_shard(tmp_path / "0.tar", samples)
    with pytest.raises(DataError, match=message) as caught:
        create_retrieval_dataset(f"wds:{shard}", "test")
    assert str(shard) in str(caught.value)


def test_shards_that_are_missing_cut_or_remote_are_refused(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "train-0.tar", {"x.mp4": b"1" * 5000, "x.txt": b"a"})
    for spec, message in {
        f"{tmp_path}/train-{{0..1}}.tar": r"train-1\.tar is missing",
        f"{tmp_path}/{{split}}-*.tar": "no split 'test'; they have train",
        f"{tmp_path}/no-*.tar": "there is no shard",
        "pipe:rm -rf x": "not local",
        "https://example.org/a.tar": "not local",
    }.items():
        with pytest.raises(DataError, match=message):
            create_retrieval_dataset(f"wds:{spec}", "test")
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"train-0\.tar is not a complete"):
        create_retrieval_dataset(f"wds:{shard}", "test")


def test_some_videos_keep_all_their_captions(folder: Path) -> None:
    dataset = create_retrieval_dataset(f"videos:{folder}", "train")
    dataset.threads = 2
    part = select_videos(dataset, [1, 0])
    assert part.videos == ["dogs/a.mp4", "dogs/b.mp4"]
    assert part.texts == ["two dogs", "a dog runs", "a dog runs fast"]
    assert part.filename(0) == dataset.filename(1)
    assert (part.split, part.spec, part.threads) == ("train", dataset.spec, 2)
    assert len(part.read(0, SAMPLING).frames) == 3
    with pytest.raises(DataError, match="has no video 2; it has 2"):
        select_videos(dataset, [2])
    with pytest.raises(DataError, match="has no video"):
        select_videos(dataset, [])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", "is not a data set of videos with captions; it must be msrvtt:DIR"),
        ("imagefolder:EMPTY", "is not a data set of videos with captions"),
        ("msvd:", "has nothing after msvd:"),
        ("grid", "has nothing after grid:"),
        ("msrvtt:nowhere", "no such folder: nowhere"),
        ("msvd:nowhere", "no such folder: nowhere"),
        ("videos:nowhere", "no such folder: nowhere"),
        ("grid:nowhere", "no such folder: nowhere"),
        ("flickr8k:nowhere", "no such folder: nowhere"),
        ("videos:EMPTY", r"has no captions\.csv; add one with the columns video,caption"),
        ("grid:EMPTY:ear", "EMPTY has no view 'ear'; it must be 'mouth' or 'face' or 'lips' or 'motion'"),
        ("grid:EMPTY", r"cannot read EMPTY/captions\.jsonl: No such file"),
    ],
)
def test_a_wrong_specification_names_the_culprit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    with pytest.raises(DataError, match=message) as caught:
        create_retrieval_dataset(spec, "test")
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="the split of .* is empty"):
        create_retrieval_dataset(spec, "")
