"""The module that the entry point names: importing it registers its models."""

from typing import Any

import timm
from torch import nn

import lamzoo


@lamzoo.register_model(
    lam=lamzoo.LamConfig(rank=2),
    pretrained_cfg={"input_size": (3, 32, 32), "num_classes": 5, "classifier": "head"},
)
def example_vit(num_classes: int = 5, img_size: int = 32, **kwargs: Any) -> nn.Module:
    """A very small vision transformer with masks."""
    return timm.create_model("test_vit", num_classes=num_classes, img_size=img_size, **kwargs)
