"""Clips and pictures as JPEG files in one npz archive, with one line of captions.jsonl each."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lamzoo.data.arrays import check_packed, read_npz
from lamzoo.data.images.decode import decode_image
from lamzoo.data.json_files import check_fields, is_row, read_json_lines
from lamzoo.data.paths import check_folder, file_exists
from lamzoo.data.splits import find_split
from lamzoo.errors import DataError

_MOST_FRAMES = 10**6  # of a clip
_LONGEST = 24 * 3600.0  # seconds of a clip


class CaptionLines:
    """The lines of ``captions.jsonl`` of one split.

    Args:
        root: the folder of the file.
        fields: required fields of each line besides ``split``, with their types.
        split: value of ``split``.

    Attributes:
        root: the folder of the file.
        split: name of the split in the data.
        lines: the lines of the split, in order.
        numbers: their indices among all lines.
        every: the lines of all splits.

    Raises:
        DataError: there is no such folder, file or split, a line lacks a field, or its ``words`` are not words with
            times.
    """

    def __init__(self, root: Path, fields: Mapping[str, type], split: str) -> None:
        check_folder(root)
        self.root = root
        captions = root / "captions.jsonl"
        self.every: list[dict[str, Any]] = []
        for line, where in read_json_lines(captions):
            check_fields(line, {"split": str, **fields}, where)
            if "n_frames" in fields and not 0 < line["n_frames"] <= _MOST_FRAMES:
                raise DataError(f"{where} has {line['n_frames']} n_frames; there must be 1 to {_MOST_FRAMES}")
            _check_words(line.get("words", []) if "words" in fields else [], where)
            self.every.append(line)
        self.split = find_split(split, dict.fromkeys(line["split"] for line in self.every), str(captions))
        self.numbers = [number for number, line in enumerate(self.every) if line["split"] == self.split]
        self.lines = [self.every[number] for number in self.numbers]


class JpegFiles:
    """The JPEG files of the lines of one split, which stay encoded in memory.

    Args:
        captions: the lines.
        archive: name of the archive in their folder: an npz with ``jpeg`` (uint8, the concatenated files) and
            ``offsets`` (integers, N + 1); file i belongs to line i of all splits.

    Raises:
        DataError: there is no such file, or it doesn't match the lines.
    """

    def __init__(self, captions: CaptionLines, archive: str) -> None:
        self._path, self._numbers = captions.root / archive, captions.numbers
        self._files = _read_jpegs(self._path, len(captions.every), captions.numbers)

    def decode(self, index: int) -> Image.Image:
        """Returns an RGB image of the split.

        Raises:
            DataError: the image is damaged; names it.
        """
        return decode_image(io.BytesIO(self._files[index]), self.name(index))

    def sizes(self) -> list[int]:
        """Returns the size of each file in bytes."""
        return [len(file) for file in self._files]

    def name(self, index: int) -> str:
        """Returns the place of an image in the archive."""
        return f"{self._path}[{self._numbers[index]}]"


def _check_words(words: list[Any], where: str) -> None:
    for word in words:
        whole = isinstance(word, list) and len(word) == 3 and isinstance(word[0], str) and is_row(word[1:])
        if not whole or not 0 <= word[1] <= word[2] <= _LONGEST:
            raise DataError(f"{where} has the word {word!r:.60}; it must be a string, its start and its end in seconds")


def _read_jpegs(path: Path, count: int, wanted: Sequence[int]) -> list[bytes]:
    if not file_exists(path):
        raise DataError(f"{path.parent} has no {path.name}")
    jpeg, offsets = read_npz(path, ("jpeg", "offsets")).values()
    check_packed(path, jpeg, offsets, count, "lines of captions.jsonl")
    return [jpeg[offsets[number] : offsets[number + 1]].tobytes() for number in wanted]
