"""Pictures and tables of what a model does and what it costs."""

from lamzoo.lazy import submodules_of
from lamzoo.report.descriptions import explain_windows
from lamzoo.report.masks import explain
from lamzoo.report.moments import explain_moments

__all__ = ["explain", "explain_moments", "explain_windows"]

__getattr__ = submodules_of(__name__)
