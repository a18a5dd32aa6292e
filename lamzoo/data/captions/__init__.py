"""Videos and sound with what people wrote about them, as features of several modalities behind one interface."""

from lamzoo.data.captions.base import CaptionDataset, CaptionItem, CaptionSource, Stream
from lamzoo.data.captions.factory import create_caption_dataset
from lamzoo.lazy import submodules_of

__all__ = ["CaptionDataset", "CaptionItem", "CaptionSource", "Stream", "create_caption_dataset"]

__getattr__ = submodules_of(__name__)
