"""Audio description: a joint encoder over video and audio, and a decoder that writes."""

from typing import TYPE_CHECKING

from lamzoo.lazy import submodules_of
from lamzoo.models.describer.model import Describer, describer

__all__ = ["Describer", "describer"]

if not TYPE_CHECKING:  # a type checker would believe any name
    __getattr__ = submodules_of(__name__)
