"""Registered models on the meta device, and what they cost: counted once, since counting takes up to a second."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from lamzoo.profiling import Profile, profile
from lamzoo.registry import create_model


@cache
def on_meta(name: str, **arguments: Any) -> Any:
    """Returns a model without numbers, so that a ViT-L takes no longer than a micro model; not to be changed."""
    with torch.device("meta"):
        return create_model(name, **arguments)


@cache
def profiled(name: str, **arguments: Any) -> Profile:
    """Returns what one forward pass of a model costs."""
    return profile(on_meta(name, **arguments))
