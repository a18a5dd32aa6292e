"""Training of image classifiers."""

from typing import TYPE_CHECKING

from lamzoo.lazy import submodules_of

if not TYPE_CHECKING:  # hidden from type checkers, which would accept any name
    __getattr__ = submodules_of(__name__)
