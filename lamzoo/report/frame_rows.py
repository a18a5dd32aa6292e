"""PNG files of captioned rows of frames."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lamzoo.escaping import printable
from lamzoo.files import check_target
from lamzoo.report.mpl import new_figure, write_figure

FRAMES = 6  # maximum frames per row

_CELL = (192, 144)  # pixels, like the sizes below
_GAP = 4
_MARGIN = 14
_TITLE = 40
_CAPTION = 26  # height of the caption of a row
_WIDTH = FRAMES * _CELL[0] + (FRAMES - 1) * _GAP
_LETTERS = 110  # maximum characters of a line
_DPI = 100
_GREY, _INK = (238, 238, 238), "#1b3a57"
# Fallback fonts, in order, for characters that the previous ones lack; only installed ones are used.
_FONTS = (
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei", "PingFang SC",
    "Hiragino Sans", "Microsoft YaHei", "Malgun Gothic", "Noto Sans Arabic", "Noto Sans Devanagari", "Nirmala UI",
    "Arial Unicode MS",
)  # fmt: skip


def draw_rows(path: Path, title: str, rows: Iterable[tuple[str, Sequence[Image.Image]]], count: int) -> None:
    """Writes a PNG file of rows of frames.

    Args:
        path: the file, in an existing folder; an older file is replaced.
        title: title of the figure, truncated to one line.
        rows: caption and frames of each row, of which the first :data:`FRAMES` are drawn; consumed one by one.
        count: number of rows.

    Raises:
        DataError: the file can't be written.
        MissingExtraError: matplotlib is not installed.
    """
    row = _CAPTION + _CELL[1] + _MARGIN
    width, height = _WIDTH + 2 * _MARGIN, _TITLE + count * row
    figure = new_figure((width / _DPI, height / _DPI), dpi=_DPI)
    figure.set_layout_engine("none")  # positions are computed here
    fonts = _fonts()

    def write(text: str, top: int, size: float, weight: str = "normal") -> None:
        figure.text(
            _MARGIN / width, 1 - top / height, text, size=size, weight=weight, color=_INK, family=fonts,
            va="center", parse_math=False,
        )  # fmt: skip

    write(one_line(title, start=True), _TITLE // 2, 13, "bold")
    for number, (caption, frames) in enumerate(rows):
        top = _TITLE + number * row
        write(caption, top + _CAPTION // 2, 9)
        figure.figimage(np.asarray(_beside(frames)), xo=_MARGIN, yo=height - top - _CAPTION - _CELL[1])
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="(Glyph|Matplotlib currently does not support)"
        )  # missing glyphs are drawn as boxes
        write_figure(figure, path)


def check_rows(path: str | Path, what: str) -> None:
    """Checks in advance that rows can be drawn and written.

    Args:
        path: the PNG file.
        what: name of the picture in messages.

    Raises:
        DataError: the name does not end in ``.png``, its folder does not exist, or it is a folder itself.
        MissingExtraError: matplotlib is not installed.
    """
    check_target(Path(path), what, suffix=".png")
    new_figure((1, 1))


def one_line(text: str | os.PathLike[str], *, start: bool = False) -> str:
    """Returns text for one line; a long text is truncated to its start or, as for file names, to its end."""
    whole = printable(" ".join(os.fsencode(text).decode("utf-8", "replace").split()))
    if len(whole) <= _LETTERS:
        return whole
    return f"{whole[: _LETTERS - 1]}…" if start else f"…{whole[1 - _LETTERS :]}"


def clock(seconds: float) -> str:
    """Formats a time: ``9.5 s``, ``1:05`` or ``1:02:03``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _beside(frames: Sequence[Image.Image]) -> Image.Image:
    """Returns an image of whole frames side by side on grey."""
    strip = Image.new("RGB", (_WIDTH, _CELL[1]), "white")
    for column, frame in enumerate(frames[:FRAMES]):
        strip.paste(ImageOps.pad(frame, _CELL, color=_GREY), (column * (_CELL[0] + _GAP), 0))
    return strip


def _fonts() -> list[str]:
    from matplotlib.font_manager import fontManager

    installed = set(fontManager.get_font_names())
    return [font for font in _FONTS if font in installed]
