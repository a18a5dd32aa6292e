"""Weight files: finding, checking, reading, writing and loading them."""

from typing import TYPE_CHECKING

from lamzoo.lazy import submodules_of

if TYPE_CHECKING:
    from lamzoo.weights.files import WeightsFile, file_sha256, join, read_state_dict, resolve, shard, write_state_dict
    from lamzoo.weights.loading import load_into

__all__ = [
    "WeightsFile",
    "file_sha256",
    "join",
    "load_into",
    "read_state_dict",
    "resolve",
    "shard",
    "write_state_dict",
]

_HOMES = dict.fromkeys(__all__, "lamzoo.weights.files") | {"load_into": "lamzoo.weights.loading"}

if not TYPE_CHECKING:  # a type checker would believe any name
    __getattr__ = submodules_of(__name__, _HOMES)
