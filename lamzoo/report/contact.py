"""A contact sheet of videos that answer a query: one row each, of frames spread over it; knows no model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from lamzoo.data.sampling import FrameSampling
from lamzoo.data.video import read_video
from lamzoo.errors import ConfigError, DataError
from lamzoo.files import atomic_files
from lamzoo.report.canvas import check_target, new_figure

if TYPE_CHECKING:
    from lamzoo.search import Match

MAX_ROWS = 20

_FRAMES = 6
_CELL = (192, 144)  # pixels, as all below
_GAP = 4
_MARGIN = 14
_TITLE = 40
_CAPTION = 26  # over each row
_WIDTH = _FRAMES * _CELL[0] + (_FRAMES - 1) * _GAP
_LETTERS = 110  # of a file name or query that fit beside one another
_DPI = 100
_GREY, _INK = (238, 238, 238), "#1b3a57"
# Tried in turn for the letters that those before have not, as far as they are installed.
_FONTS = (
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei", "PingFang SC",
    "Hiragino Sans", "Microsoft YaHei", "Malgun Gothic", "Noto Sans Arabic", "Noto Sans Devanagari", "Nirmala UI",
    "Arial Unicode MS",
)  # fmt: skip


def write_contact_sheet(path: str | Path, query: str, matches: Sequence[Match]) -> None:
    """Draws the best matches of a query into a PNG file.

    Each has a row of up to six frames, from its first to its last, under its rank, score, duration and file.

    Args:
        path: the PNG file to write, in a folder that exists; an older file is replaced.
        query: the title.
        matches: at least one, the best first; the first :data:`MAX_ROWS` are drawn.

    Raises:
        ConfigError: there is no match.
        DataError: a video can't be read, or the file can't be written there.
        MissingExtraError: matplotlib or PyAV is not installed.
    """
    path, matches = Path(path), matches[:MAX_ROWS]
    check_sheet(path)
    if not matches:
        raise ConfigError("a contact sheet needs one match or more")
    row = _CAPTION + _CELL[1] + _MARGIN
    width, height = _WIDTH + 2 * _MARGIN, _TITLE + len(matches) * row
    figure = new_figure((width / _DPI, height / _DPI), dpi=_DPI)
    figure.set_layout_engine("none")  # everything has its place
    fonts = _fonts()

    def write(text: str, top: int, size: float, weight: str = "normal") -> None:
        figure.text(
            _MARGIN / width, 1 - top / height, text, size=size, weight=weight, color=_INK, family=fonts,
            va="center", parse_math=False,
        )  # fmt: skip

    write(_printable(query, start=True), _TITLE // 2, 13, "bold")
    for rank, match in enumerate(matches, start=1):
        top = _TITLE + (rank - 1) * row
        facts = f"{rank}    {match.score:.3f}    {_clock(match.duration)}    {_printable(match.path)}"
        write(facts, top + _CAPTION // 2, 9)
        figure.figimage(np.asarray(_strip(match.path)), xo=_MARGIN, yo=height - top - _CAPTION - _CELL[1])
    with atomic_files(DataError) as stage, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Glyph|Matplotlib currently does not support)")  # boxes will do
        figure.savefig(stage(path), format="png")


def check_sheet(path: str | Path) -> None:
    """Checks that a contact sheet can be drawn, and written there, before the work.

    Raises:
        DataError: the name does not end in ``.png``, its folder does not exist, or it is a folder itself.
        MissingExtraError: matplotlib is not installed.
    """
    check_target(Path(path), "contact sheet")
    new_figure((1, 1))


def _strip(path: Path) -> Image.Image:
    """Returns frames of a video beside one another, whole, on grey."""
    strip = Image.new("RGB", (_WIDTH, _CELL[1]), "white")
    clip = read_video(path, FrameSampling(fps=None, max_frames=_FRAMES, slicing="uniform"))
    for column, frame in enumerate(clip.frames):
        strip.paste(ImageOps.pad(frame, _CELL, color=_GREY), (column * (_CELL[0] + _GAP), 0))
    return strip


def _fonts() -> list[str]:
    from matplotlib.font_manager import fontManager

    installed = set(fontManager.get_font_names())
    return [font for font in _FONTS if font in installed]


def _printable(text: str | os.PathLike[str], *, start: bool = False) -> str:
    """Returns text that can be drawn on one line: of one too long the start, or the end, which names the file."""
    whole = " ".join(os.fsencode(text).decode("utf-8", "replace").split())
    whole = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in whole)
    if len(whole) <= _LETTERS:
        return whole
    return f"{whole[: _LETTERS - 1]}…" if start else f"…{whole[1 - _LETTERS :]}"


def _clock(seconds: float) -> str:
    """Writes a duration: ``9.5 s``, ``1:05`` or ``1:02:03``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
