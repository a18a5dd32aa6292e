import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamzoo.data import create_dataset
from lamzoo.data.images.archives import split_member
from lamzoo.data.images.decode import IMAGE_EXTENSIONS
from lamzoo.data.retrieval import create_retrieval_dataset
from lamzoo.errors import DataError
from tests.images import encoded
from tests.shards import write_shard

JPEG = encoded(0, 0)


def images(shard: Path) -> list[tuple[str, int]]:
    dataset = create_dataset(f"wds:{shard}", "all")
    names = [dataset.filename(index).removeprefix(f"{shard}[").removesuffix("]") for index in range(len(dataset))]
    return list(zip(names, dataset.labels(), strict=True))


@given(st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), min_size=1), st.data())
def test_a_member_is_split_at_the_last_dot_before_a_known_extension(key: str, data: st.DataObject) -> None:
    extension = data.draw(st.sampled_from(sorted(IMAGE_EXTENSIONS)))
    written = "".join(data.draw(st.sampled_from([letter, letter.upper()])) for letter in extension)
    assert split_member(f"folder.v2/{key}{written}", IMAGE_EXTENSIONS) == (f"folder.v2/{key}", extension)
    assert split_member(f"{key}{written}.bin", IMAGE_EXTENSIONS)[1] == ""


def test_image_keys_may_have_dots_and_extensions_capitals(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = {
        "22.05.jpg": JPEG,
        "22.05.cls": b"1",
        "22.06.cls": b"0",
        "22.06.PNG": JPEG,
        "A.JPEG": JPEG,
        "A.CLS": b"2",
    }
    assert images(write_shard(tmp_path / "a.tar", samples)) == [("22.05", 1), ("22.06", 0), ("A", 2)]
    assert not caplog.records


def test_video_keys_may_have_dots_and_extensions_capitals(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = {
        "v1.0.mp4": b"",
        "v1.0.txt": b"a cat",
        "v1.1.MKV": b"",
        "v1.1.JSON": b'{"caption": "a dog"}',
        "b.TXT": b"a",
    }
    dataset = create_retrieval_dataset(f"wds:{write_shard(tmp_path / 'a.tar', {**samples, 'b.mp4': b''})}", "all")
    assert dict(zip(dataset.videos, dataset.texts, strict=True)) == {"v1.0": "a cat", "v1.1": "a dog", "b": "a"}
    assert not caplog.records


def test_ignored_images_are_counted_and_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    extra = {"a.mask.png": JPEG, "a.json": b"{}", "README": b""}
    shard = write_shard(tmp_path / "a.tar", {"a.jpg": JPEG, "a.cls": b"1", **extra})
    for _ in range(2):
        assert images(shard) == [("a", 1)]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "3 of the 5 files" in record.message and f"{shard}[a.json]" in record.message


def test_ignored_videos_are_counted_and_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = {"a.mp4": b"", "a.txt": b"a cat", "a.meta.json": b"[]", "a.jpg": JPEG}
    shard = write_shard(tmp_path / "a.tar", samples)
    assert create_retrieval_dataset(f"wds:{shard}", "all").texts == ["a cat"]
    (record,) = caplog.records
    assert "2 of the 4 files" in record.message and f"{shard}[a.jpg]" in record.message


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"a.b.jpg": JPEG, "a.cls": b"1"}, r"'a\.b' has no \.cls label"),
        ({"a.b.cls": b"1"}, r"'a\.b' has no image"),
        ({"a.jpg": JPEG, "a.png": JPEG, "a.cls": b"1"}, "'a' twice, as .jpg and .png"),
        ({"a.jpg": JPEG, "a.JPG": JPEG, "a.cls": b"1"}, r"has a\.jpg twice"),
        ({"a.jpg": JPEG, "a.cls": b"cat"}, "the label of the sample 'a' is b'cat', not a class number"),
    ],
)
def test_no_image_of_a_shard_is_lost_without_a_word(tmp_path: Path, samples: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        images(write_shard(tmp_path / "a.tar", samples))


SAMPLES = {name: encoded(0, 0) if name.endswith("jpg") else b"1" for name in ("a.jpg", "a.cls", "b.jpg", "b.cls")}


def damaged(block: int) -> Callable[[bytes], bytes]:
    return lambda shard: shard[:block] + b"?" + shard[block + 1 :]


def second_sample(shard: bytes) -> int:
    return shard.index(b"b.jpg")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shard: shard[: second_sample(shard)], "cut short after 2 files"),
        (lambda shard: shard[: second_sample(shard) + 100], "cut short after 2 files"),
        (lambda shard: damaged(second_sample(shard) + 150)(shard), "damaged or cut short after 2 files"),
        (lambda shard: shard + shard, "more follows its end mark after 4 files, as in concatenated archives"),
        (lambda shard: bytes(10240), "has no image with a .cls label; complete it, or remove it"),
        (lambda shard: b"", "not a complete, uncompressed webdataset shard: empty file"),
    ],
    ids=["cut at a file", "cut in a header", "damaged header", "concatenated", "no files", "empty"],
)
def test_a_shard_that_ends_too_early_is_refused(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    shard = write_shard(tmp_path / "a.tar", SAMPLES)
    shard.write_bytes(change(shard.read_bytes()))
    with pytest.raises(DataError, match=message):
        images(shard)


def test_every_alternative_of_a_pattern_needs_a_shard_and_none_counts_twice(tmp_path: Path) -> None:
    write_shard(tmp_path / "a-0.tar", SAMPLES)
    assert len(create_dataset(f"wds:{tmp_path}/{{a,a}}-*.tar", "all")) == 2
    for pattern in ("{a,b}-*.tar", "a-{0..1}.tar"):
        with pytest.raises(DataError, match="the shard .* is missing; restore it"):
            create_dataset(f"wds:{tmp_path}/{pattern}", "all")


def test_a_pipe_is_no_shard(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(DataError, match="it is a pipe, socket or device, not a regular file"):
        create_dataset(f"wds:{tmp_path}/*.tar", "all")


@pytest.mark.parametrize("pattern", ["{0..1000000000000}", "{a,b}" * 40, f"{{0..{'9' * 5000}}}"])
def test_a_pattern_of_too_many_shards_is_refused_at_once(pattern: str) -> None:
    with pytest.raises(DataError, match="matches more than 100000 shards"):
        create_dataset(f"wds:{pattern}.tar", "all")


def test_a_pattern_may_have_many_braces() -> None:
    with pytest.raises(DataError, match="there is no shard"):
        create_dataset(f"wds:{'{}' * 2000}.tar", "all")
