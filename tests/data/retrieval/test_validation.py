from pathlib import Path

import pytest
import torch

from lamzoo.data import BadInput
from lamzoo.data.retrieval import (
    CaptionedVideos,
    create_retrieval_dataset,
    find_invalid_videos,
    set_aside_invalid_videos,
)
from lamzoo.data.video.sampling import FrameSampling
from lamzoo.errors import ConfigError, DataError

SAMPLING = FrameSampling(fps=5)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    from tests.videos import write_clip  # skips where PyAV or scikit-image is missing

    return write_clip(tmp_path_factory.mktemp("clips") / "clip.avi", 20, fps=10).read_bytes()


@pytest.fixture
def dataset(tmp_path: Path, clip: bytes) -> CaptionedVideos:
    """Five videos with two captions each, of which the second is cut short and the fourth no video."""
    content = [clip, clip[: len(clip) * 2 // 3], clip, b"I am a text", clip]
    for number, data in enumerate(content):
        (tmp_path / f"{number}.avi").write_bytes(data)
    lines = [f"{number},caption {place} of {number}\n" for number in range(5) for place in range(2)]
    (tmp_path / "captions.csv").write_text("video,caption\n" + "".join(lines))
    return create_retrieval_dataset(f"videos:{tmp_path}", "all")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_scan_names_each_bad_video_and_why(dataset: CaptionedVideos, workers: int) -> None:
    seen: list[tuple[int, int]] = []
    bad = find_invalid_videos(
        dataset, SAMPLING, workers=workers, progress=lambda done, total: seen.append((done, total))
    )
    assert [(video.index, video.filename) for video in bad] == [(1, dataset.filename(1)), (3, dataset.filename(3))]
    assert all(video.reason and video.filename not in video.reason for video in bad)
    assert seen[-1] == (5, 5)


def test_a_scan_finds_files_that_went_away(dataset: CaptionedVideos) -> None:
    Path(dataset.filename(0)).unlink()
    assert [video.index for video in find_invalid_videos(dataset, SAMPLING)] == [0, 1, 3]


def test_a_listed_video_that_cannot_be_reached_is_lost_with_the_reason(
    dataset: CaptionedVideos, tmp_path: Path
) -> None:
    with (tmp_path / "captions.csv").open("a") as table:
        table.write(f"{'a' * 300}.avi,a name that no file can have\n")
    found = create_retrieval_dataset(f"videos:{tmp_path}", "all")
    assert [(video.index, video.reason) for video in found.lost] == [(5, "File name too long")]
    assert [video.index for video in find_invalid_videos(found, SAMPLING)] == [1, 3, 5]


def test_a_scan_leaves_the_random_state_alone(dataset: CaptionedVideos) -> None:
    before = torch.random.get_rng_state()
    find_invalid_videos(dataset, SAMPLING, workers=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_stop_names_the_first_files_and_how_many(dataset: CaptionedVideos) -> None:
    with pytest.raises(DataError, match=r"2 of the 5 videos of .* cannot be used: ") as caught:
        set_aside_invalid_videos(dataset, SAMPLING, "stop")
    assert dataset.filename(1) in str(caught.value)
    assert "--on-bad-input skip" in str(caught.value)
    for index in range(5):
        Path(dataset.filename(index)).write_text("nothing")
    with pytest.raises(DataError, match="and 2 more"):
        set_aside_invalid_videos(dataset, SAMPLING, "stop")
    with pytest.raises(DataError, match="none of the 5 videos"):
        set_aside_invalid_videos(dataset, SAMPLING, "skip")


def test_skip_goes_on_with_the_rest_and_their_captions(dataset: CaptionedVideos) -> None:
    kept, bad = set_aside_invalid_videos(dataset, SAMPLING, "skip")
    assert kept.videos == ["0.avi", "2.avi", "4.avi"]
    assert kept.texts[2:4] == ["caption 0 of 2", "caption 1 of 2"]
    assert kept.video_of_text == [0, 0, 1, 1, 2, 2]
    assert isinstance(bad[0], BadInput)
    assert set_aside_invalid_videos(kept, SAMPLING, "stop") == (kept, [])


def test_impossible_arguments_are_named(dataset: CaptionedVideos) -> None:
    with pytest.raises(ConfigError, match="on_bad is 'ignore'"):
        set_aside_invalid_videos(dataset, SAMPLING, "ignore")
    with pytest.raises(ConfigError, match="workers is -1"):
        find_invalid_videos(dataset, SAMPLING, workers=-1)
