"""Pictures and tables of what a model does and what it costs."""

from lamzoo.report.masks import explain

__all__ = ["explain"]
