"""The command ``lamzoo app``: predictions, masks and video search in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamzoo.cli import _output as out
from lamzoo.cli._options import Device


def app_command(
    models: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help=(
        "Models of images or of text-video retrieval [those with weights on this machine]."))] = None,
    videos: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of videos to search.")] = None,
    host: Annotated[str | None, typer.Option(help=(
        "Address to bind [127.0.0.1]; 0.0.0.0 serves the network."))] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port to bind [7860].")] = None,
    device: Device = "auto",
) -> None:  # fmt: skip
    """Serves an app for the browser: upload an image or a video, and see predictions and masks.

    Ctrl-C ends it. Everybody who can reach the address can use the given models and search the given folder.
    """
    from lamzoo.report.browser_app import HOST, PORT, launch

    app = launch(models or (), videos=videos, host=host or HOST, port=port or PORT, device=device, block=False)
    out.print_line(f"serving at {app.local_url}; Ctrl-C ends it")
    app.block_thread()
