"""Learnable attention masks: configuration, factored masks, mask networks and attention."""

from typing import TYPE_CHECKING

from lamzoo.lazy import submodules_of

if TYPE_CHECKING:
    from lamzoo.lam.attention import lam_attention
    from lamzoo.lam.config import LamConfig
    from lamzoo.lam.kernels import attention_backend, available_backends
    from lamzoo.lam.layer import Lam, MaskRecord
    from lamzoo.lam.masks import FactoredMask, MaskNetwork
    from lamzoo.lam.passes import SharedState
    from lamzoo.lam.resize import resize_table

__all__ = [
    "FactoredMask",
    "Lam",
    "LamConfig",
    "MaskNetwork",
    "MaskRecord",
    "SharedState",
    "attention_backend",
    "available_backends",
    "lam_attention",
    "resize_table",
]

# Imported on first use: the configuration alone needs no torch.
_HOMES = {
    "FactoredMask": "lamzoo.lam.masks",
    "Lam": "lamzoo.lam.layer",
    "LamConfig": "lamzoo.lam.config",
    "MaskNetwork": "lamzoo.lam.masks",
    "MaskRecord": "lamzoo.lam.layer",
    "SharedState": "lamzoo.lam.passes",
    "attention_backend": "lamzoo.lam.kernels",
    "available_backends": "lamzoo.lam.kernels",
    "lam_attention": "lamzoo.lam.attention",
    "resize_table": "lamzoo.lam.resize",
}

if not TYPE_CHECKING:  # a type checker would believe any name
    __getattr__ = submodules_of(__name__, _HOMES)
