"""Weight files: finding, checking, reading, writing and loading them."""

from typing import TYPE_CHECKING

from lamzoo.lazy import submodules_of

if TYPE_CHECKING:
    from lamzoo.weights.files import file_sha256, join, read_state_dict, shard, write_state_dict
    from lamzoo.weights.loading import load_into
    from lamzoo.weights.mask_saving import load_lam, save_lam
    from lamzoo.weights.saved import SavedModel, read_saved
    from lamzoo.weights.sources import WeightsFile, resolve

__all__ = [
    "SavedModel",
    "WeightsFile",
    "file_sha256",
    "join",
    "load_into",
    "load_lam",
    "read_saved",
    "read_state_dict",
    "resolve",
    "save_lam",
    "shard",
    "write_state_dict",
]

_HOMES = dict.fromkeys(__all__, "lamzoo.weights.files") | {
    "SavedModel": "lamzoo.weights.saved",
    "WeightsFile": "lamzoo.weights.sources",
    "load_into": "lamzoo.weights.loading",
    "load_lam": "lamzoo.weights.mask_saving",
    "read_saved": "lamzoo.weights.saved",
    "resolve": "lamzoo.weights.sources",
    "save_lam": "lamzoo.weights.mask_saving",
}

if not TYPE_CHECKING:  # a type checker would believe any name
    __getattr__ = submodules_of(__name__, _HOMES)
