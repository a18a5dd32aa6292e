"""An interactive page of masks and attention, token by token; its numbers are computed in the page from factors."""

from lamzoo.report.explorer.any_model import explore
from lamzoo.report.explorer.document import Answer, Exploration, ExploredLayer, TokenRun, to_html
from lamzoo.report.explorer.runs import explore_image

__all__ = ["Answer", "Exploration", "ExploredLayer", "TokenRun", "explore", "explore_image", "to_html"]
