"""Labelled images from any of the layouts people keep them in, as one kind of data set; knows no model."""

from lamzoo.data.factory import create_dataset
from lamzoo.data.images import decode_image, find_images, open_image
from lamzoo.data.labelled import ImageSource, LabelledImages, plain_worker_errors

__all__ = [
    "ImageSource",
    "LabelledImages",
    "create_dataset",
    "decode_image",
    "find_images",
    "open_image",
    "plain_worker_errors",
]
