"""Atomic writing of the comparison to a folder: text, plots and HTML page."""

from __future__ import annotations

from pathlib import Path

from lamzoo.errors import DataError
from lamzoo.files import atomic_files
from lamzoo.report.compare.entries import Comparison
from lamzoo.report.compare.page import to_html
from lamzoo.report.compare.panels import gmacs_panels, latency_panels
from lamzoo.report.compare.plots import draw_panels
from lamzoo.report.compare.text import to_csv, to_markdown
from lamzoo.report.mpl import encode


def write_comparison(comparison: Comparison, folder: str | Path) -> list[Path]:
    """Writes ``compare.md``, ``compare.csv``, ``compare.html`` and the plots as PNG and SVG; older ones are replaced.

    The page includes its scripts and needs no network.

    Args:
        comparison: from :func:`compare`.
        folder: created if missing.

    Returns:
        The files.

    Raises:
        MissingExtraError: matplotlib, plotly or itables is not installed.
        DataError: the folder cannot be written.
    """
    figures = {
        "accuracy-vs-gmacs": draw_panels(gmacs_panels(comparison), "Accuracy against GMACs"),
        "accuracy-vs-latency": draw_panels(latency_panels(comparison), "Accuracy against latency"),
    }
    contents = {
        "compare.md": to_markdown(comparison, pictures=[f"{name}.png" for name in figures]).encode(),
        "compare.csv": to_csv(comparison).encode(),
        "compare.html": to_html(comparison).encode(),
        **{f"{name}.png": encode(figure, "png") for name, figure in figures.items()},
        **{f"{name}.svg": encode(figure, "svg") for name, figure in figures.items()},
    }
    with atomic_files(DataError) as stage:
        for name, content in contents.items():
            stage(Path(folder) / name).write_bytes(content)
    return [Path(folder) / name for name in contents]
