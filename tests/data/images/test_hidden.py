"""Hidden files and folders, which notebooks, file managers and macOS leave in data folders, are no data."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamzoo.data import create_dataset, find_images
from lamzoo.data.captions import create_caption_dataset
from lamzoo.data.captions.feature_files import FeatureFiles
from lamzoo.data.paths import is_hidden
from lamzoo.data.retrieval import create_retrieval_dataset
from lamzoo.data.video.reader import find_videos
from tests.images import encoded, write_folder, write_npz
from tests.shards import write_shard

HIDDEN = (".ipynb_checkpoints/0-checkpoint", "._0", "__MACOSX/0", "__MACOSX/deep/._0", ".cache/deep/0")


def hide(folder: Path, extension: str) -> None:
    """Puts a file that is no data in each hidden place below a folder."""
    for name in HIDDEN:
        path = folder / f"{name}{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no data")


@pytest.fixture(params=["root", ".root"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder for data, which may be hidden itself."""
    path = tmp_path / request.param
    path.mkdir()
    return path


@given(st.lists(st.sampled_from(["a", "b.c", "MACOSX", "..", "."]), min_size=1), st.sampled_from([".a", "__MACOSX"]))
def test_a_path_is_hidden_if_any_part_of_it_is(parts: list[str], hidden: str) -> None:
    assert not is_hidden("/".join(parts))
    assert all(is_hidden("/".join([*parts[:place], hidden, *parts[place:]])) for place in range(len(parts) + 1))


def test_image_folders_skip_hidden_images_and_classes(root: Path) -> None:
    for splits in ((), ("train", "val")):
        folder = write_folder(root / f"{len(splits)} splits", splits)
        for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            hide(place, ".jpg")
        dataset = create_dataset(f"imagefolder:{folder}", "train" if splits else "all")
        assert (len(dataset), dataset.classes) == (9, ["blue", "green", "red"])
        assert {dataset[index][1] for index in range(9)} == {0, 1, 2}


def test_image_lists_and_images_to_predict_skip_hidden_images(root: Path) -> None:
    (root / "a.jpg").write_bytes(encoded(0, 0))
    hide(root, ".jpg")
    labels = root.parent / "labels.txt"
    labels.write_text("cat\n")
    assert len(create_dataset(f"imagelist:{root}:{labels}", "all")) == 1
    assert find_images([root]) == [root / "a.jpg"]
    assert find_images([root / "._0.jpg"]) == [root / "._0.jpg"]  # it was asked for by its name


def test_archives_and_shards_skip_hidden_files(root: Path) -> None:
    write_npz(root)
    hide(root, ".npz")
    assert len(create_dataset(str(root), "test")) == 9
    samples = {"./a.jpg": encoded(0, 0), "./a.cls": b"1", **{f"./{name}.jpg": b"no data" for name in HIDDEN}}
    hide(root, ".tar")
    write_shard(root / "a.tar", samples)
    assert create_dataset(f"wds:{root}/*.tar", "all").labels() == [1]


def test_folders_of_videos_skip_hidden_videos(root: Path) -> None:
    (root / "0.mp4").touch()
    (root / "captions.csv").write_text("video,caption\n0,a cat\n")
    hide(root, ".mp4")
    assert find_videos([root]) == [root / "0.mp4"]  # as search, find, describe and extract-features list them
    assert create_retrieval_dataset(f"videos:{root}", "all").videos == ["0.mp4"]
    assert [item.video for item in create_caption_dataset(f"videos:{root}", "all").items] == ["0.mp4"]


def test_folders_of_features_skip_hidden_files(root: Path) -> None:
    for folder, extension in (("video", ".npy"), ("audio", ".npz")):
        (root / "features" / folder).mkdir(parents=True)
        hide(root / "features" / folder, extension)
    np.save(root / "features" / "video" / "a.npy", np.ones((3, 4), np.float32))
    assert FeatureFiles(root / "features", 2.0).modalities == {"video": 4}
    (root / "train.csv").write_text("a\t0\t2\ta cat\n")
    hide(root, ".csv")
    (root / "._annos_train.csv").write_bytes(b"no data")
    assert create_caption_dataset(f"lsmdc:{root}", "train").items[0].captions == ("a cat",)


def test_mad_skips_hidden_features(root: Path) -> None:
    h5py = pytest.importorskip("h5py")
    (root / "MAD_train.json").write_text('{"0": {"movie": "m", "timestamps": [0, 2], "sentence": "a cat"}}')
    for name in ("CLIP_B32_frames_features_5fps.h5", "audio_10fps.h5"):
        with h5py.File(root / name, "w") as file:
            file["m"] = np.ones((20, 4), np.float32)
        (root / f"._{name}").write_bytes(b"no data")
    assert create_caption_dataset(f"mad:{root}", "train").modalities == {"video": 4, "audio": 4}
