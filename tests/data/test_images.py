import warnings
from pathlib import Path

import numpy as np
import pytest
import timm.data
from PIL import Image

from lamzoo.data import create_dataset, find_images, open_image
from lamzoo.errors import DataError
from tests.images import encoded


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    pixels = np.zeros((10, 20, 3), np.uint8)
    pixels[:, :10] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    upright = np.asarray(open_image(tmp_path / "a.png"))
    assert upright.shape == (20, 10, 3)
    assert (upright[:10] == 255).all()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (4, 4)).save(path)
    assert open_image(path).mode == "RGB"


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path, mode: str) -> None:
    values = np.array([[0, 255, 256, 30000, 65535]], ">u2" if mode == "I;16B" else "<u2")
    stored = Image.fromarray(values.astype(np.int32)) if mode == "I" else Image.fromarray(values)
    stored.save(tmp_path / "a.tif")
    assert np.asarray(open_image(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 0, 1, 117, 255]


@pytest.mark.parametrize("value", [0.5, 70000, -3])
def test_pixels_of_unknown_range_are_refused(tmp_path: Path, value: float) -> None:
    Image.fromarray(np.full((4, 4), value, np.float32 if value == 0.5 else np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif: its pixels .* unknown range"):
        open_image(tmp_path / "a.tif")


def test_colours_survive_every_way_of_storing_them(tmp_path: Path) -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    transparent = red.convert("P")
    transparent.info["transparency"] = bytes([0] * 255)
    ways = {"a.png": red.convert("RGBA"), "b.png": transparent, "c.tif": red.convert("CMYK"), "d.gif": red}
    for name, stored in ways.items():
        stored.save(tmp_path / name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert np.asarray(open_image(tmp_path / name))[4, 4].tolist() == [255, 0, 0], name


def test_data_sets_leave_the_orientation_alone_as_timm_does(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "class").mkdir()
    Image.new("RGB", (20, 10)).save(tmp_path / "class" / "a.jpg", exif=exif)
    assert create_dataset(str(tmp_path), "all")[0][0].size == (20, 10)


def test_a_decompression_bomb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (100, 100)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)  # an error above twice this
    with pytest.raises(DataError, match=r"huge\.png: .*exceeds limit of 8000 pixels"):
        open_image(tmp_path / "huge.png")


def test_an_image_too_thin_to_be_resized_is_named(tmp_path: Path) -> None:
    Image.new("1", (2, 2001)).save(tmp_path / "thin.png")
    with pytest.raises(DataError, match=r"thin\.png: it is 2 x 2001 pixels, too thin"):
        open_image(tmp_path / "thin.png")


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1)])
def test_an_image_one_pixel_wide_goes_through_both_of_timms_transforms(size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size)
    for training in (True, False):
        transform = timm.data.create_transform((3, 32, 32), is_training=training, auto_augment="rand-m9-mstd0.5-inc1")
        assert transform(picture).shape == (3, 32, 32)


def test_folders_are_searched_and_files_taken_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "Größe und Maß"
    (folder / "deep").mkdir(parents=True)
    for name in ("10.jpg", "9.JPG", "deep/写真 1.jpg", "notes.txt"):
        (folder / name).write_bytes(encoded(0, 0))
    found = find_images([folder / "notes.txt", folder])
    assert [path.name for path in found] == ["notes.txt", "9.JPG", "10.jpg", "写真 1.jpg"]
    assert open_image(found[-1]).size == (32, 32)


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.jpg").write_bytes(encoded(0, 0)[:600])
    with pytest.raises(DataError, match=r"a\.png: it is no image"):
        open_image(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"(?i)cut\.jpg: .*truncated"):
        open_image(tmp_path / "cut.jpg")
    with pytest.raises(DataError, match="is a folder"):
        open_image(tmp_path)
    with pytest.raises(DataError, match="no such image"):
        open_image(tmp_path / "b.png")
    with pytest.raises(DataError, match="holds no image"):
        find_images([tmp_path / "empty"])
    with pytest.raises(DataError, match="no such image or folder"):
        find_images([tmp_path / "c"])
