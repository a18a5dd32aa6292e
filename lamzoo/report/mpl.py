"""Matplotlib figures without pyplot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lamzoo.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(
    size: tuple[float, float],
    *,
    dpi: int = 130,
    layout: Literal["constrained", "compressed"] = "constrained",
    extra: str = "report",
) -> Figure:
    """Returns an empty figure with an Agg canvas.

    Args:
        size: width and height in inches.
        dpi: pixels per inch.
        layout: matplotlib's layout engine.
        extra: extra of lamzoo to install if matplotlib is missing, for the message.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            f"Drawing needs matplotlib ({error}); install it with: pip install 'lamzoo[{extra}]'"
        ) from None
    figure = Figure(figsize=size, dpi=dpi, layout=layout)
    FigureCanvasAgg(figure)
    return figure
