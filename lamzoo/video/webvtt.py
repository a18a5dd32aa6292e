"""WebVTT subtitles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lamzoo.errors import ConfigError, DataError
from lamzoo.escaping import printable
from lamzoo.files import atomic_files, check_target


@dataclass(frozen=True)
class Cue:
    """A subtitle.

    Attributes:
        start: seconds.
        end: seconds, after the start.
        text: the text; line breaks become spaces.
    """

    start: float
    end: float
    text: str


def write_webvtt(path: str | Path, cues: Sequence[Cue]) -> None:
    """Writes cues to a file, atomically; cues without text are omitted.

    Args:
        path: the file, in an existing folder; an older file is replaced.
        cues: the cues in order, without overlap.

    Raises:
        ConfigError: a cue ends before it starts, or overlaps another, in milliseconds.
        DataError: the file can't be written.
    """
    check_webvtt(path)
    text = format_webvtt(cues)
    with atomic_files(DataError) as stage:
        stage(Path(path)).write_text(text, encoding="utf-8", newline="\n")


def format_webvtt(cues: Sequence[Cue]) -> str:
    """Formats cues as WebVTT; arguments and errors as for :func:`write_webvtt`."""
    blocks, before = ["WEBVTT\n"], 0
    for cue in cues:
        start, end = _milliseconds(cue.start), _milliseconds(cue.end)
        if not before <= start < end:
            raise ConfigError(
                f"the cue from {cue.start:g} to {cue.end:g} s can't follow one that ends at {before / 1000:g} s; "
                "cues must be in order, without overlap, and at least a millisecond long"
            )
        before = end
        line = " ".join(cue.text.split())
        if line:
            blocks.append(f"{_stamp(start)} --> {_stamp(end)}\n{_escaped(line)}\n")
    return "\n".join(blocks)


def check_webvtt(path: str | Path) -> None:
    """Checks in advance that a WebVTT file can be written.

    Raises:
        DataError: the name does not end in ``.vtt``, its folder does not exist, or it is a folder itself.
    """
    check_target(Path(path), "file of subtitles", suffix=".vtt")


def _milliseconds(seconds: float) -> int:
    if not 0 <= seconds < math.inf:
        raise ConfigError(f"{seconds} s is not a valid cue time; it must be a number of at least 0")
    return round(seconds * 1000)


def _stamp(milliseconds: int) -> str:
    """Formats a time as in WebVTT: ``00:01:02.345``, or ``100:00:00.000``."""
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}.{rest % 1000:03}"


def _escaped(line: str) -> str:
    """Escapes the characters that begin tags and entities, and with them arrows, which would begin a cue."""
    return printable(line).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
