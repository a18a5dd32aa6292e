"""Compact figures of masks and attention for papers, as vector graphics or into any matplotlib axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from lamzoo.adapters.capture import capture_masks
from lamzoo.adapters.hosts import token_layout
from lamzoo.adapters.state import masks_of
from lamzoo.adapters.wrappers import unwrap
from lamzoo.data.moments import MomentDataset
from lamzoo.errors import ConfigError, DataError, UnsupportedHostError
from lamzoo.escaping import printable
from lamzoo.evaluation.moments.evaluate import find_moments
from lamzoo.files import check_target
from lamzoo.lam import MaskRecord
from lamzoo.lam.ops import OPS
from lamzoo.profiling.inputs import evaluating
from lamzoo.report.explorer.queries import MomentTokens
from lamzoo.report.mask_figure import COLOURS, colour_scale
from lamzoo.report.mask_pictures import run_all_queries
from lamzoo.report.model_view import view
from lamzoo.report.moment_pictures import index_of
from lamzoo.report.mpl import Format, new_figure, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Show = Literal["mask", "attention", "plain", "difference"]

#: Formats of a figure, by the suffix of its file.
FORMATS: tuple[Format, ...] = get_args(Format)

_COLUMN = 3.3  # inches, of a two-column page
_FONT, _SMALL = 7, 6  # points
_MAPS = 5  # layers in a figure of an image
_FEW_LINES = 6  # which are too low for a colour bar beside them
_DPI = 300
_NAMES: dict[Show, str] = {
    "mask": "M",
    "attention": "attention",
    "plain": "attention without mask",
    "difference": "attention, with − without",
}


def figure(
    masks: Mapping[str, MaskRecord],
    axis: Axes | None = None,
    *,
    show: Show = "mask",
    layer: str | int | None = None,
    head: int | None = None,
    query: int | None = None,
    grid: tuple[int, int] | None = None,
    labels: Sequence[str] | None = None,
    limits: tuple[float, float] | None = None,
    bar: bool = True,
) -> Figure:
    """Draws masks or attention of the first sample, in the size of print, into a matplotlib axis.

    With ``grid`` it is a map of one layer over the patches; without it, the matrix ``(queries, keys)`` of one layer;
    and without ``layer`` either, one line for each layer. Maps and lines are the mean over the queries, for masks the
    importance ``mean_i M_ij``, or those of one query. Tokens that have been merged have the values of the token that
    they are part of, pruned ones are grey.

    Args:
        masks: as captured by :func:`lamzoo.capture_masks`.
        axis: the axis; None for a new figure of one column's width, 3.3 inches.
        show: the mask M, the attention with it or without it (``"plain"``), or the difference of the two.
        layer: path or index of a layer; with ``grid``, the last one by default.
        head: one head; the mean over the heads by default.
        query: index of a query token, of the stack's input.
        grid: ``(rows, columns)`` of the patches, which are the last tokens.
        labels: text of each key token.
        limits: of the colours; by default symmetric about the neutral value, or from 0 for attention.
        bar: whether to draw a colour bar.

    Returns:
        The figure of the axis.

    Raises:
        ConfigError: there are no masks, no such layer, head, query or grid, or the layers have different numbers of
            keys, which one line for each can't show; or values are not finite.
        MissingExtraError: matplotlib is not installed.
    """
    if show not in _NAMES:
        raise ConfigError(f"show is {show!r}; it must be one of {', '.join(map(repr, _NAMES))}.")
    chosen = _chosen(masks, layer, grid)
    if layer is None and grid is None:
        values = np.stack([_line(record, show, head, query) for record in _alike(chosen)])
    elif grid is None and query is None:
        values = _matrix(next(iter(chosen.values())), show, head)
    else:
        values = _line(next(iter(chosen.values())), show, head, query)[None]
    if labels is not None and len(labels) != values.shape[1]:
        raise ConfigError(f"there are {len(labels)} labels for {values.shape[1]} key tokens; give one for each.")
    if grid is not None:
        if not 1 <= min(grid) <= grid[0] * grid[1] <= values.shape[1]:
            raise ConfigError(
                f"a grid of {grid[0]} by {grid[1]} patches doesn't fit {values.shape[1]} tokens; give rows and columns "
                "of at least 1, and no more patches than tokens."
            )
        values = values[0, -grid[0] * grid[1] :].reshape(grid)
    if axis is None:
        height = _COLUMN if grid is not None or values.shape[0] > len(chosen) else 1.2 + 0.16 * values.shape[0]
        axis = new_figure((_COLUMN, height), dpi=_DPI).subplots()
    heat = _heat(axis, values, show, next(iter(chosen.values())), limits)
    if grid is not None:
        axis.set(xticks=[], yticks=[])
    else:
        axis.set_aspect("auto")
        _name_ticks(axis.xaxis, labels, values.shape[1])
        names = [] if query is None and layer is not None else _short(list(chosen))
        _name_ticks(axis.yaxis, names or (labels if values.shape[0] == values.shape[1] else None), values.shape[0])
        axis.set_xlabel("key token", fontsize=_FONT)
        axis.set_ylabel("layer" if names else "query token", fontsize=_FONT)
    drawn = cast("Figure", axis.get_figure(root=True))
    if bar:
        _bar(drawn, heat, [axis], _NAMES[show], below=values.shape[0] < _FEW_LINES)
    return drawn


def figure_image(model: nn.Module, image: str | Path | Image.Image, path: str | Path) -> None:
    """Writes a figure of one column's width: the image, and the importance of its patches in up to five layers.

    Args:
        model: a vision transformer of timm or open_clip with masks.
        image: a file or a Pillow image.
        path: a PDF, SVG or PNG file, in an existing folder; an older file is replaced.

    Raises:
        UnsupportedHostError: the model has no masks, or no patch grid.
        ConfigError: the model's masks are not finite.
        MissingExtraError: matplotlib is not installed.
        DataError: the image can't be read, or the file can't be written.
    """
    path, model = Path(path), unwrap(model)
    check_figure(path)
    config = next(iter(masks_of(model).values())).config
    shown = view(model, image)
    with evaluating(model), torch.no_grad(), capture_masks(model) as captured:
        run_all_queries(model, shown.images)
    names = list(captured)[: 1 if config.layers == "single" else None]
    names = [names[index] for index in np.unique(np.linspace(0, len(names) - 1, min(_MAPS, len(names))).astype(int))]
    grid_at = token_layout(model, names[0]).grid_at
    if grid_at is None:
        raise UnsupportedHostError(f"{names[0]} has no patch grid; draw vision transformers of timm and open_clip.")
    grid = grid_at((shown.images.shape[-2], shown.images.shape[-1]))
    count = 1 + len(names)
    columns = count if count < 4 else 3
    lines = -(-count // columns)
    cell = _COLUMN / columns
    height = cell * shown.sharp.shape[0] / shown.sharp.shape[1] + 0.18
    drawn = new_figure((_COLUMN, height * lines + 0.4), dpi=_DPI, layout="compressed")
    axes = drawn.subplots(lines, columns, squeeze=False)
    first, *others = axes.flat
    first.imshow(shown.sharp.numpy(), aspect="auto")
    first.set(xticks=[], yticks=[])
    first.set_title("image", fontsize=_FONT, pad=2)
    lines_of = [_line(captured[name], "mask", None, None)[-grid[0] * grid[1] :] for name in names]
    limits = colour_scale([line[np.isfinite(line)] for line in lines_of], config.mask_op.identity)
    for axis, name, label in zip(others, names, _short(names), strict=False):
        figure(captured, axis, layer=name, grid=grid, limits=limits, bar=False)
        axis.set_title(
            "all layers" if config.layers == "single" else f"layer {label}", fontsize=_FONT, pad=2, parse_math=False
        )
        axis.set_aspect((shown.sharp.shape[0] / grid[0]) / (shown.sharp.shape[1] / grid[1]))
    first.set_aspect("equal")
    for axis in others[len(names) :]:
        axis.remove()
    used = [first, *others[: len(names)]]
    _bar(drawn, others[0].images[0], used, "importance, mean of M over the queries", below=True)
    write_figure(drawn, path)


def figure_query(model: nn.Module, dataset: MomentDataset, qid: str | None, path: str | Path) -> None:
    """Writes a figure of one column's width: the importance of clips and words in the layers that attend to clips.

    Args:
        model: a model of the family ``lam_moment_detr`` with masks.
        dataset: a split of queries.
        qid: id of the query; None for the first one.
        path: as for :func:`figure_image`.

    Raises:
        UnsupportedHostError: the model has no masks, or is not a moment model.
        ConfigError: its masks or predictions are not finite.
        MissingExtraError: matplotlib is not installed.
        DataError: there is no such query, its features can't be read, or the file can't be written.
    """
    path = Path(path)
    check_figure(path)
    masks_of(model)
    index = index_of(dataset, qid)
    features, query = dataset.read(index), dataset.queries[index]
    with evaluating(model), capture_masks(model) as captured:
        find_moments(model, [features], [query.duration])
    tokens = MomentTokens(model, features, query)
    shown = {name: record for name, record in captured.items() if any(run.time for run in tokens.read(name)[1])}
    shown = shown or dict(captured)
    widths = [record.importance.shape[-1] for record in shown.values()]
    shown = {name: record for name, record in shown.items() if record.importance.shape[-1] == max(widths)}
    keys = tokens.read(next(iter(shown)))[1]
    labels = [label.partition("–")[0] if run.time else label for run in keys for label in run.labels]
    drawn = figure(shown, labels=labels)
    drawn.axes[0].set_xlabel("start of the clip (s)" + " and words" * (keys[-1].name == "word"), fontsize=_FONT)
    drawn.axes[0].set_title(f"“{printable(query.text)}”", fontsize=_FONT, pad=3, parse_math=False, wrap=True)
    write_figure(drawn, path)


def check_figure(path: Path) -> None:
    """Checks in advance that a figure can be written.

    Raises:
        DataError: the name has another suffix than those of :data:`FORMATS`, or as for :func:`check_target`.
    """
    if path.suffix.lower().removeprefix(".") not in FORMATS:
        raise DataError(f"The figure {path} is written as PDF, SVG or PNG; its name must end in .pdf, .svg or .png.")
    check_target(path, "figure")


def _chosen(
    masks: Mapping[str, MaskRecord], layer: str | int | None, grid: tuple[int, int] | None
) -> Mapping[str, MaskRecord]:
    names = list(masks)
    if not names:
        raise ConfigError("there are no masks; run the model inside lamzoo.capture_masks first")
    if layer is None:
        return masks if grid is None else {names[-1]: masks[names[-1]]}
    if isinstance(layer, int) and -len(names) <= layer < len(names):
        layer = names[layer]
    if layer not in masks:
        raise ConfigError(f"there is no layer {layer!r}; the masks are of {names[0]} to {names[-1]}.")
    return {str(layer): masks[str(layer)]}


def _alike(masks: Mapping[str, MaskRecord]) -> list[MaskRecord]:
    counts = {name: record.num_tokens[1] for name, record in masks.items()}
    if len(set(counts.values())) > 1:
        few = ", ".join(f"{name} {count}" for name, count in list(counts.items())[:3])
        raise ConfigError(f"the layers attend to different numbers of tokens ({few}, ...); choose one with layer=.")
    return list(masks.values())


def _line(record: MaskRecord, show: Show, head: int | None, query: int | None) -> NDArray[np.float32]:
    """Returns the values of the keys of one query, or their mean over the queries, ``(tokens of the input,)``."""
    if show == "mask" and query is None:
        values = _heads(record.importance[0], head)
    else:
        matrix = _heads(_dense(record, show), head)
        if query is None:
            values = matrix.mean(dim=0)
        else:
            places = torch.arange(matrix.shape[0]) if record.query_places is None else record.query_places[0].cpu()
            if not -len(places) <= query < len(places):
                raise ConfigError(f"there is no query {query}; there are {len(places)}, counted from 0.")
            at = int(places[query])
            values = matrix[at] if at >= 0 else torch.full_like(matrix[0], torch.nan)
    return _spread(values[None], record.key_places)[0]


def _matrix(record: MaskRecord, show: Show, head: int | None) -> NDArray[np.float32]:
    """Returns the values of all queries and keys, of the tokens of the stack's input."""
    keys = torch.from_numpy(_spread(_heads(_dense(record, show), head), record.key_places))
    return _spread(keys.mT, record.query_places).T


def _spread(values: Tensor, places: Tensor | None) -> NDArray[np.float32]:
    """Gives the tokens of the stack's input the columns of ``(rows, keys)`` that they are part of; NaN for none."""
    values = values.float().cpu()
    if places is None:
        return values.numpy()
    at = places[0].cpu()
    return values[:, at.clamp_min(0)].masked_fill(at < 0, torch.nan).numpy()


def _dense(record: MaskRecord, show: Show) -> Tensor:
    if show == "mask":
        return record.mask.dense()[0]
    if show == "attention":
        return record.attention[0]
    if record.scores is None:
        raise ConfigError("a layer that attends to its tokens part by part has no scores; draw the mask or attention.")
    plain = record.scores.attention()[0]
    return plain if show == "plain" else record.attention[0] - plain


def _heads(values: Tensor, head: int | None) -> Tensor:
    if head is None:
        return values.float().mean(dim=0)
    if not 0 <= head < len(values):
        raise ConfigError(f"there is no head {head}; there are {len(values)}, counted from 0.")
    return values[head].float()


def _heat(
    axis: Axes, values: NDArray[np.float32], show: Show, record: MaskRecord, limits: tuple[float, float] | None
) -> Any:
    from matplotlib import colormaps

    finite = values[np.isfinite(values)]
    if limits is None and show in ("mask", "difference"):
        neutral = OPS[record.op].identity if show == "mask" else 0.0
        least = None if show == "mask" else float(np.abs(finite).max(initial=1e-6))
        limits = colour_scale([finite], neutral) if least is None else (-least, least)
    elif limits is None:
        limits = 0.0, float(finite.max(initial=1e-6))
    colours = colormaps[COLOURS if show in ("mask", "difference") else "cividis"].with_extremes(bad="#999999")
    return axis.imshow(values, cmap=colours, vmin=limits[0], vmax=limits[1], interpolation="nearest", rasterized=True)


def _short(names: Sequence[str]) -> list[str]:
    """Returns what differs between the paths of layers: ``"3"`` of ``"blocks.3.attn"``."""
    parts = [name.split(".") for name in names]
    if len(names) == 1 or len({len(each) for each in parts}) > 1:
        return [printable(name.removesuffix(".attn")) for name in names]
    differing = [len(set(column)) > 1 for column in zip(*parts, strict=True)]
    return [
        printable(".".join(part for part, differs in zip(each, differing, strict=True) if differs)) for each in parts
    ]


def _name_ticks(axis: Any, labels: Sequence[str] | None, count: int) -> None:
    is_x = axis.axis_name == "x"
    extent = axis.axes.get_window_extent()
    inches = (extent.width if is_x else extent.height) / axis.axes.get_figure(root=True).dpi
    longest = max(map(len, labels)) if labels else len(str(count))
    upright = is_x and longest > 3
    # A line of text, or as many digits as the longest label has and a space.
    needed = 1.4 if upright or not is_x else 0.6 * (longest + 2)
    step = -(-count // max(1, int(inches * 72 / (needed * _SMALL))))
    places = list(range(0, count, step))
    names = [printable(labels[place]) for place in places] if labels else [str(place) for place in places]
    axis.set_ticks(places, labels=names, fontsize=_SMALL, rotation=90 if upright else 0)
    for label in axis.get_ticklabels():
        label.set_parse_math(False)
    axis.set_tick_params(length=2, pad=1)


def _bar(drawn: Figure, heat: Any, axes: list[Axes], label: str, below: bool = False) -> None:
    values, (low, high) = heat.get_array().compressed(), heat.get_clim()
    ends = {(True, True): "both", (True, False): "min", (False, True): "max", (False, False): "neither"}
    bar = drawn.colorbar(
        heat, ax=axes, extend=ends[bool((values < low).any()), bool((values > high).any())], pad=0.02, fraction=0.05,
        location="bottom" if below else "right", aspect=40 if below else 20,
    )  # fmt: skip
    bar.set_label(label, fontsize=_FONT, labelpad=2)
    bar.ax.tick_params(labelsize=_SMALL, length=2, pad=1)
    bar.outline.set_linewidth(0.4)
