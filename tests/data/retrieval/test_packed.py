import io
import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lamzoo.data.retrieval import create_retrieval_dataset, select_videos
from lamzoo.data.video.sampling import FrameSampling
from lamzoo.errors import DataError
from tests.images import encoded

SHARED = Path(__file__).parents[4] / "shared" / "data"
EVERY_FRAME = FrameSampling(fps=None, max_frames=None)
WORDS = ("bin blue at f two now", "lay red by g nine soon", "set white in z three again")


def jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_jpegs(root: Path, name: str, files: list[bytes], lines: list[dict]) -> Path:
    offsets = np.cumsum([0, *map(len, files)], dtype=np.int64)
    np.savez(root / name, jpeg=np.frombuffer(b"".join(files), np.uint8), offsets=offsets)
    (root / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def spoken(text: str, first: int) -> list[tuple[str, float, float]]:
    """A sentence whose words take ten frames each, from a frame on."""
    starts = range(first, first + 60, 10)
    return [(word, start / 25, (start + 10) / 25) for word, start in zip(text.split(), starts, strict=True)]


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """Three clips; in the mouth's archive frame k is as bright as 3 k, in the face's as the number of its frame."""
    lines = [
        {"id": f"clip{number}", "n_frames": total, "text": text, "split": split, "words": spoken(text, 10 + 2 * number)}
        for number, (total, text, split) in enumerate(zip((75, 74, 75), WORDS, ("train", "test", "train"), strict=True))
    ]
    mouth, face = [], []
    for line in lines:
        levels = np.arange(line["n_frames"], dtype=np.uint8)[:, None, None] * 3
        mouth.append(jpeg(np.broadcast_to(levels, (len(levels), 48, 80)).reshape(-1, 80)))
        colours = np.broadcast_to(levels[2::5, :, :, None], (15, 64, 64, 3))
        face.append(jpeg(colours.reshape(-1, 64, 3)))
    write_jpegs(tmp_path, "face.npz", face, lines)
    return write_jpegs(tmp_path, "mouth.npz", mouth, lines)


def levels(frames: list[Image.Image]) -> list[int]:
    """The number of each frame, by its brightness."""
    assert {frame.mode for frame in frames} == {"RGB"}
    return [round(np.asarray(frame).mean() / 3) for frame in frames]


def test_every_frame_of_a_mouth_is_at_its_number_over_25(grid: Path) -> None:
    dataset = create_retrieval_dataset(f"grid:{grid}", "train")
    assert dataset.videos == ["clip0", "clip2"]
    assert dataset.texts == [WORDS[0], WORDS[2]]
    clip = dataset.read(1, EVERY_FRAME)
    assert levels(clip.frames) == list(range(75))
    assert clip.times == [number / 25 for number in range(75)]
    assert clip.duration == 3.0
    assert clip.frames[0].size == (80, 48)
    assert dataset.filename(1) == f"{grid / 'mouth.npz'}[2]"


def test_lips_are_the_middle_of_the_mouth(grid: Path) -> None:
    pattern = np.broadcast_to(np.arange(80, dtype=np.uint8) * 3, (48, 80)).copy()
    pattern[:12] = pattern[44:] = 255
    strips = [jpeg(np.tile(pattern, (total, 1))) for total in (75, 74, 75)]
    lines = [json.loads(line) for line in (grid / "captions.jsonl").read_text().splitlines()]
    write_jpegs(grid, "mouth.npz", strips, lines)
    frame = create_retrieval_dataset(f"grid:{grid}:lips", "train").read(1, EVERY_FRAME).frames[-1]
    assert frame.size == (48, 32)
    columns = np.asarray(frame)[2:-2, :, 0].mean(axis=0)
    assert np.abs(columns - np.arange(24, 72) * 3).max() < 3


def test_motion_is_the_difference_from_a_clips_own_mean(grid: Path) -> None:
    dataset = create_retrieval_dataset(f"grid:{grid}:motion", "train")
    lips = create_retrieval_dataset(f"grid:{grid}:lips", "train")
    for index in range(2):
        plain = np.stack([np.asarray(frame) for frame in lips.read(index, EVERY_FRAME).frames]).astype(float)
        moved = np.stack([np.asarray(frame) for frame in dataset.read(index, EVERY_FRAME).frames])
        expected = np.clip(128 + 3 * (plain - plain.mean(axis=0)), 0, 255)
        assert np.abs(moved - expected).max() <= 1
    random.seed(0)
    clip, _ = dataset.splice(EVERY_FRAME, phrase=True)
    assert {frame.size for frame in clip.frames} == {(48, 32)}


def test_a_face_is_every_fifth_frame_from_the_third_on(grid: Path) -> None:
    dataset = create_retrieval_dataset(f"grid:{grid}:face", "test")
    for sampling in (EVERY_FRAME, FrameSampling(fps=5, max_frames=15)):
        clip = dataset.read(0, sampling)
        assert levels(clip.frames) == list(range(2, 74, 5))
        assert clip.times == [number / 25 for number in range(2, 74, 5)]
    assert clip.duration == 74 / 25
    assert clip.frames[0].size == (64, 64)


def test_frames_are_sampled_by_their_times(grid: Path) -> None:
    dataset = create_retrieval_dataset(f"grid:{grid}:mouth", "train")
    clip = dataset.read(0, FrameSampling(fps=1))
    assert levels(clip.frames) == [0, 25, 50]
    assert clip.times == [0.0, 1.0, 2.0]
    assert levels(dataset.read(0, FrameSampling(fps=None, max_frames=4)).frames) == [0, 24, 49, 74]
    assert levels(dataset.read(0, FrameSampling(fps=5, max_frames=3, slicing="tail")).frames) == [60, 65, 70]


def test_a_spliced_clip_says_each_word_as_one_of_the_clips_does(grid: Path) -> None:
    dataset = create_retrieval_dataset(f"grid:{grid}", "train")
    sentences = set()
    for seed in range(8):
        random.seed(seed)
        clip, text = dataset.splice(EVERY_FRAME)
        sentences.add(text)
        expected: list[int] = []
        for slot, word in enumerate(text.split()):
            number = next(number for number in (0, 2) if WORDS[number].split()[slot] == word)
            end = 10 + 2 * number + 10 * (slot + 1)
            expected += range(0 if slot == 0 else end - 10, 75 if slot == 5 else end)
        assert levels(clip.frames) == expected
        assert clip.duration == pytest.approx(len(expected) / 25)
        assert clip.times == pytest.approx([number / 25 for number in range(len(expected))])
    assert len(sentences) > 4
    assert len(dataset.splice(FrameSampling(fps=None, max_frames=7))[0].frames) == 7


def test_a_phrase_is_a_run_of_words_with_their_own_frames(grid: Path) -> None:
    dataset = create_retrieval_dataset(f"grid:{grid}", "train")
    lengths = set()
    for seed in range(20):
        random.seed(seed)
        clip, text = dataset.splice(EVERY_FRAME, phrase=True)
        words = text.split()
        slots = next(
            range(first, first + len(words))
            for first in range(7 - len(words))
            if all(word in {WORDS[k].split()[first + n] for k in (0, 2)} for n, word in enumerate(words))
        )
        expected: list[int] = []
        for slot, word in zip(slots, words, strict=True):
            number = next(number for number in (0, 2) if WORDS[number].split()[slot] == word)
            end = 10 + 2 * number + 10 * (slot + 1)
            expected += range(0 if slot == 0 else end - 10, 75 if slot == 5 else end)
        assert levels(clip.frames) == expected
        assert clip.times[0] == 0.0
        lengths.add(len(words))
    assert len(lengths) > 3


def test_a_phrase_always_has_frames(grid: Path) -> None:
    dataset = create_retrieval_dataset(f"grid:{grid}:face", "train")
    random.seed(0)
    assert all(dataset.splice(EVERY_FRAME, phrase=True)[0].frames for _ in range(50))


def test_pieces_come_from_the_chosen_clips_alone(grid: Path) -> None:
    dataset = select_videos(create_retrieval_dataset(f"grid:{grid}:face", "train"), [1])
    clip, text = dataset.splice(EVERY_FRAME)
    assert text == WORDS[2]
    assert levels(clip.frames) == list(range(2, 74, 5))


def test_what_has_no_pieces_cannot_be_spliced(grid: Path) -> None:
    lines = (grid / "captions.jsonl").read_text().replace('"words"', '"spans"')
    (grid / "captions.jsonl").write_text(lines)
    with pytest.raises(DataError, match=r"mouth\.npz\[[02]\] in captions\.jsonl has no words with times"):
        create_retrieval_dataset(f"grid:{grid}", "train").splice(EVERY_FRAME)


def test_only_the_splits_own_files_are_kept_in_memory(grid: Path) -> None:
    whole = (grid / "mouth.npz").stat().st_size
    dataset = create_retrieval_dataset(f"grid:{grid}", "test")
    assert len(pickle.dumps(dataset)) < whole / 2
    assert levels(pickle.loads(pickle.dumps(dataset)).read(0, EVERY_FRAME).frames) == list(range(74))


def test_a_clip_that_does_not_have_its_frames_is_named(grid: Path) -> None:
    lines = (grid / "captions.jsonl").read_text().replace("74", "70")
    (grid / "captions.jsonl").write_text(lines)
    dataset = create_retrieval_dataset(f"grid:{grid}", "test")
    with pytest.raises(DataError, match=r"mouth\.npz\[1\] is 80 x 3552 pixels, not 70 frames of 80 x 48"):
        dataset.read(0, EVERY_FRAME)


@pytest.fixture
def flickr(tmp_path: Path) -> Path:
    lines = [
        {"image": f"{number}.jpg", "split": split, "captions": [f"caption {k} of {number} ." for k in range(5)]}
        for number, split in enumerate(("train", "test", "unlisted", "test"))
    ]
    return write_jpegs(tmp_path, "images.npz", [encoded(number % 3, number) for number in range(4)], lines)


def test_flickr8k_is_videos_of_one_frame_with_five_captions(flickr: Path) -> None:
    dataset = create_retrieval_dataset(f"flickr8k:{flickr}", "test")
    assert dataset.videos == ["1.jpg", "3.jpg"]
    assert dataset.texts[5] == "caption 0 of 3 ."
    assert dataset.video_of_text == [0] * 5 + [1] * 5
    for sampling in (FrameSampling(), EVERY_FRAME):
        clip = dataset.read(1, sampling)
        assert (len(clip.frames), clip.times, clip.duration) == (1, [0.0], 0.0)
    assert np.asarray(clip.frames[0]).mean(axis=(0, 1)).argmax() == 2  # blue
    assert dataset.filename(1) == f"{flickr / 'images.npz'}[3]"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "a", "split": "test"}', "line 1 of .* has no 'captions' of type list"),
        ('{"image": "a", "split": "test", "captions": []}', "video 'a' of flickr8k:.* has no caption"),
        ('{"image": "a", "split": "test", "captions": [3]}', "captions of 'a' in .* must all be strings"),
        ('{"image": "a", "split": "test", "captions": [" "]}', "caption 1 of the video 'a' of .* is empty"),
        ('{"image": "a", "split": "train", "captions": ["b"]}', "no split 'test'; it has 'train'"),
        ('{"image": "a"', "line 1 of .* is not JSON"),
        ("3", "line 1 of .* is not a JSON object"),
        ('{"image": "a", "split": "test", "captions": ["b"]}\n' * 2, "in 2 steps for the 2 lines"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    write_jpegs(tmp_path, "images.npz", [encoded(0, 0)], [])
    (tmp_path / "captions.jsonl").write_text(line)
    with pytest.raises(DataError, match=message) as caught:
        create_retrieval_dataset(f"flickr8k:{tmp_path}", "test")
    assert "\n" not in str(caught.value)


def test_a_wrong_archive_is_refused_at_once(flickr: Path) -> None:
    whole = (flickr / "images.npz").read_bytes()
    (flickr / "images.npz").write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"images\.npz is not a complete npz archive"):
        create_retrieval_dataset(f"flickr8k:{flickr}", "test")
    np.savez(flickr / "images.npz", jpeg=np.zeros(3, np.uint8))
    with pytest.raises(DataError, match=r"images\.npz has no array 'offsets'"):
        create_retrieval_dataset(f"flickr8k:{flickr}", "test")
    np.savez(flickr / "images.npz", jpeg=np.zeros(3), offsets=np.arange(5))
    with pytest.raises(DataError, match="jpeg is float64 .* must be a row of uint8"):
        create_retrieval_dataset(f"flickr8k:{flickr}", "test")
    (flickr / "images.npz").unlink()
    with pytest.raises(DataError, match=r"has no images\.npz"):
        create_retrieval_dataset(f"flickr8k:{flickr}", "test")


def test_a_broken_picture_is_named_by_its_place(tmp_path: Path) -> None:
    lines = [{"image": "a", "split": "test", "captions": ["b"]}]
    write_jpegs(tmp_path, "images.npz", [encoded(0, 0)[:300]], lines)
    with pytest.raises(DataError, match=r"images\.npz\[0\]"):
        create_retrieval_dataset(f"flickr8k:{tmp_path}", "test").read(0, EVERY_FRAME)


@pytest.mark.skipif(not (SHARED / "grid_s1").is_dir(), reason=f"the GRID clips are not in {SHARED}")
def test_the_clips_of_talker_s1_open_whole() -> None:
    for split, count in (("train", 700), ("validation", 100), ("test", 200)):
        dataset = create_retrieval_dataset(f"grid:{SHARED / 'grid_s1'}", split)
        assert (len(dataset), len(set(dataset.texts))) == (count, count)
    face = create_retrieval_dataset(f"grid:{SHARED / 'grid_s1'}:face", "test")
    assert face.videos == dataset.videos
    assert len(face.read(199, EVERY_FRAME).frames) == 15
    assert len(dataset.read(199, FrameSampling(fps=5)).frames) == 12


@pytest.mark.skipif(not (SHARED / "flickr8k").is_dir(), reason=f"Flickr8k is not in {SHARED}")
def test_flickr8k_opens_whole() -> None:
    dataset = create_retrieval_dataset(f"flickr8k:{SHARED / 'flickr8k'}", "test")
    assert (len(dataset), len(dataset.texts)) == (1000, 5000)
    assert dataset.read(999, FrameSampling()).frames[0].size == (128, 128)
    assert len(create_retrieval_dataset(f"flickr8k:{SHARED / 'flickr8k'}", "dev")) == 1000
