"""``lamzoo demo``: a tour of the image models on real photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the files.")] = Path(".demo"),
    cifar10: Annotated[Path | None, typer.Option(metavar="DIR", help="A copy of CIFAR-10 to evaluate on.")] = None,
) -> None:
    """Runs a tour of the image models on real photographs, offline.

    It shows predictions and cost of a model with masks beside its plain twin, with merged tokens and fused, and writes
    pictures and interactive pages of the masks.
    """
    from lamzoo.report.demo import run

    run(output, cifar10=cifar10)
