import json
import shutil
from pathlib import Path

import pytest

from lamzoo.data.retrieval import create_retrieval_dataset, leave_out_invalid_videos
from lamzoo.data.retrieval.msrvtt import read_test_pairs, read_video_ids
from lamzoo.data.video.sampling import FrameSampling
from lamzoo.errors import DataError

SPLITS = Path(__file__).parents[4] / "shared" / "data" / "msrvtt_splits"
official = pytest.mark.skipif(not SPLITS.is_dir(), reason=f"the official split files are not in {SPLITS}")


def write_msrvtt(root: Path, videos: str = "videos/all", each: int = 20) -> Path:
    """Six videos in the official layout, empty files all: 0 to 3 and 5 in the long list, 0 and 3 in the short one."""
    (root / videos).mkdir(parents=True, exist_ok=True)
    for number in range(6):
        (root / videos / f"video{number}.mp4").touch()
    splits = ("train", "train", "train", "validate", "test", "test")
    content = {
        "info": {"year": "2016"},
        "videos": [{"video_id": f"video{number}", "split": split, "url": ""} for number, split in enumerate(splits)],
        "sentences": [  # in the official file, too, the sentences of one video need not stand together
            {"video_id": f"video{number}", "caption": f"caption {place} of {number} ", "sen_id": 6 * place + number}
            for place in range(each)
            for number in reversed(range(6))
        ],
    }
    (root / "MSRVTT_data.json").write_text(json.dumps(content))
    (root / "MSRVTT_train.9k.csv").write_text("video_id\nvideo3\nvideo0\nvideo1\nvideo2\nvideo5\n")
    (root / "MSRVTT_train.7k.csv").write_text("video_id\r\nvideo3\r\nvideo0")
    (root / "MSRVTT_JSFUSION_test.csv").write_text(
        'key,vid_key,video_id,sentence\nret0,msr4,video4,"a man, a plan"\nret1,msr5,video5,two dogs run \n'
    )
    return root


@official
def test_the_official_split_files_parse_and_count() -> None:
    pairs = read_test_pairs(SPLITS / "MSRVTT_JSFUSION_test.csv")
    assert len(pairs) == len({video for video, _ in pairs}) == 1000
    assert pairs[0] == ("video9770", "a person is connecting something to system")
    test = {video for video, _ in pairs}
    for name, count in (("9k", 9000), ("7k", 7010)):
        ids = read_video_ids(SPLITS / f"MSRVTT_train.{name}.csv")
        assert len(ids) == len(set(ids)) == count
        assert not test & set(ids)


@official
def test_the_official_test_split_opens_without_the_captions(tmp_path: Path) -> None:
    shutil.copy(SPLITS / "MSRVTT_JSFUSION_test.csv", tmp_path)
    (tmp_path / "videos").mkdir()
    for number in range(7010, 10000):
        (tmp_path / "videos" / f"video{number}.mp4").touch()
    dataset = create_retrieval_dataset(f"msrvtt:{tmp_path}", "test")
    assert (len(dataset), len(dataset.texts)) == (1000, 1000)
    assert dataset.video_of_text == list(range(1000))


@pytest.mark.parametrize("videos", ["videos/all", "videos", "MSRVTT_Videos", ".", "TestVideo/parts"])
def test_the_test_split_is_pairs_of_a_video_and_a_sentence(tmp_path: Path, videos: str) -> None:
    root = write_msrvtt(tmp_path, videos)
    (root / "MSRVTT_data.json").unlink()  # the test split's own file says it all
    dataset = create_retrieval_dataset(f"msrvtt:{root}", "test")
    assert dataset.videos == ["video4", "video5"]
    assert dataset.texts == ["a man, a plan", "two dogs run"]
    assert dataset.video_of_text == [0, 1]
    assert dataset.split == "test"
    assert dataset.filename(0) == str(root / videos / "video4.mp4")


def test_training_has_every_caption_of_the_videos_on_the_list(tmp_path: Path) -> None:
    root = write_msrvtt(tmp_path)
    dataset = create_retrieval_dataset(f"msrvtt:{root}", "train")
    assert dataset.videos == ["video3", "video0", "video1", "video2", "video5"]
    assert len(dataset.texts) == 100
    assert dataset.texts[:2] == ["caption 0 of 3", "caption 1 of 3"]
    assert dataset.texts_of(1) == list(range(20, 40))
    assert {dataset.texts[text][-1] for text in dataset.texts_of(1)} == {"0"}
    assert [dataset.video_of_text[text] for text in dataset.texts_of(4)] == [4] * 20


def test_the_short_list_is_chosen_by_its_name(tmp_path: Path) -> None:
    root = write_msrvtt(tmp_path)
    assert create_retrieval_dataset(f"msrvtt:{root}:7k", "train").videos == ["video3", "video0"]
    assert len(create_retrieval_dataset(f"msrvtt:{root}:9k", "train")) == 5
    with pytest.raises(DataError, match="has no training list '8k'; it must be '9k' or '7k'"):
        create_retrieval_dataset(f"msrvtt:{root}:8k", "train")


def test_validation_is_the_official_one(tmp_path: Path) -> None:
    dataset = create_retrieval_dataset(f"msrvtt:{write_msrvtt(tmp_path)}", "val")
    assert dataset.videos == ["video3"]
    assert dataset.split == "validation"
    assert len(dataset.texts) == 20


def test_videos_are_found_with_any_extension(tmp_path: Path) -> None:
    root = write_msrvtt(tmp_path)
    folder = root / "videos" / "all"
    (folder / "video4.mp4").rename(folder / "video4.webm")
    (folder / "video4.txt").touch()
    assert create_retrieval_dataset(f"msrvtt:{root}", "test").filename(0) == str(folder / "video4.webm")
    (folder / "video4.mp4").touch()
    with pytest.raises(DataError, match=r"'video4' is both .*video4\.mp4 and .*video4\.webm"):
        create_retrieval_dataset(f"msrvtt:{root}", "test")


def test_videos_without_a_file_are_named_and_counted(tmp_path: Path) -> None:
    root = write_msrvtt(tmp_path)
    for number in (0, 2):
        (root / "videos" / "all" / f"video{number}.mp4").unlink()
    train = create_retrieval_dataset(f"msrvtt:{root}", "train")
    with pytest.raises(
        DataError, match=r"2 of the 5 .*video0\.mp4 \(there is no such file, .*_train\.9k\.csv lists it"
    ):
        leave_out_invalid_videos(train, train.lost, "stop")
    with pytest.raises(DataError, match=r"no such video: .*video0\.mp4"):
        train.read(1, FrameSampling())
    assert leave_out_invalid_videos(train, train.lost, "skip").videos == ["video3", "video1", "video5"]
    assert not create_retrieval_dataset(f"msrvtt:{root}", "test").lost


def test_a_folder_without_any_of_the_videos_is_refused(tmp_path: Path) -> None:
    root = write_msrvtt(tmp_path)
    for path in (root / "videos" / "all").iterdir():
        path.rename(path.with_stem(f"other-{path.stem}"))
    with pytest.raises(
        DataError, match=r"no video 'video3', nor 4 more of the 5; add video3\.mp4, .* from .*train\.9k"
    ):
        create_retrieval_dataset(f"msrvtt:{root}", "train")


def test_videos_without_captions_are_named(tmp_path: Path) -> None:
    root = write_msrvtt(tmp_path)
    with (root / "MSRVTT_train.7k.csv").open("a") as file:
        file.write("\nvideo77")
    with pytest.raises(DataError, match=r"MSRVTT_data\.json has no caption of the video 'video77'; .* from .*7k"):
        create_retrieval_dataset(f"msrvtt:{root}:7k", "train")


@pytest.mark.parametrize(
    ("name", "content", "split", "message"),
    [
        ("MSRVTT_JSFUSION_test.csv", None, "test", r"has no MSRVTT_JSFUSION_test\.csv; https://"),
        ("MSRVTT_JSFUSION_test.csv", "key,video\n1,video1", "test", "no column 'video_id'; .* names 'key', 'video'"),
        ("MSRVTT_JSFUSION_test.csv", "", "test", "no column 'video_id'; .* names none"),
        ("MSRVTT_JSFUSION_test.csv", "video_id,sentence\n", "test", "no rows after"),
        ("MSRVTT_JSFUSION_test.csv", "video_id,sentence\nvideo1, \n", "test", "line 2 of .* has no 'sentence'"),
        ("MSRVTT_JSFUSION_test.csv", "video_id,sentence\nvideo1\n", "test", "line 2 of .* has no 'sentence'"),
        (
            "MSRVTT_JSFUSION_test.csv",
            'video_id,sentence\nvideo1,"a\nvideo2,b\n',
            "test",
            "cannot read .*: line 2 has a double",
        ),
        ("MSRVTT_JSFUSION_test.csv", b"video_id,sentence\nvideo1,\xff\xfe", "test", "cannot read .*decode"),
        ("MSRVTT_train.9k.csv", None, "train", r"has no MSRVTT_train\.9k\.csv"),
        ("MSRVTT_train.9k.csv", "video_id\nvideo1\nvideo1", "train", "'video1' is listed twice"),
        ("MSRVTT_data.json", None, "train", r"has no MSRVTT_data\.json; https://"),
        ("MSRVTT_data.json", '{"sentences": [{"vid', "train", r"MSRVTT_data\.json is not readable JSON"),
        ("MSRVTT_data.json", "[]", "train", "has no list 'sentences'"),
        (
            "MSRVTT_data.json",
            '{"sentences": [{"caption": "a"}]}',
            "train",
            "entry 0 of 'sentences' .* must have the string 'video_id'",
        ),
        (
            "MSRVTT_data.json",
            '{"sentences": [{"caption": 1, "video_id": "x"}]}',
            "train",
            "entry 0 .* must have the string 'caption'",
        ),
        ("MSRVTT_data.json", '{"videos": []}', "val", "no video whose split is 'validate'"),
        ("MSRVTT_data.json", '{"videos": [3]}', "val", "entry 0 of 'videos' .* must have the string 'video_id'"),
    ],
)
def test_a_wrong_file_is_named(
    tmp_path: Path, name: str, content: str | bytes | None, split: str, message: str
) -> None:
    root = write_msrvtt(tmp_path)
    path = root / name
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        create_retrieval_dataset(f"msrvtt:{root}", split)
    assert "\n" not in str(caught.value)
    assert str(root) in str(caught.value)


def test_an_empty_caption_is_named(tmp_path: Path) -> None:
    root = write_msrvtt(tmp_path)
    data = json.loads((root / "MSRVTT_data.json").read_text())
    data["sentences"][6 + 5]["caption"] = "  "
    (root / "MSRVTT_data.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match="caption 2 of the video 'video0' of msrvtt:.* is empty"):
        create_retrieval_dataset(f"msrvtt:{root}", "train")
