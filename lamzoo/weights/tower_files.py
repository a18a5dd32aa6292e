"""Weights of single towers of a model, each in a file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lamzoo.weights.files import read_state_dict
from lamzoo.weights.loading import load_into

_RENAMED = {".gamma": ".weight", ".beta": ".bias"}  # norms in the first files of BERT


def load_towers(model: nn.Module) -> None:
    """Loads the weights of towers that a model states as its ``tower_files``, strictly; without such, does nothing.

    A file of timm may have a classifier, which is left out, and another image size. A file of transformers may be of
    a model with a head, such as ``BertForMaskedLM``; the head is left out, as is the pooler of a tower without one.

    Raises:
        WeightsError: a file is unavailable or damaged, or doesn't fit its tower; names the file.
        UnsupportedHostError: the model is not a ``torch.nn.Module``.
    """
    for path, source in getattr(model, "tower_files", {}).items():
        tower: Any = model.get_submodule(path)
        weights: Mapping[str, Tensor] = read_state_dict(source.file)
        if source.timm is None:
            weights = _of_transformers(weights, tower)
        load_into(
            tower, weights, source=str(source.file), given=("img_size", "num_classes", "global_pool"),
            arch=None if source.timm is None else source.timm.partition(".")[0], external=True,
        )  # fmt: skip


def _of_transformers(weights: Mapping[str, Tensor], tower: Any) -> dict[str, Tensor]:
    """Returns the weights of a model of transformers without those around and above the tower."""
    prefix = f"{tower.base_model_prefix}."
    if any(key.startswith(prefix) for key in weights):
        weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    for old, new in _RENAMED.items():
        weights = {key.removesuffix(old) + new if key.endswith(old) else key: value for key, value in weights.items()}
    if getattr(tower, "pooler", None) is None:
        weights = {key: value for key, value in weights.items() if not key.startswith("pooler.")}
    return dict(weights)
