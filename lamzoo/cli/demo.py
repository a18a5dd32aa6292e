"""``lamzoo demo``: predictions, cost, masks and accuracy on real photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the pictures.")] = Path(".demo"),
    cifar10: Annotated[Path | None, typer.Option(metavar="DIR", help="A copy of CIFAR-10 to evaluate on.")] = None,
) -> None:
    """Runs a demo on real photographs.

    It shows predictions, cost, masks and accuracy, and writes pictures.
    """
    from lamzoo.report.demo import run

    run(output, cifar10=cifar10)
