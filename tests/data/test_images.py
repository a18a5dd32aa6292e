from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lamzoo.data import find_images, open_image
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
