"""Figures of masks over a photograph with matplotlib, without pyplot and its global state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lamzoo.errors import ConfigError
from lamzoo.escaping import printable
from lamzoo.report.mpl import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = "RdBu_r"
_CELL = 1.3  # inches
_LEAST_RANGE = 0.05  # minimum half width of a colour scale, so that masks within 5 % of neutral stay pale


@dataclass(frozen=True)
class LayerPicture:
    """The mask of one layer, on a patch grid of ``rows x columns``.

    Attributes:
        name: heading of the column.
        importance: ``(rows, columns)``, float.
        queries: ``(row, column)`` of each query patch.
        rows: mask values for these queries, ``(len(queries), rows, columns)``, float.
    """

    name: str
    importance: NDArray[np.float32]
    queries: tuple[tuple[int, int], ...]
    rows: NDArray[np.float32]


def draw(
    layers: list[LayerPicture], seen: NDArray[np.float32], sharp: NDArray[np.float32], *, neutral: float, title: str
) -> Figure:
    """Draws one column per layer: its importance over the image, and rows of the mask below.

    Importances and rows have one colour scale each, shared by all layers and symmetric about ``neutral``.

    Args:
        layers: at least one, all with the same queries and grid.
        seen: the image at the input size of the model, ``(H, W, 3)``, 0 to 1.
        sharp: the same at a higher resolution.
        neutral: mask value that leaves the scores unchanged.
        title: title of the figure.

    Returns:
        The figure, with an Agg canvas.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    queries = layers[0].queries
    height = _CELL * seen.shape[0] / seen.shape[1]
    columns, lines = 1 + len(layers), 1 + len(queries)
    size = (max(9.0, _CELL * columns + 1.4), (height + 0.22) * lines + 1.0)
    figure = new_figure(size, dpi=110, layout="compressed")
    figure.suptitle(printable(title, keep="\n"), fontsize=9, parse_math=False)
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

    # Pale, so that dark parts of the photograph are not confused with colours of the mask.
    grey = 0.4 + 0.6 * np.repeat(seen.mean(axis=2, keepdims=True), 3, axis=2)
    scale = colour_scale([layer.importance for layer in layers], neutral)
    for axis, layer in zip(axes[0, 1:], layers, strict=True):
        axis.imshow(grey, extent=_extent(grid), interpolation="nearest")
        heat = _heat(axis, layer.importance, scale, alpha=0.7)
        axis.set_title(printable(layer.name, keep="\n"), fontsize=8, parse_math=False)
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
    """Returns the limits of a colour scale that is symmetric about the neutral value.

    Raises:
        ConfigError: a value is not finite.
    """
    # The outermost percent may saturate, so that one patch can't wash out all others; axis labels give the full range.
    distance = np.abs(np.concatenate([value.ravel() for value in values]) - neutral)
    if not np.isfinite(distance).all():
        raise ConfigError("the model's masks are not finite; check the weights")
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
    return 0, grid[1], grid[0], 0  # one unit per patch, the first row at the top


def _colour_bar(figure: Figure, heat: Any, axes: Any, label: str) -> None:
    lines = axes.shape[0]
    bar = figure.colorbar(
        heat, ax=axes.ravel().tolist(), extend="both", extendfrac=0.08 / lines, aspect=12 * lines, pad=0.01
    )
    bar.set_label(label, fontsize=7)
    bar.ax.tick_params(labelsize=7)
