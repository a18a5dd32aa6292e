import contextlib
import io
import json
import os
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm.data
from PIL import Image, features

from lamzoo.data import create_dataset, find_images, open_image
from lamzoo.data.captions import create_caption_dataset
from lamzoo.data.images.decode import Mode, decode_image
from lamzoo.data.retrieval import create_retrieval_dataset
from lamzoo.data.video.sampling import FrameSampling
from lamzoo.errors import DataError
from tests.images import encoded, sideways
from tests.shards import write_shard


def assert_upright(picture: Image.Image) -> None:
    pixels = np.asarray(picture).astype(int)
    assert pixels.shape[:2] == (20, 10)
    assert pixels[:8].min() > 200 and pixels[12:].max() < 50


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif"])
def test_photographs_are_turned_upright(tmp_path: Path, orientation: int, name: str) -> None:
    (tmp_path / name).write_bytes(sideways(orientation, name.partition(".")[2]))
    assert_upright(open_image(tmp_path / name))
    with Image.open(tmp_path / name) as image:
        upright = open_image(image)
    assert_upright(upright)
    assert_upright(open_image(upright))  # and not turned twice


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("size", [4, 7, 10, 14])
@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_damaged_exif_data_leave_an_image_as_it_is(tmp_path: Path, name: str, size: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / name, exif=exif.tobytes()[:size])
    assert open_image(tmp_path / name).size == (20, 10)


def layouts(root: Path) -> dict[str, str]:
    """A sideways photograph in each of the layouts that images are read from; their specifications."""
    photo, label = sideways(6), {"split": "test", "image": "a.jpg", "captions": ["white above black"]}
    for folder in ("folder/test/class", "npz", "imagenette2/val/n01440764", "flickr"):
        (root / folder).mkdir(parents=True)
    (root / "folder/test/class/a.jpg").write_bytes(photo)
    (root / "imagenette2/val/n01440764/a.jpeg").write_bytes(photo)
    (root / "list.txt").write_text("class\n")
    arrays = {"jpeg": np.frombuffer(photo, np.uint8), "offsets": np.array([0, len(photo)])}
    np.savez(root / "npz/test.npz", **arrays, labels=np.array([0]))
    write_shard(root / "a.tar", {"a.jpg": photo, "a.cls": b"0"})
    np.savez(root / "flickr/images.npz", **arrays)
    (root / "flickr/captions.jsonl").write_text(json.dumps(label))
    return {
        "imagefolder": f"imagefolder:{root}/folder",
        "imagelist": f"imagelist:{root}/folder/test:{root}/list.txt",
        "npz": f"npz:{root}/npz",
        "wds": f"wds:{root}/a.tar",
        "torchvision": f"torchvision:Imagenette:{root}",
        "flickr8k": f"flickr8k:{root}/flickr",
    }


@pytest.mark.parametrize("layout", ["imagefolder", "imagelist", "npz", "wds", "torchvision"])
def test_data_sets_give_images_upright(tmp_path: Path, layout: str) -> None:
    split = {"torchvision": "val", "imagelist": "all", "wds": "all"}.get(layout, "test")
    assert_upright(create_dataset(layouts(tmp_path)[layout], split)[0][0])


def test_hugging_face_data_sets_give_images_upright(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["class"])})
    rows = {"image": [{"bytes": sideways(6), "path": None}], "label": [0]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    assert_upright(create_dataset(f"hfds:{tmp_path / 'saved'}", "all")[0][0])


def test_photographs_with_captions_are_upright(tmp_path: Path) -> None:
    spec = layouts(tmp_path)["flickr8k"]
    assert_upright(create_retrieval_dataset(spec, "test").read(0, FrameSampling()).frames[0])
    patches = create_caption_dataset(spec, "test").read(0)["image"].features
    assert patches[:8].min() > 0 > patches[-8:].max()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (4, 4)).save(path)
    assert open_image(path).mode == "RGB"


@pytest.mark.parametrize("mode", ["L", "RGBA"])
@pytest.mark.parametrize("stored", ["L", "LA", "P", "RGBA", "1", "CMYK", "I;16", "RGB"])
def test_every_mode_becomes_grey_or_rgba(tmp_path: Path, stored: str, mode: Mode) -> None:
    path = tmp_path / ("a.tif" if stored == "CMYK" else "a.png")
    Image.new(stored, (4, 4)).save(path)
    assert open_image(path, mode).mode == mode


def test_grey_and_alpha_are_kept_as_they_are(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 4), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (np.asarray(open_image(tmp_path / "a.png", "RGBA")) == pixels).all()
    Image.fromarray(pixels[..., 0]).save(tmp_path / "b.png")
    assert (np.asarray(open_image(tmp_path / "b.png", "L")) == pixels[..., 0]).all()
    assert (np.asarray(open_image(tmp_path / "b.png", "RGBA"))[..., 3] == 255).all()


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
    with pytest.raises(DataError, match=r"a\.png: it is not an image"):
        open_image(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"(?i)cut\.jpg: .*truncated"):
        open_image(tmp_path / "cut.jpg")
    with pytest.raises(DataError, match="is a folder"):
        open_image(tmp_path)
    with pytest.raises(DataError, match="no such image"):
        open_image(tmp_path / "b.png")
    with pytest.raises(DataError, match="has no image"):
        find_images([tmp_path / "empty"])
    with pytest.raises(DataError, match="no such image or folder"):
        find_images([tmp_path / "c"])


BASES = {
    **{name: encoded(0, 0, name) for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")},
    **{name: encoded(0, 0, name) for name in ("AVIF",) if features.check("avif")},
    "DDS": encoded(0, 0, "DDS"),  # a name like photo.jpg doesn't keep Pillow from reading rarer formats
    "QOI": encoded(0, 0, "QOI"),
}


@pytest.mark.parametrize("name", BASES)
def test_damaged_bytes_end_in_an_image_or_in_an_error_that_names_it(name: str) -> None:
    assert decode_image(io.BytesIO(BASES[name]), "photo.jpg").mode == "RGB"
    draw, decoded = random.Random(name), 0
    for _ in range(200):
        content = bytearray(BASES[name])
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(min(len(content), draw.choice((150, 10_000))))
            if draw.random() < 0.7:
                content[at] = draw.randrange(256)
            else:
                del content[at : at + draw.randint(1, 8)]
        with warnings.catch_warnings(), contextlib.suppress(DataError):
            warnings.simplefilter("ignore")
            assert decode_image(io.BytesIO(content), "photo.jpg").mode == "RGB"
            decoded += 1
    assert 0 < decoded < 200


def test_postscript_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(encoded(0, 0, "EPS"))
    with pytest.raises(DataError, match=r"photo\.jpg: it is PostScript, a program, which is not run"):
        open_image(tmp_path / "photo.jpg")


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "photo.jpg")
    with pytest.raises(DataError, match=r"photo\.jpg: it is a pipe, socket or device, not a regular file"):
        open_image(tmp_path / "photo.jpg")
