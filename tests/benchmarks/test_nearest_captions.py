"""The baseline of captions: of photographs that look alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.nearest_captions import consensus, nearest_captions, thumbnails
from lamzoo.data.captions import create_caption_dataset
from tests.data.captions.test_flickr import write


def test_a_photograph_is_nearest_to_itself(tmp_path: Path) -> None:
    dataset = create_caption_dataset(f"flickr8k:{write(tmp_path, 128, 64)}", "train")
    small = thumbnails(dataset)
    assert small.shape == (2, 3 * 64)
    assert np.linalg.norm(small, axis=1) == pytest.approx(1)
    assert set(nearest_captions(dataset, dataset, 1)) == {"0.jpg", "1.jpg"}
    assert nearest_captions(dataset, dataset, 1)["0.jpg"] == "a dog."


def test_the_caption_most_like_the_others_is_taken() -> None:
    assert consensus(["two cats", "a dog runs", "a brown dog runs", "a dog runs fast"]) == "a dog runs"
