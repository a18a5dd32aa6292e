"""Moment retrieval and highlight detection: Moment-DETR and QD-DETR."""

from typing import TYPE_CHECKING

from lamzoo.lazy import submodules_of
from lamzoo.models.moment_detr.model import MomentDetr, moment_detr
from lamzoo.models.moment_detr.qd_detr import QdDetr, qd_detr

__all__ = ["MomentDetr", "QdDetr", "moment_detr", "qd_detr"]

if not TYPE_CHECKING:  # a type checker would believe any name
    __getattr__ = submodules_of(__name__)
