"""Captioned videos in many layouts, as one data set class."""

from typing import TYPE_CHECKING

from lamzoo.data.retrieval.base import CaptionedVideos, VideoSource, select_videos
from lamzoo.data.retrieval.factory import VIDEO_KINDS, create_retrieval_dataset
from lamzoo.data.retrieval.validation import find_invalid_videos, leave_out_invalid_videos, set_aside_invalid_videos
from lamzoo.lazy import submodules_of

__all__ = [
    "VIDEO_KINDS",
    "CaptionedVideos",
    "VideoSource",
    "create_retrieval_dataset",
    "find_invalid_videos",
    "leave_out_invalid_videos",
    "select_videos",
    "set_aside_invalid_videos",
]

if not TYPE_CHECKING:  # a type checker would believe any name
    __getattr__ = submodules_of(__name__)
