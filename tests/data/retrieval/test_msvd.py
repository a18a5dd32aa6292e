import json
import pickle
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lamzoo.data.retrieval import create_retrieval_dataset
from lamzoo.errors import DataError

CAPTIONS = {
    "-4wsuPCjDBc_5_15": [["a", "squirrel", "is", "eating", "a", "peanut"], ["a", "chipmunk", "eats"]],
    "00jrXRMlZOY_0_10": [["a", "man", "drives"]],
    "v": [["unlisted"]],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "YouTubeClips").mkdir()
    for video in CAPTIONS:
        (tmp_path / "YouTubeClips" / f"{video}.avi").touch()
    (tmp_path / "test_list.txt").write_text("00jrXRMlZOY_0_10\n-4wsuPCjDBc_5_15\n\n")
    (tmp_path / "val_list.txt").write_text("\n")
    (tmp_path / "raw-captions.json").write_text(json.dumps(CAPTIONS))
    return tmp_path


def test_msvd_gives_each_listed_video_its_captions(folder: Path) -> None:
    dataset = create_retrieval_dataset(f"msvd:{folder}", "test")
    assert dataset.videos == ["00jrXRMlZOY_0_10", "-4wsuPCjDBc_5_15"]
    assert dataset.texts == ["a man drives", "a squirrel is eating a peanut", "a chipmunk eats"]
    assert dataset.video_of_text == [0, 1, 1]
    assert dataset.filename(1) == str(folder / "YouTubeClips" / "-4wsuPCjDBc_5_15.avi")


def test_captions_may_be_texts_instead_of_words(folder: Path) -> None:
    whole = {video: [" ".join(words) for words in captions] for video, captions in CAPTIONS.items()}
    (folder / "raw-captions.json").write_text(json.dumps(whole))
    assert create_retrieval_dataset(f"msvd:{folder}", "test").texts[1] == "a squirrel is eating a peanut"


def test_the_pickle_is_never_opened_and_the_error_says_how_to_convert_it(folder: Path) -> None:
    (folder / "raw-captions.json").unlink()
    (folder / "raw-captions.pkl").write_bytes(b"no pickle at all")
    with pytest.raises(DataError, match=r"has no raw-captions\.json; if you trust raw-captions\.pkl, ") as caught:
        create_retrieval_dataset(f"msvd:{folder}", "test")
    (folder / "raw-captions.pkl").write_bytes(pickle.dumps(CAPTIONS))
    command = shlex.split(str(caught.value).partition("with: ")[2])
    subprocess.run([sys.executable, *command[1:]], cwd=folder, check=True)
    assert len(create_retrieval_dataset(f"msvd:{folder}", "test").texts) == 3


@pytest.mark.parametrize(
    ("name", "content", "split", "message"),
    [
        ("raw-captions.json", None, "test", r"download raw-captions\.pkl from https://"),
        ("raw-captions.json", '{"a": ', "test", r"raw-captions\.json is not readable JSON"),
        ("raw-captions.json", "[]", "test", "must be a JSON object of lists"),
        ("raw-captions.json", '{"v": ["a", 3]}', "test", "the captions of 'v' in .* must be a list of strings"),
        ("raw-captions.json", '{"v": "a"}', "test", "the captions of 'v' in .* must be a list of strings"),
        (
            "raw-captions.json",
            '{"v": ["a"]}',
            "test",
            "no caption of the video '00jrXRMlZOY_0_10', nor 1 more of the 2",
        ),
        ("train_list.txt", None, "train", r"has no train_list\.txt; https://"),
        ("val_list.txt", "\n", "validation", r"val_list\.txt lists no video"),
        ("test_list.txt", "v\nv", "test", "'v' is listed twice"),
        ("test_list.txt", "v\n", "extra", "no split 'extra'; it has 'train', 'val', 'test'"),
    ],
)
def test_a_wrong_file_is_named(folder: Path, name: str, content: str | None, split: str, message: str) -> None:
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        create_retrieval_dataset(f"msvd:{folder}", split)
    assert "\n" not in str(caught.value)


def test_a_missing_video_is_named(folder: Path) -> None:
    (folder / "YouTubeClips" / "-4wsuPCjDBc_5_15.avi").unlink()
    [lost] = create_retrieval_dataset(f"msvd:{folder}", "test").lost
    assert Path(lost.filename).stem == "-4wsuPCjDBc_5_15"
    assert lost.reason == "there is no such file, and test_list.txt lists it"
    (folder / "YouTubeClips" / "00jrXRMlZOY_0_10.avi").rename(folder / "YouTubeClips" / "other.avi")
    with pytest.raises(DataError, match=r"has no video '00jrXRMlZOY_0_10', nor 1 more of the 2; add .* from .*test_li"):
        create_retrieval_dataset(f"msvd:{folder}", "test")
