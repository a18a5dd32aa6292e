"""An interactive page of masks and attention, token by token; its numbers are computed in the page from factors."""

from lamzoo.report.explorer.document import Answer, Exploration, ExploredLayer, TokenRun, to_html
from lamzoo.report.explorer.runs import answers_of, explore_image, run_twice

__all__ = ["Answer", "Exploration", "ExploredLayer", "TokenRun", "answers_of", "explore_image", "run_twice", "to_html"]
