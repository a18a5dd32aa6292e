"""Moment retrieval and highlight detection data: queries about videos, and features of both."""

from typing import TYPE_CHECKING

from lamzoo.data.moments.base import MomentDataset, MomentFeatures, MomentQuery, MomentSource
from lamzoo.data.moments.factory import create_moment_dataset
from lamzoo.lazy import submodules_of

__all__ = ["MomentDataset", "MomentFeatures", "MomentQuery", "MomentSource", "create_moment_dataset"]

if not TYPE_CHECKING:  # a type checker would believe any name
    __getattr__ = submodules_of(__name__)
