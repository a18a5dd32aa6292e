"""Clips with captions: what the data set checks, what came before a clip, and how specifications are read."""

import math
import pickle
from pathlib import Path

import numpy as np
import pytest

from lamzoo.data.captions import CaptionDataset, CaptionItem, CaptionSource, Stream, create_caption_dataset
from lamzoo.errors import DataError


def stream(rows: int, width: int, times: int | None = None) -> Stream:
    return Stream(np.ones((rows, width), np.float32), np.zeros(rows if times is None else times, np.float32))


class Source(CaptionSource):
    def __init__(self, *items: CaptionItem, found: dict[str, Stream] | None = None) -> None:
        self.split, self.items, self.modalities = "train", items, {"video": 3, "audio": 2}
        self.found = {"audio": stream(4, 2), "video": stream(5, 3)} if found is None else found

    def streams(self, index: int) -> dict[str, Stream]:
        return self.found


def item(name: str, start: float = 0.0, end: float = 1.0, *captions: str, video: str = "m") -> CaptionItem:
    return CaptionItem(name, video, start, end, captions or (name.upper(),))


def test_a_clip_is_read_in_the_order_of_the_modalities() -> None:
    dataset = CaptionDataset(Source(item("a"), item("b", 1, 2, "B", "b")), "x:y")
    assert (dataset.spec, dataset.split, len(dataset)) == ("x:y", "train", 2)
    assert list(dataset.read(1)) == ["video", "audio"]
    assert dataset.references() == {"a": ("A",), "b": ("B", "b")}
    with pytest.raises(IndexError):
        dataset.read(2)
    there = pickle.loads(pickle.dumps(dataset))
    assert there.items == dataset.items


def test_what_was_said_before_ends_before_the_clip_and_is_of_its_movie() -> None:
    dataset = CaptionDataset(
        Source(
            item("late", 9, 10), item("a", 0, 2), item("b", 1, 3, "B", "another"), item("other", 0, 1, video="n"),
            item("c", 3, 5), item("over", 4, 8.5), item("d", 5, 8),
        ),
        "x",
    )  # fmt: skip
    assert dataset.context(0, 9) == ("A", "B", "C", "D", "OVER")
    assert dataset.context(0, 2) == ("D", "OVER")
    assert dataset.context(4, 3) == ("A", "B")  # b ends when c starts, and of its captions the first is taken
    assert dataset.context(6, 1) == ("C",)
    assert dataset.context(1, 3) == dataset.context(3, 3) == dataset.context(0, 0) == ()
    with pytest.raises(IndexError):
        dataset.context(7, 1)


@pytest.mark.parametrize(
    ("items", "says"),
    [
        ([], "x:y has no items"),
        ([item("a"), item("a")], "item 'a' is listed twice in x:y"),
        ([CaptionItem("a", "m", 0.0, 1.0, ())], "item 'a' of x:y has no caption; add one"),
        ([item("a", 0, 1, "A", " ")], "item 'a' of x:y has an empty caption"),
        ([item("a", 2, 2)], "item 'a' of x:y is from 2 to 2 s; its start must be before its end"),
        ([item("a", math.nan, 2)], "is from nan to 2 s"),
    ],
)
def test_items_that_are_wrong_are_named(items: list[CaptionItem], says: str) -> None:
    with pytest.raises(DataError, match=says):
        CaptionDataset(Source(*items), "x:y")


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({}, "item 'a' of x:y has no features of video or audio; extract some, or remove the item"),
        ({"video": stream(3, 2)}, r"item 'a' of x:y has video features \(3, 2\) .* rows of 3, as for other items"),
        ({"video": stream(0, 3)}, r"video features \(0, 3\)"),
        ({"video": stream(4, 3, 5)}, r"video features \(4, 3\) and 5 times"),
    ],
)
def test_features_that_are_wrong_are_named(found: dict[str, Stream], says: str) -> None:
    with pytest.raises(DataError, match=says):
        CaptionDataset(Source(item("a"), found=found), "x:y").read(0)


def test_a_layout_without_pieces_can_t_be_spliced() -> None:
    with pytest.raises(
        DataError, match=r"these data can't splice clips, since they have no pieces; set augment\.splice to 0"
    ):
        CaptionDataset(Source(item("a")), "x").splice()


@pytest.mark.parametrize(
    ("spec", "split", "says"),
    [
        ("mad:", "val", "has nothing after mad:; it must be mad:DIR"),
        ("captions:x", "val", "'captions:x' is not a caption data set; it must be mad:DIR"),
        ("lsmdc:nowhere", "val", "no such folder: nowhere"),
        ("mad:nowhere:3", "val", "no such folder: nowhere"),
        ("videos:nowhere:3", "val", "no such folder: nowhere"),
        ("grid:nowhere:face", "val", "no such folder: nowhere"),
        ("flickr8k:nowhere", "val", "no such folder: nowhere"),
        ("lsmdc:x", "", "the split of lsmdc:x is empty"),
    ],
)
def test_wrong_specifications_are_named(spec: str, split: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        create_caption_dataset(spec, split)


def test_a_folder_may_have_a_colon_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "x:2").mkdir()
    with pytest.raises(DataError, match=r"x:2 has no captions\.csv"):
        create_caption_dataset(f"videos:{tmp_path / 'x:2'}", "train")
