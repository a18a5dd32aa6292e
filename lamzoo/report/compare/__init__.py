"""Comparison of benchmarked models: tables, plots and an HTML page from results tables."""

from typing import TYPE_CHECKING

from lamzoo.lazy import submodules_of
from lamzoo.report.compare.entries import Comparison, Entry, Group, compare
from lamzoo.report.compare.panels import Panel, Point, gmacs_panels, latency_panels
from lamzoo.report.compare.text import to_csv, to_markdown
from lamzoo.report.compare.timm_results import TimmResult, read_timm
from lamzoo.report.compare.writing import write_comparison

__all__ = [
    "Comparison",
    "Entry",
    "Group",
    "Panel",
    "Point",
    "TimmResult",
    "compare",
    "gmacs_panels",
    "latency_panels",
    "read_timm",
    "to_csv",
    "to_markdown",
    "write_comparison",
]

if not TYPE_CHECKING:  # a type checker would believe any name
    __getattr__ = submodules_of(__name__)
