"""``lamzoo download``: a model's weights, brought into the local cache and checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lamzoo.cli import _output as out
from lamzoo.cli._options import Name, saved_source
from lamzoo.errors import WeightsNotFoundError

if TYPE_CHECKING:
    from pathlib import Path

    from lamzoo.weights.files import WeightsFile


def download(name: Name) -> None:
    """Downloads a model's weights into the local cache and checks them."""
    out.print_line(out.printable(fetch(name)))


def fetch(name: str) -> Path:
    """Brings the weights of a model here, reads them once to check them, and returns their file.

    Raises:
        UnknownModelError: no such model or tag.
        WeightsError: the weights are not available or are damaged.
    """
    from lamzoo.registry.catalog import find_spec, find_weights
    from lamzoo.registry.factory import obtain
    from lamzoo.registry.saving import read_saved
    from lamzoo.weights.files import read_state_dict

    source = saved_source(name)
    if source is None:
        card = find_spec(name)
        find_weights(card, name)
        file: WeightsFile | None = obtain(card, name)[1]
    else:
        file = read_saved(source, name.partition(":")[2], with_weights=True).weights
    if file is None:
        raise WeightsNotFoundError(f"{name} has no weights")
    read_state_dict(file.path, sha256=file.sha256)
    return file.path
