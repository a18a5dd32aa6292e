"""Learnable attention masks: configuration, factored masks, mask networks and attention; knows torch and no model."""

from typing import TYPE_CHECKING

from lamzoo.lam.attention import lam_attention
from lamzoo.lam.config import LamConfig
from lamzoo.lam.kernels import attention_backend, available_backends
from lamzoo.lam.layer import Lam, MaskRecord, SharedState
from lamzoo.lam.masks import FactoredMask, MaskNetwork
from lamzoo.lam.pruning import PruneConfig
from lamzoo.lam.resize import resize_table
from lamzoo.lazy import submodules_of

__all__ = [
    "FactoredMask",
    "Lam",
    "LamConfig",
    "MaskNetwork",
    "MaskRecord",
    "PruneConfig",
    "SharedState",
    "attention_backend",
    "available_backends",
    "lam_attention",
    "resize_table",
]

if not TYPE_CHECKING:  # a type checker would believe any name
    __getattr__ = submodules_of(__name__)
