"""Lays out masks and a photograph in one matplotlib figure, without pyplot and its global state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lamzoo.report.mpl import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = "RdBu_r"
_CELL = 1.3  # inches
_LEAST_RANGE = 0.05  # half width of a colour scale: a mask nearer to neutral than 5 % stays pale


@dataclass(frozen=True)
class LayerPicture:
    """What is drawn of one layer, for queries and keys on a patch grid of ``rows x columns``.

    Attributes:
        name: heads the column.
        importance: ``(rows, columns)``, float.
        queries: ``(row, column)`` of each query patch.
        rows: the mask's values for these queries, ``(len(queries), rows, columns)``, float.
    """

    name: str
    importance: NDArray[np.float32]
    queries: tuple[tuple[int, int], ...]
    rows: NDArray[np.float32]


def draw(
    layers: list[LayerPicture], seen: NDArray[np.float32], sharp: NDArray[np.float32], *, neutral: float, title: str
) -> Figure:
    """Draws one column a layer: its importance over the image, and below it the mask's rows.

    Importances and rows have a colour scale each, shared by all layers and symmetric about ``neutral``.

    Args:
        layers: at least one, all with the same queries and grid.
        seen: the image as the model gets it, ``(H, W, 3)``, 0 to 1.
        sharp: the same at a higher resolution.
        neutral: the mask value that changes nothing.
        title: over the whole figure.

    Returns:
        The figure, drawn by Agg.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    queries = layers[0].queries
    height = _CELL * seen.shape[0] / seen.shape[1]
    columns, lines = 1 + len(layers), 1 + len(queries)
    size = (max(9.0, _CELL * columns + 1.4), (height + 0.22) * lines + 1.0)
    figure = new_figure(size, dpi=110, layout="compressed")
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    grid = layers[0].importance.shape
    _photograph(axes[0, 0], sharp, "photograph", queries, grid)
    axes[0, 0].set_ylabel("importance", fontsize=7)
    for line, query in enumerate(queries, start=1):
        _photograph(axes[line, 0], seen, "", (query,), grid)
        axes[line, 0].set_ylabel(f"M[i, :]\ni = {query[0]}, {query[1]}", fontsize=7)

    # Pale, so that a dark part of the photograph is not taken for a deep colour of the mask.
    grey = 0.4 + 0.6 * np.repeat(seen.mean(axis=2, keepdims=True), 3, axis=2)
    scale = colour_scale([layer.importance for layer in layers], neutral)
    for axis, layer in zip(axes[0, 1:], layers, strict=True):
        axis.imshow(grey, extent=_extent(grid), interpolation="nearest")
        heat = _heat(axis, layer.importance, scale, alpha=0.7)
        axis.set_title(layer.name, fontsize=8)
    _colour_bar(figure, heat, axes[:1, :], "importance")

    if queries:
        scale = colour_scale([layer.rows for layer in layers], neutral)
        for column, layer in enumerate(layers, start=1):
            for axis, values, query in zip(axes[1:, column], layer.rows, queries, strict=True):
                heat = _heat(axis, values, scale)
                _outline(axis, query)
        _colour_bar(figure, heat, axes[1:, :], "M[i, j]")
    patch_shape = (seen.shape[0] / grid[0]) / (seen.shape[1] / grid[1])
    for axis in axes.flat:
        axis.set_aspect(patch_shape)
    return figure


def colour_scale(values: list[NDArray[np.float32]], neutral: float) -> tuple[float, float]:
    """Returns the lowest and the highest value of a colour scale around the neutral one."""
    # The outermost percent may saturate, so that one patch can't wash out all others; the figures say how far it went.
    distance = np.abs(np.concatenate([value.ravel() for value in values]) - neutral)
    half = max(_LEAST_RANGE, float(np.quantile(distance, 0.99)))
    return neutral - half, neutral + half


def _heat(axis: Any, values: NDArray[np.float32], scale: tuple[float, float], alpha: float = 1.0) -> Any:
    heat = axis.imshow(
        values,
        cmap=COLOURS,
        vmin=scale[0],
        vmax=scale[1],
        alpha=alpha,
        extent=_extent(values.shape),
        interpolation="nearest",
    )
    axis.set_xlabel(f"{values.min():.3g} to {values.max():.3g}", fontsize=6, labelpad=2)
    return heat


def _photograph(
    axis: Any, image: NDArray[np.float32], name: str, queries: tuple[tuple[int, int], ...], grid: tuple[int, ...]
) -> None:
    axis.imshow(image, extent=_extent(grid), interpolation="nearest")
    axis.set_title(name, fontsize=8)
    for query in queries:
        _outline(axis, query)


def _outline(axis: Any, query: tuple[int, int]) -> None:
    from matplotlib.patches import Rectangle

    for colour, width in (("black", 2.4), ("yellow", 1.2)):
        axis.add_patch(Rectangle((query[1], query[0]), 1, 1, fill=False, edgecolor=colour, linewidth=width))


def _extent(grid: tuple[int, ...]) -> tuple[float, float, float, float]:
    return 0, grid[1], grid[0], 0  # one unit a patch, the first row at the top


def _colour_bar(figure: Figure, heat: Any, axes: Any, label: str) -> None:
    lines = axes.shape[0]
    bar = figure.colorbar(
        heat, ax=axes.ravel().tolist(), extend="both", extendfrac=0.08 / lines, aspect=12 * lines, pad=0.01
    )
    bar.set_label(label, fontsize=7)
    bar.ax.tick_params(labelsize=7)
