"""A PNG of rows of frames, each under a line of text, all under a title."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lamzoo.errors import DataError
from lamzoo.files import atomic_files
from lamzoo.report.mpl import check_target, new_figure

FRAMES = 6  # of a row, at most

_CELL = (192, 144)  # pixels, as all below
_GAP = 4
_MARGIN = 14
_TITLE = 40
_CAPTION = 26  # over each row
_WIDTH = FRAMES * _CELL[0] + (FRAMES - 1) * _GAP
_LETTERS = 110  # of a file name or query that fit beside one another
_DPI = 100
_GREY, _INK = (238, 238, 238), "#1b3a57"
# Tried in turn for letters that the previous ones lack, if installed.
_FONTS = (
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei", "PingFang SC",
    "Hiragino Sans", "Microsoft YaHei", "Malgun Gothic", "Noto Sans Arabic", "Noto Sans Devanagari", "Nirmala UI",
    "Arial Unicode MS",
)  # fmt: skip


def draw_rows(path: Path, title: str, rows: Iterable[tuple[str, Sequence[Image.Image]]], count: int) -> None:
    """Draws rows of frames into a PNG file.

    Args:
        path: the file to write, in a folder that exists; an older file is replaced.
        title: any text; what doesn't fit on the line is cut.
        rows: the line over each row, and its frames, the first :data:`FRAMES` of them; taken one after the other.
        count: how many rows there are.

    Raises:
        DataError: the file can't be written.
        MissingExtraError: matplotlib is not installed.
    """
    row = _CAPTION + _CELL[1] + _MARGIN
    width, height = _WIDTH + 2 * _MARGIN, _TITLE + count * row
    figure = new_figure((width / _DPI, height / _DPI), dpi=_DPI)
    figure.set_layout_engine("none")  # everything has its place
    fonts = _fonts()

    def write(text: str, top: int, size: float, weight: str = "normal") -> None:
        figure.text(
            _MARGIN / width, 1 - top / height, text, size=size, weight=weight, color=_INK, family=fonts,
            va="center", parse_math=False,
        )  # fmt: skip

    write(printable(title, start=True), _TITLE // 2, 13, "bold")
    for number, (caption, frames) in enumerate(rows):
        top = _TITLE + number * row
        write(caption, top + _CAPTION // 2, 9)
        figure.figimage(np.asarray(_beside(frames)), xo=_MARGIN, yo=height - top - _CAPTION - _CELL[1])
    with atomic_files(DataError) as stage, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Glyph|Matplotlib currently does not support)")  # boxes will do
        figure.savefig(stage(path), format="png")


def check_rows(path: str | Path, what: str) -> None:
    """Checks that rows can be drawn, and written, before any work.

    Args:
        path: the PNG file.
        what: name of the picture for errors.

    Raises:
        DataError: the name does not end in ``.png``, its folder does not exist, or it is a folder itself.
        MissingExtraError: matplotlib is not installed.
    """
    check_target(Path(path), what)
    new_figure((1, 1))


def printable(text: str | os.PathLike[str], *, start: bool = False) -> str:
    """Returns text that can be drawn on one line: of one too long the start, or the end, which names the file."""
    whole = " ".join(os.fsencode(text).decode("utf-8", "replace").split())
    whole = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in whole)
    if len(whole) <= _LETTERS:
        return whole
    return f"{whole[: _LETTERS - 1]}…" if start else f"…{whole[1 - _LETTERS :]}"


def clock(seconds: float) -> str:
    """Writes a time: ``9.5 s``, ``1:05`` or ``1:02:03``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _beside(frames: Sequence[Image.Image]) -> Image.Image:
    """Returns frames beside one another, whole, on grey."""
    strip = Image.new("RGB", (_WIDTH, _CELL[1]), "white")
    for column, frame in enumerate(frames[:FRAMES]):
        strip.paste(ImageOps.pad(frame, _CELL, color=_GREY), (column * (_CELL[0] + _GAP), 0))
    return strip


def _fonts() -> list[str]:
    from matplotlib.font_manager import fontManager

    installed = set(fontManager.get_font_names())
    return [font for font in _FONTS if font in installed]
