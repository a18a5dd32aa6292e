"""Labelled images in many layouts, as one data set class."""

from typing import TYPE_CHECKING

from lamzoo.data.images.class_map import read_class_map, relabel
from lamzoo.data.images.decode import decode_image, find_images, open_image
from lamzoo.data.images.factory import create_dataset
from lamzoo.data.images.image_dataset import ImageSource, LabelledImages
from lamzoo.data.images.selection import select, split_off
from lamzoo.data.images.validation import find_invalid_images, leave_out_invalid, set_aside_invalid
from lamzoo.data.validation import BadInput, OnBadInput, plain_worker_errors
from lamzoo.lazy import submodules_of

__all__ = [
    "BadInput",
    "ImageSource",
    "LabelledImages",
    "OnBadInput",
    "create_dataset",
    "decode_image",
    "find_images",
    "find_invalid_images",
    "leave_out_invalid",
    "open_image",
    "plain_worker_errors",
    "read_class_map",
    "relabel",
    "select",
    "set_aside_invalid",
    "split_off",
]

if not TYPE_CHECKING:  # a type checker would believe any name
    __getattr__ = submodules_of(__name__)
