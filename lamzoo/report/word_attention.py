"""Figures of masks and word attention over time with matplotlib, without pyplot."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lamzoo.escaping import printable
from lamzoo.report.frame_rows import clock
from lamzoo.report.mask_figure import colour_scale
from lamzoo.report.mpl import new_figure
from lamzoo.report.timeline import draw_colour_bar, draw_strip, name_panel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_WORDS = 14  # maximum words per window

_WIDTH, _STRIP, _WORD, _HEAD = 8.0, 0.5, 0.16, 0.24  # inches
_LINE = 96  # characters per line of a heading
_LETTERS = 16  # maximum characters of a word
_ATTENTION = "Purples"


@dataclass(frozen=True)
class ModalityView:
    """Masks and attention of one modality of a window.

    Attributes:
        name: name of the modality.
        times: ``(N,)``, ascending: the middles of its tokens, seconds in the video.
        importance: ``(N,)``, mean mask value of each token; None without masks.
        attention: ``(W, N)``, attention of each word to each token, 0 to 1.
    """

    name: str
    times: NDArray[np.float32]
    importance: NDArray[np.float32] | None
    attention: NDArray[np.float32]


@dataclass(frozen=True)
class WindowView:
    """Words, masks and attention of one window.

    Attributes:
        start: seconds in the video.
        end: likewise.
        words: the words of its sentence.
        modalities: at least one.
    """

    start: float
    end: float
    words: tuple[str, ...]
    modalities: tuple[ModalityView, ...]


def draw_windows(windows: Sequence[WindowView], *, neutral: float, title: str) -> Figure:
    """Draws windows below each other, each with panels of the importance and word attention of every modality.

    All panels of a window share its time axis. Importances have one colour scale for the whole figure, symmetric about
    ``neutral``; word attention has one per panel, from white (zero) to dark (its maximum).

    Args:
        windows: at least one.
        neutral: mask value that leaves the scores unchanged.
        title: title of the figure.

    Returns:
        The figure, with an Agg canvas.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    heights = []
    for window in windows:
        rows = min(len(window.words), MAX_WORDS) * _WORD
        for view in window.modalities:
            heights += [_STRIP] * (view.importance is not None) + [rows] * bool(rows)
    above = 0.15 * (title.count("\n") + 1)
    heads = sum(_HEAD * (1 + _heading(window).count("\n")) + 0.3 for window in windows)
    figure = new_figure((_WIDTH, sum(heights) + 0.08 * len(heights) + heads + above + 0.2))
    figure.suptitle(printable(title, keep="\n"), fontsize=9, parse_math=False)  # dollar signs are literal
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    masks = [view.importance for window in windows for view in window.modalities if view.importance is not None]
    scale = colour_scale(masks, neutral) if masks else (neutral - 1, neutral + 1)
    axes: list[Any] = []
    first: list[Any] = []
    strips: list[Any] = []
    for window in windows:
        block: list[Any] = []
        for view in window.modalities:
            if view.importance is not None:
                strips.append(figure.add_subplot(grid[len(axes) + len(block), 0]))
                block.append(strips[-1])
                draw_strip(strips[-1], view.importance, _edges(view.times), neutral, scale)
                name_panel(strips[-1], f"{view.name}\nimportance")
            if window.words:
                block.append(figure.add_subplot(grid[len(axes) + len(block), 0]))
                _words(block[-1], window.words, view)
        for axis in block:
            _over_time(axis, window, is_last=axis is block[-1])
        if block:
            block[0].set_title(_heading(window), fontsize=8, loc="left", pad=4, parse_math=False)
        axes += block
        if not first:
            first = block
    if strips:
        draw_colour_bar(figure, scale, first)  # the first window only, to limit the height of the bar
    figure.align_ylabels(axes)
    return figure


def _heading(window: WindowView) -> str:
    sentence = textwrap.wrap(" ".join(window.words), _LINE, max_lines=2, placeholder=" …")
    lines = [f"{clock(window.start)} – {clock(window.end)}", *sentence]
    if len(window.words) > MAX_WORDS:
        lines.append(f"(the first {MAX_WORDS} of its {len(window.words)} words)")
    return "\n".join(lines)


def _words(axis: Any, words: Sequence[str], view: ModalityView) -> None:
    shown = [word if len(word) <= _LETTERS else f"{word[: _LETTERS - 1]}…" for word in words[:MAX_WORDS]]
    attention = view.attention[: len(shown)]
    edges = _edges(view.times)
    axis.imshow(
        attention,
        cmap=_ATTENTION,
        vmin=0,
        vmax=max(float(attention.max()), 1e-9),
        extent=(edges[0], edges[-1], len(shown) - 0.5, -0.5),
        aspect="auto",
    )
    for label in axis.set_yticks(range(len(shown)), shown):
        label.label1.set_parse_math(False)
    for row, share in enumerate(attention.sum(axis=1)):
        axis.text(1.01, row, f"{share:.0%}", transform=axis.get_yaxis_transform(), fontsize=7, va="center")
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    name_panel(axis, f"{view.name}\nwords")


def _over_time(axis: Any, window: WindowView, *, is_last: bool) -> None:
    axis.set_xlim(window.start, window.end)
    axis.tick_params(axis="both", labelsize=7, labelbottom=is_last)
    axis.spines[["top", "right"]].set_visible(False)
    axis.yaxis.labelpad = 8  # distance from the words
    if is_last:
        axis.set_xlabel("time (s)", fontsize=8, labelpad=2)


def _edges(times: NDArray[np.float32]) -> NDArray[np.float64]:
    """Returns the boundaries of the tokens: halfway between the middles of neighbours."""
    middles = times.astype(np.float64)
    if len(middles) == 1:
        return np.array([middles[0] - 0.5, middles[0] + 0.5])
    between = (middles[1:] + middles[:-1]) / 2
    return np.concatenate([[2 * middles[0] - between[0]], between, [2 * middles[-1] - between[-1]]])
