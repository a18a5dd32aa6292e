"""Captioned video and audio clips, as features of several modalities behind one interface."""

from typing import TYPE_CHECKING

from lamzoo.data.captions.base import CaptionDataset, CaptionItem, CaptionSource, Stream
from lamzoo.data.captions.factory import create_caption_dataset
from lamzoo.lazy import submodules_of

__all__ = ["CaptionDataset", "CaptionItem", "CaptionSource", "Stream", "create_caption_dataset"]

if not TYPE_CHECKING:  # a type checker would believe any name
    __getattr__ = submodules_of(__name__)
