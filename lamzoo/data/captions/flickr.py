"""Flickr8k's photographs in patches, five captions each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from lamzoo.data.captions.base import CaptionItem, CaptionSource, Stream
from lamzoo.data.jpeg_archive import CaptionLines, JpegFiles
from lamzoo.errors import DataError

_SIDE, _PATCH = 128, 16  # pixels
_TIMES = ((np.arange((_SIDE // _PATCH) ** 2) + 0.5) / 25).astype(np.float32)


class Flickr8kCaptions(CaptionSource):
    """``captions.jsonl`` (``image``, ``captions``, ``split`` in each line) and ``images.npz``.

    The only modality is ``image``: the 64 patches of 16 x 16 pixels of a photograph of 128 x 128, in row-major order;
    the 768 values of a patch are its RGB pixels, in row-major order. The values of a photograph have mean 0 and
    variance 1. Times encode positions: the patches follow each other at 25 per second.

    Args:
        root: the folder.
        split: ``train``, ``validation`` or ``test``.

    Raises:
        DataError: there is no such folder, file or split, or the files are inconsistent.
    """

    def __init__(self, root: Path, split: str) -> None:
        listed = CaptionLines(root, {"image": str, "captions": list}, split)
        self._images = JpegFiles(listed, "images.npz")
        self.split = listed.split
        self.modalities = {"image": 3 * _PATCH**2}
        self.items = []
        for line in listed.lines:
            if not all(isinstance(caption, str) for caption in line["captions"]):
                raise DataError(f"the captions of {line['image']!r} in {root / 'captions.jsonl'} must all be strings")
            captions = tuple(caption.strip() for caption in line["captions"])
            self.items.append(CaptionItem(line["image"], line["image"], 0.0, len(_TIMES) / 25, captions))

    def sizes(self) -> list[int]:
        return self._images.sizes()

    def frames(self, index: int, count: int) -> list[Image.Image]:
        return [self._images.decode(index)]

    def streams(self, index: int) -> dict[str, Stream]:
        image = self._images.decode(index)
        if image.size != (_SIDE, _SIDE):
            image = image.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
        pixels = np.asarray(image, dtype=np.float32)
        pixels = (pixels - pixels.mean()) / max(float(pixels.std()), 1e-5)
        count = _SIDE // _PATCH
        patches = pixels.reshape(count, _PATCH, count, _PATCH, 3).swapaxes(1, 2).reshape(count**2, -1)
        return {"image": Stream(patches, _TIMES)}
