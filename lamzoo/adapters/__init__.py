"""Learnable masks in existing models: adding, capturing, saving and removing them."""

from typing import TYPE_CHECKING

from lamzoo.adapters.add import add_lam, add_lam_to
from lamzoo.adapters.capture import capture_masks
from lamzoo.adapters.deploy import fuse, unfuse
from lamzoo.adapters.mask_sets import set_lam
from lamzoo.adapters.pretrained import from_pretrained
from lamzoo.adapters.state import lam_parameters, lam_state_dict, load_lam_state_dict, remove_lam
from lamzoo.lazy import submodules_of

__all__ = [
    "add_lam",
    "add_lam_to",
    "capture_masks",
    "from_pretrained",
    "fuse",
    "lam_parameters",
    "lam_state_dict",
    "load_lam_state_dict",
    "remove_lam",
    "set_lam",
    "unfuse",
]

if not TYPE_CHECKING:  # a type checker would believe any name
    __getattr__ = submodules_of(__name__)
