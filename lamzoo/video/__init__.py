"""Applications on video files: feature extraction, search by text, and description window by window."""

from typing import TYPE_CHECKING

from lamzoo.lazy import submodules_of

if not TYPE_CHECKING:  # a type checker would believe any name
    __getattr__ = submodules_of(__name__)
