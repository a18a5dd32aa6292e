"""Flickr8k's photographs in patches."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lamzoo.data.captions import create_caption_dataset
from lamzoo.errors import DataError

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data" / "flickr8k"


def write(folder: Path, *sizes: int, captions: object = ("A dog. ", "Two dogs.")) -> Path:
    """Writes pictures whose left half is dark and whose right half is red."""
    files, lines = [], []
    for number, size in enumerate(sizes):
        pixels = np.zeros((size, size, 3), np.uint8)
        pixels[:, size // 2 :, 0] = 200
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0)
        files.append(buffer.getvalue())
        lines.append({"image": f"{number}.jpg", "captions": captions, "split": "train"})
    offsets = np.cumsum([0, *map(len, files)], dtype=np.int64)
    np.savez(folder / "images.npz", jpeg=np.frombuffer(b"".join(files), np.uint8), offsets=offsets)
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_photograph_is_its_patches(tmp_path: Path) -> None:
    dataset = create_caption_dataset(f"flickr8k:{write(tmp_path, 128, 64)}", "training")
    assert (dataset.split, len(dataset), dataset.modalities) == ("train", 2, {"image": 768})
    assert dataset.items[0].captions == ("A dog.", "Two dogs.")
    for index in range(2):
        (image,) = dataset.read(index).values()
        assert image.features.shape == (64, 768)
        assert np.allclose(np.diff(image.times), 1 / 25, atol=1e-5)  # no two patches are in the same place
        assert 0 < image.times[0] < image.times[-1] < dataset.items[index].end
        assert (image.features.mean(), image.features.std()) == pytest.approx((0, 1), abs=1e-3)
        patches = image.features.reshape(8, 8, 16, 16, 3)  # rows and columns of patches, of pixels, and colours
        assert patches[:, 5:, :, :, 0].min() > 1.5
        assert patches[:, :3].max() < 0
        assert patches[:, 5:, :, :, 1:].max() < 0
    assert np.array_equal(
        pickle.loads(pickle.dumps(dataset)).read(0)["image"].features, dataset.read(0)["image"].features
    )


def test_captions_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"captions of '0\.jpg' in .* must all be strings"):
        create_caption_dataset(f"flickr8k:{write(tmp_path, 128, captions=[1])}", "train")
    with pytest.raises(DataError, match=r"item '0\.jpg' of .* has an empty caption"):
        create_caption_dataset(f"flickr8k:{write(tmp_path, 128, captions=[' '])}", "train")


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there")
def test_the_photographs_are_read() -> None:
    dataset = create_caption_dataset(f"flickr8k:{SHARED}", "val")
    assert len(dataset) == 1000
    assert all(len(item.captions) == 5 for item in dataset.items)
    assert dataset.read(999)["image"].features.shape == (64, 768)
