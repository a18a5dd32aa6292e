"""Entry points for ``torch.hub``: a function for each registered model, ``create_model`` and ``list_models``."""

from typing import Any as _Any

from lamzoo import create_model, list_models
from lamzoo import model_info as _model_info

dependencies = ["huggingface_hub", "numpy", "PIL", "rich", "safetensors", "timm", "torch", "torchvision", "typer"]


def _entry_point(_name: str) -> _Any:
    def build(pretrained: bool = False, **arguments: _Any) -> _Any:
        return create_model(_name, pretrained, **arguments)

    build.__name__ = _name
    build.__doc__ = f"{_model_info(_name).description}\n\nTakes the arguments of lamzoo.create_model."
    return build


globals().update({name: _entry_point(name) for name in list_models()})
