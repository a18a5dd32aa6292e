"""Text-video retrieval: CLIP4Clip."""

from typing import TYPE_CHECKING

from lamzoo.lazy import submodules_of
from lamzoo.models.clip4clip.builder import clip4clip
from lamzoo.models.clip4clip.model import Clip4Clip

__all__ = ["Clip4Clip", "clip4clip"]

if not TYPE_CHECKING:  # a type checker would believe any name
    __getattr__ = submodules_of(__name__)
