"""Layers that the zoo's own models are built of; they import no adapter."""

from typing import TYPE_CHECKING

from lamzoo.lazy import submodules_of

if not TYPE_CHECKING:  # a type checker would believe any name
    __getattr__ = submodules_of(__name__)
