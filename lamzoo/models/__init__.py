"""The zoo's own models: a builder for each family, and what several families share."""

from lamzoo.lazy import submodules_of

__getattr__ = submodules_of(__name__)
