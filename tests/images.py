"""Small images of plain colours, in the layouts that the data sets are read from."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (20, 30, 220), "green": (20, 200, 40), "red": (220, 20, 30)}
CLASSES = list(COLOURS)


def image(label: int, number: int, size: int = 32) -> Image.Image:
    noise = np.random.default_rng((label, number)).integers(-20, 20, (size, size, 3))
    pixels = np.clip(np.array(COLOURS[CLASSES[label]]) + noise, 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(label: int, number: int, format: str = "JPEG") -> bytes:
    file = io.BytesIO()
    image(label, number).save(file, format)
    return file.getvalue()


def sideways(orientation: int, format: str = "jpg") -> bytes:
    """A photograph 10 pixels wide and 20 high, white above black, as a camera held in one of EXIF's ways stores it."""
    upright = np.zeros((20, 10, 3), np.uint8)
    upright[:10] = 255
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.swapaxes(0, 1),
        6: np.rot90(upright), 7: upright[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(upright, 3),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    kind = {"jpg": "JPEG", "tif": "TIFF"}.get(format, format.upper())
    Image.fromarray(np.ascontiguousarray(stored)).save(file, kind, exif=exif)
    return file.getvalue()


def write_folder(root: Path, splits: tuple[str, ...] = ("train", "val"), each: int = 3) -> Path:
    """``root/<split>/<class>/<number>.jpg``; without splits ``root/<class>/<number>.jpg``."""
    for offset, folder in enumerate([root / split for split in splits] or [root]):
        for label, name in enumerate(CLASSES):
            (folder / name).mkdir(parents=True)
            for number in range(each):
                (folder / name / f"{number}.jpg").write_bytes(encoded(label, 100 * offset + number))
    return root


def write_npz(root: Path, split: str = "test", each: int = 3, **arrays: object) -> Path:
    """``root/<split>.npz`` and ``root/classes.json``; keyword arguments replace an array, None drops it."""
    root.mkdir(parents=True, exist_ok=True)
    labels = [label for label in range(len(CLASSES)) for _ in range(each)]
    files = [encoded(label, number) for number, label in enumerate(labels)]
    content = {
        "jpeg": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.cumsum([0, *map(len, files)], dtype=np.int64),
        "labels": np.array(labels, np.int16),
        **arrays,
    }
    np.savez(root / f"{split}.npz", **{key: value for key, value in content.items() if value is not None})
    (root / "classes.json").write_text(json.dumps(CLASSES))
    return root
