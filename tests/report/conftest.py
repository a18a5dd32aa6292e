from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from lamzoo.lam import LamConfig
from lamzoo.models.vit import micro_vit

_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

_PAPER = LamConfig(op="mul", heads="shared", init="paper")


@pytest.fixture
def build():
    """Builds a two-layer classifier of CIFAR-10's classes with random weights, masks included."""

    def build(lam=_PAPER, **kwargs):
        config = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
        model = micro_vit({**config, **kwargs}, lam=lam)
        model.pretrained_cfg = {"architecture": "micro", "tag": "random", "label_names": _CLASSES, "num_classes": 10}
        return model

    return build


@pytest.fixture
def photo():
    pixels = torch.randint(0, 256, (48, 64, 3), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.fixture
def drawn(monkeypatch):
    """Stands between `explain` and the drawing, and keeps what was to be drawn."""
    from lamzoo.report import mask_pictures

    seen = SimpleNamespace()
    real = mask_pictures.draw

    def draw(layers, *args, **kwargs):
        seen.layers, seen.title, seen.neutral = layers, kwargs["title"], kwargs["neutral"]
        return real(layers, *args, **kwargs)

    monkeypatch.setattr(mask_pictures, "draw", draw)
    return seen
