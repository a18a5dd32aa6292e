"""WebVTT: times, signs that mean something there, and order."""

import math
from pathlib import Path

import pytest

from lamzoo.errors import ConfigError, DataError
from lamzoo.video.webvtt import Cue, format_webvtt, write_webvtt


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (0.0, "00:00:00.000"),
        (1.0005, "00:00:01.000"),
        (59.9996, "00:01:00.000"),
        (3599.9999, "01:00:00.000"),
        (3723.045, "01:02:03.045"),
        (360_000.0, "100:00:00.000"),
    ],
)
def test_times_have_hours_and_milliseconds(seconds: float, written: str) -> None:
    assert f"\n{written} --> " in format_webvtt([Cue(seconds, seconds + 1, "a")])


def test_signs_of_webvtt_are_escaped_and_lines_joined() -> None:
    text = format_webvtt([Cue(0, 1, "a --> b\n\nc"), Cue(1, 2, "R&D <i>now</i> &amp;"), Cue(2, 3, " ")])
    assert text == (
        "WEBVTT\n"
        "\n00:00:00.000 --> 00:00:01.000\na --&gt; b c\n"
        "\n00:00:01.000 --> 00:00:02.000\nR&amp;D &lt;i&gt;now&lt;/i&gt; &amp;amp;\n"
    )
    assert format_webvtt([]) == "WEBVTT\n"


@pytest.mark.parametrize("times", [(2, 1), (1, 1.0001), (-1, 1), (0, math.inf), (math.nan, 1)])
def test_times_that_mean_nothing_are_refused(times: tuple[float, float]) -> None:
    with pytest.raises(ConfigError):
        format_webvtt([Cue(*times, "a")])


def test_cues_must_not_overlap() -> None:
    with pytest.raises(ConfigError, match="from 1.5 to 3 s can't follow one that ends at 2 s"):
        format_webvtt([Cue(0, 2, "a"), Cue(1.5, 3, "b")])


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_webvtt(tmp_path / "a.vtt", [Cue(0, 1, "где")])
    with pytest.raises(ConfigError):
        write_webvtt(tmp_path / "a.vtt", [Cue(0, 1, "b"), Cue(0, 1, "c")])
    assert (tmp_path / "a.vtt").read_text(encoding="utf-8").endswith("\nгде\n")
    for name in ("a.srt", "none/a.vtt"):
        with pytest.raises(DataError):
            write_webvtt(tmp_path / name, [])
    assert [path.name for path in tmp_path.iterdir()] == ["a.vtt"]
