"""Contact sheets of video search results: one row of frames per video."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from lamzoo.data.video.reader import read_video
from lamzoo.data.video.sampling import FrameSampling
from lamzoo.errors import ConfigError
from lamzoo.report.frame_rows import FRAMES, check_rows, clock, draw_rows, one_line

if TYPE_CHECKING:
    from lamzoo.video.search import Match

MAX_ROWS = 20


def write_contact_sheet(path: str | Path, query: str, matches: Sequence[Match]) -> None:
    """Writes a PNG file of the best matches of a query.

    Each match has a row of up to six evenly spaced frames below its rank, score, duration and file name.

    Args:
        path: the PNG file, in an existing folder; an older file is replaced.
        query: the title.
        matches: at least one match, the best first; the first :data:`MAX_ROWS` are drawn.

    Raises:
        ConfigError: there are no matches.
        DataError: a video can't be read, or the file can't be written.
        MissingExtraError: matplotlib or PyAV is not installed.
    """
    path, matches = Path(path), matches[:MAX_ROWS]
    check_rows(path, "contact sheet")
    if not matches:
        raise ConfigError("a contact sheet needs at least one match")
    rows = ((_caption(rank, match), _frames(match.path)) for rank, match in enumerate(matches, start=1))
    draw_rows(path, query, rows, len(matches))


def _caption(rank: int, match: Match) -> str:
    return f"{rank}    {match.score:.3f}    {clock(match.duration)}    {one_line(match.path)}"


def _frames(path: Path) -> Sequence[Image.Image]:
    return read_video(path, FrameSampling(fps=None, max_frames=FRAMES, slicing="uniform")).frames
