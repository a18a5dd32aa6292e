"""Where pictures are drawn and written: an empty matplotlib figure by Agg, or the word that matplotlib is missing."""

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
    """Makes an empty figure.

    Args:
        size: width and height in inches.
        dpi: pixels an inch.
        layout: matplotlib's layout engine.
        extra: what to install where matplotlib is missing.

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
    """Checks that a PNG can be written to a path, before any work.

    Args:
        path: the file.
        what: name of the picture for errors.

    Raises:
        DataError: the name does not end in ``.png``, its folder does not exist, or it is a folder itself.
    """
    if path.suffix.lower() != ".png":
        raise DataError(f"The {what} {path} would be a PNG; give it a name that ends in .png.")
    if not path.absolute().parent.is_dir():
        raise DataError(f"The folder {path.parent} of the {what} does not exist; make it first.")
    if path.is_dir():
        raise DataError(f"The {what} can't be written over the folder {path}; choose another name.")
