"""Matplotlib figures without pyplot."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from lamzoo.errors import DataError, MissingExtraError
from lamzoo.files import atomic_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Format = Literal["pdf", "svg", "png"]


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


def encode(figure: Figure, kind: Format) -> bytes:
    """Returns the content of an image file; deterministic."""
    import matplotlib

    content = io.BytesIO()
    undated: dict[str, dict[str, Any]] = {
        "svg": {"Date": None},
        "png": {"Software": None},
        "pdf": {"CreationDate": None},
    }
    # Fonts of type 42 (TrueType) are what publishers ask for.
    with matplotlib.rc_context({"svg.hashsalt": "lamzoo", "svg.fonttype": "none", "pdf.fonttype": 42}):
        figure.savefig(content, format=kind, metadata=undated[kind])
    return content.getvalue()


def write_figure(figure: Figure, path: Path) -> None:
    """Writes a figure to a file, atomically, in the format of its suffix, as :func:`encode`.

    Raises:
        DataError: the file can't be written.
    """
    content = encode(figure, cast("Format", path.suffix.lower().removeprefix(".")))
    with atomic_files(DataError) as stage:
        stage(path).write_bytes(content)
