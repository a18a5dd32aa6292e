"""Matplotlib figures without pyplot, and checks of the files that they are written to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lamzoo.errors import DataError, MissingExtraError

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


def check_target(path: Path, what: str) -> None:
    """Checks in advance that a PNG file can be written.

    Args:
        path: the file.
        what: name of the picture in messages.

    Raises:
        DataError: the name does not end in ``.png``, its folder does not exist, or it is a folder itself.
    """
    if path.suffix.lower() != ".png":
        raise DataError(f"The {what} {path} is written as PNG; its name must end in .png.")
    if not path.absolute().parent.is_dir():
        raise DataError(f"The folder {path.parent} of the {what} does not exist; create it first.")
    if path.is_dir():
        raise DataError(f"The {what} can't be written over the folder {path}; choose another name.")
