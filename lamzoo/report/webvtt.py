"""WebVTT, the subtitles of the web: sentences with their times as a file that players read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lamzoo.errors import ConfigError, DataError
from lamzoo.files import atomic_files


@dataclass(frozen=True)
class Cue:
    """A text and when it is shown.

    Attributes:
        start: seconds.
        end: likewise, behind the start.
        text: on one line, whatever line breaks it has.
    """

    start: float
    end: float
    text: str


def write_webvtt(path: str | Path, cues: Sequence[Cue]) -> None:
    """Writes cues into a file, all of them or nothing; those without text are left out, since they would show none.

    Args:
        path: the file, in a folder that exists; an older one is replaced.
        cues: in their order, none beginning before the one in front of it ends.

    Raises:
        ConfigError: a cue ends before it starts, or overlaps another, in milliseconds.
        DataError: the file can't be written.
    """
    check_webvtt(path)
    text = format_webvtt(cues)
    with atomic_files(DataError) as stage:
        stage(Path(path)).write_text(text, encoding="utf-8", newline="\n")


def format_webvtt(cues: Sequence[Cue]) -> str:
    """Returns the text of the file that :func:`write_webvtt` writes, with its errors."""
    blocks, before = ["WEBVTT\n"], 0
    for cue in cues:
        start, end = _milliseconds(cue.start), _milliseconds(cue.end)
        if not before <= start < end:
            raise ConfigError(
                f"the cue from {cue.start:g} to {cue.end:g} s can't follow one that ends at {before / 1000:g} s; "
                "cues must be in order, apart from each other, and of a millisecond or more"
            )
        before = end
        line = " ".join(cue.text.split())
        if line:
            blocks.append(f"{_stamp(start)} --> {_stamp(end)}\n{_escaped(line)}\n")
    return "\n".join(blocks)


def check_webvtt(path: str | Path) -> None:
    """Checks that such a file can be written to a path, before any work.

    Raises:
        DataError: the name does not end in ``.vtt``, its folder does not exist, or it is a folder itself.
    """
    path = Path(path)
    if path.suffix.lower() != ".vtt":
        raise DataError(f"The subtitles {path} would be WebVTT; give them a name that ends in .vtt.")
    if not path.absolute().parent.is_dir():
        raise DataError(f"The folder {path.parent} of the subtitles does not exist; make it first.")
    if path.is_dir():
        raise DataError(f"The subtitles can't be written over the folder {path}; choose another name.")


def timestamp(seconds: float) -> str:
    """Writes a time as WebVTT does: ``00:01:02.345``, or ``100:00:00.000``."""
    return _stamp(_milliseconds(seconds))


def _milliseconds(seconds: float) -> int:
    if not 0 <= seconds < math.inf:
        raise ConfigError(f"{seconds} s is no time of a cue; it must be a number of at least 0")
    return round(seconds * 1000)


def _stamp(milliseconds: int) -> str:
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}.{rest % 1000:03}"


def _escaped(line: str) -> str:
    """Writes the signs that would begin tags and entities as entities; no arrow is left, which would be a cue's."""
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
