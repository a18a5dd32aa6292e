"""``lamzoo download``: downloads a model's weights into the local cache and checks them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lamzoo.cli import _output as out
from lamzoo.cli._options import Name

if TYPE_CHECKING:
    from pathlib import Path


def download(name: Name) -> None:
    """Downloads a model's weights into the local cache and checks them."""
    out.print_line(out.path_text(fetch(name)))


def fetch(name: str) -> Path:
    """Downloads the weights of a model if necessary, checks them by reading, and returns their file.

    Raises:
        UnknownModelError: no such model or tag.
        WeightsError: the weights are not available or are damaged.
    """
    from lamzoo.registry.factory import find_weights_file
    from lamzoo.weights.files import read_state_dict

    file = find_weights_file(name)
    read_state_dict(file.path, sha256=file.sha256)
    return file.path
