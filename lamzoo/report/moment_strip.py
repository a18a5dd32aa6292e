"""Preview strips of predicted moments: one row of frames per moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lamzoo.data.video.instants import Instants, middles
from lamzoo.data.video.reader import read_video
from lamzoo.errors import ConfigError
from lamzoo.report.frame_rows import FRAMES, check_rows, clock, draw_rows

MAX_ROWS = 10


@dataclass(frozen=True)
class Span:
    """A moment of a video.

    Attributes:
        start: seconds.
        end: seconds.
        score: confidence, 0 to 1.
    """

    start: float
    end: float
    score: float


def write_strip(path: str | Path, query: str, video: str | Path, spans: Sequence[Span]) -> None:
    """Writes a PNG file of the best moments of a video for a query.

    Each moment has a row of six frames, at the middles of its sixths, below its rank, score and times.

    Args:
        path: the PNG file, in an existing folder; an older file is replaced.
        query: the title.
        video: the file.
        spans: at least one span, the best first; the first :data:`MAX_ROWS` are drawn.

    Raises:
        ConfigError: there are no spans.
        DataError: the video can't be read, or the file can't be written.
        MissingExtraError: matplotlib or PyAV is not installed.
    """
    path, spans = Path(path), spans[:MAX_ROWS]
    check_rows(path, "preview strip")
    if not spans:
        raise ConfigError("a preview strip needs at least one span")
    wanted = [middles(span.start, span.end, FRAMES) for span in spans]
    # One pass through the file reads the frames of all spans, which may overlap.
    times = sorted({time for row in wanted for time in row})
    frames = dict(zip(times, read_video(video, Instants(at=tuple(times))).frames, strict=True))
    rows = (
        (_caption(rank, span), [frames[time] for time in row])
        for rank, (span, row) in enumerate(zip(spans, wanted, strict=True), start=1)
    )
    draw_rows(path, query, rows, len(spans))


def _caption(rank: int, span: Span) -> str:
    return f"{rank}    {span.score:.3f}    {clock(span.start)} – {clock(span.end)}"
