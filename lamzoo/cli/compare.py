"""``lamzoo compare``: results tables as one table, Markdown, CSV, plots and an interactive page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lamzoo.cli import _output as out

if TYPE_CHECKING:
    from lamzoo.report.compare import Comparison, Entry
    from lamzoo.report.compare.text import Column


def compare(
    results: Annotated[list[Path], typer.Argument(metavar="RESULTS.csv...", help="Results tables of lamzoo bench.")],
    timm: Annotated[Path | None, typer.Option(metavar="PATH", help=(
        "Folder with timm's results-imagenet.csv and benchmark-infer-*.csv, to compare with timm's models."))] = None,
    timm_data: Annotated[str | None, typer.Option(metavar="SPEC", help=(
        "Which `data` is ImageNet-1k's validation split [guessed from the name]."))] = None,
    output: Annotated[Path | None, typer.Option("--out", metavar="DIR", help=(
        "Also write compare.md, .csv, .html and the plots to this folder."))] = None,
    format: Annotated[Literal["table", "markdown", "csv"], typer.Option(help="Format of the output.")] = "table",
) -> None:  # fmt: skip
    """Compares measured models: accuracy against cost.

    Each model with masks is listed below its plain backbone.
    """
    from lamzoo.report.compare import compare, to_csv, to_markdown, write_comparison

    comparison = compare(results, timm=timm, timm_data=timm_data)
    files = [] if output is None else write_comparison(comparison, output)
    if format == "markdown":
        out.print_text(to_markdown(comparison))
    elif format == "csv":
        out.print_text(to_csv(comparison))
    else:
        _print(comparison)
        for file in files:
            out.print_line(out.path_text(file))


def _print(comparison: Comparison) -> None:
    from lamzoo.report.compare.text import all_notes, caption, columns_of, pareto_costs

    front = pareto_costs(comparison)
    for group in comparison.groups:
        columns = columns_of(group, front)
        title = f"{group.title} ({caption(group)})"
        if _width(columns, group.entries) <= out.terminal_width():
            _print_group(columns, group.entries, title)
            continue
        speed = [column for column in columns if column.speed]
        _print_group([column for column in columns if not column.speed], group.entries, title, narrow=True)
        _print_group([columns[0], *speed], group.entries, None, narrow=True)
    if comparison.failed:
        failed = [(entry.row.label, entry.row.data, entry.row.error) for entry in comparison.failed]
        out.print_table(("model", "data", "reason"), failed, title="failed")
    for note in all_notes(comparison):
        out.print_line(note)


def _print_group(
    columns: Sequence[Column], entries: Sequence[Entry], title: str | None, *, narrow: bool = False
) -> None:
    """Prints one table; on a narrow terminal, headings and quartiles are wrapped."""

    def fitted(text: str, column: Column) -> str:
        return text.replace(" ", "\n") if narrow and column.numeric else text

    rows = [[fitted(column.cell(entry), column) for column in columns] for entry in entries]
    numbers = [index for index, column in enumerate(columns) if column.numeric]
    out.print_table([fitted(column.heading, column) for column in columns], rows, title=title, numbers=numbers)


def _width(columns: Sequence[Column], entries: Sequence[Entry]) -> int:
    """Returns the width of the table with every cell on one line, in characters, frame included."""
    cells = (max(map(len, (column.heading, *map(column.cell, entries)))) for column in columns)
    return 1 + sum(3 + width for width in cells)
