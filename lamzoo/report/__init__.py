"""Figures and tables of models: masks, predictions, training curves, accuracy and cost."""

from typing import TYPE_CHECKING

from lamzoo.lazy import submodules_of

if TYPE_CHECKING:
    from lamzoo.report.explorer import TokenRun, explore, explore_image
    from lamzoo.report.explorer.description_page import explore_description, explore_window
    from lamzoo.report.explorer.queries import explore_moments, explore_query
    from lamzoo.report.explorer.retrieval_page import explore_retrieval, explore_video
    from lamzoo.report.mask_pictures import explain
    from lamzoo.report.moment_pictures import explain_moments
    from lamzoo.report.paper_figure import figure
    from lamzoo.report.window_pictures import explain_windows

__all__ = [
    "TokenRun",
    "explain",
    "explain_moments",
    "explain_windows",
    "explore",
    "explore_description",
    "explore_image",
    "explore_moments",
    "explore_query",
    "explore_retrieval",
    "explore_video",
    "explore_window",
    "figure",
]

_HOMES = {
    "explain": "lamzoo.report.mask_pictures",
    "explain_moments": "lamzoo.report.moment_pictures",
    "explain_windows": "lamzoo.report.window_pictures",  # which needs open_clip, as its models do
    "TokenRun": "lamzoo.report.explorer",
    "explore": "lamzoo.report.explorer",
    "explore_image": "lamzoo.report.explorer",
    "explore_moments": "lamzoo.report.explorer.queries",
    "explore_query": "lamzoo.report.explorer.queries",
    "explore_description": "lamzoo.report.explorer.description_page",
    "explore_window": "lamzoo.report.explorer.description_page",
    "explore_retrieval": "lamzoo.report.explorer.retrieval_page",
    "explore_video": "lamzoo.report.explorer.retrieval_page",
    "figure": "lamzoo.report.paper_figure",
}

if not TYPE_CHECKING:  # a type checker would believe any name
    __getattr__ = submodules_of(__name__, _HOMES)
