"""Weight decay and layer-wise learning rates of masks, where timm's optimisers look for them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lamzoo.lam import Lam
from lamzoo.lam.masks import PositionTable


class NoWeightDecay:
    """``no_weight_decay()`` of a model with masks: the names that its class exempts, and those of the masks."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names

    def __call__(self) -> set[str]:
        return set(self._names)


def exempt_from_weight_decay(model: nn.Module) -> None:
    """Adds the position tables and biases of masks to ``no_weight_decay()``, which timm's optimisers call.

    The method of the model is extended, or added if its class has none; the methods of submodules with masks are
    extended.

    Args:
        model: a model with masks.
    """
    exempt = set(_undecayed(model))
    for module in model.modules():
        own = getattr(module, "no_weight_decay", None)
        if module is not model and not callable(own):
            continue
        names = {name for name, parameter in module.named_parameters() if parameter in exempt}
        if names:
            host = set(own()) if callable(own) else set()
            module.no_weight_decay = NoWeightDecay(frozenset(names | host))  # type: ignore[assignment]


def restore_no_weight_decay(module: nn.Module) -> None:
    """Restores the ``no_weight_decay`` of a module's class, if it was extended."""
    if isinstance(vars(module).get("no_weight_decay"), NoWeightDecay):
        del module.no_weight_decay


def full_rate_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Returns the parameters of masks that layer-wise learning-rate decay must not apply to.

    Layer decay protects pretrained layers. A mask without loaded weights is as new as a classifier, and a mask that
    all layers share belongs to the first layer only by name.
    """
    masks = (module for module in model.modules() if isinstance(module, Lam))
    return {
        parameter for lam in masks if lam.is_fresh or lam.config.layers == "single" for parameter in lam.parameters()
    }


def _undecayed(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, PositionTable):
            yield from module.parameters()
        elif isinstance(module, Lam):
            yield from (parameter for name, parameter in module.named_parameters() if name.endswith(".bias"))
