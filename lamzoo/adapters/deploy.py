"""The form of masked models for inference: :func:`fuse` and :func:`unfuse`."""

from __future__ import annotations

import logging
from typing import TypeVar

from torch import nn

from lamzoo.adapters.hosts import HostTakeover
from lamzoo.adapters.state import few, has_masks, masks_of
from lamzoo.adapters.wrappers import host_path, is_sharded, unwrap
from lamzoo.errors import UnsupportedHostError, class_name

_logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model) -> Model:
    """Gives the attention layers of a model with masks their fused form for inference, in place.

    One linear layer makes queries, keys and values with the columns of the mask in them, and one fused attention does
    the rest: outputs differ by rounding only. Layers take this form in evaluation mode without gradients
    (``torch.inference_mode()``, ``torch.no_grad()``, or frozen parameters), where it is the faster one by stored
    measurements (``python -m benchmarks.fused``); otherwise they compute as before. They also compute as before while
    they get an attention mask, masks are captured, or a backend is pinned by :func:`lamzoo.attention_backend`.

    Tokens may be merged or pruned, before or after this call: merged tokens count by their sizes in the fused form, and
    only the layers that score tokens for pruning compute as before. A rounding error may decide between two merges of
    almost equal cost.

    A layer has a fused form if its mask is additive and of ``hidden=()``, queries, keys and values come from one linear
    layer, and it and those of the mask are plain ones; other layers stay as they are, which the log says.

    Parameters and state dict stay those of the unfused model, so it can be trained and saved as before. The fused form
    is made of copies of them, which are renewed when weights are loaded, assigned or changed by an optimiser; of a
    compiled model that runs on, by ``model.eval()``. Only changes of ``parameter.data`` in place can't be noticed: fuse
    the model again after them. A layer whose linear layers are adapted (LoRA), quantised or get hooks computes as
    before. Hooks on the mask itself aren't called in the fused form.
    ``copy.deepcopy(model)`` keeps an unfused model, ``timm.utils.reparameterize_model(model)`` returns a fused copy.

    Args:
        model: a model with masks, or a wrapper of ``torch.compile`` or data parallelism around one.

    Returns:
        The same model; fusing it again renews the copies.

    Raises:
        UnsupportedHostError: the model has no masks, no layer of it has a fused form (the message has the reason), or
            it is sharded by FSDP.
    """
    masks_of(model)
    inner = unwrap(model)
    if is_sharded(inner):
        raise UnsupportedHostError(
            f"The model ({class_name(inner)}) is sharded by FSDP, and its fused form would copy whole weights; save it "
            "with lamzoo.save_pretrained and fuse the model that lamzoo.create_model loads from there."
        )
    left = fuse_layers(inner)
    if not is_fused(inner):
        path, reason = next(iter(left.items()))
        raise UnsupportedHostError(
            f"No layer of the model ({class_name(inner)}) has a fused form: of {path}, {reason}; use it as it is."
        )
    if left:
        reasons = "; ".join(dict.fromkeys(left.values()))
        _logger.info("%d layers have no fused form and stay as they are (%s): %s", len(left), few(left), reasons)
    return model


def unfuse(model: Model) -> Model:
    """Removes the fused form of the layers of a model, in place; models without it stay as they are.

    Args:
        model: any model.

    Returns:
        The same model.
    """
    for layer in _layers(unwrap(model)):
        layer.unfuse()
    return model


def is_fused(model: nn.Module) -> bool:
    """Returns whether a layer of a model has a fused form, see :func:`fuse`."""
    return any(layer.is_fused for layer in _layers(model))


def fuse_layers(model: nn.Module) -> dict[str, str]:
    """Gives the layers their fused form that have one; returns the reasons of the others by path."""
    left = {}
    for path, module in model.named_modules():
        if isinstance(module, HostTakeover):
            reason = None if module.fuse().is_fused else module.no_fused_form()
        else:
            reason = _OF_HOST if _has_mask(module) else None
        if reason is not None:
            left[host_path(path)] = reason
    return left


def _has_mask(layer: nn.Module) -> bool:
    lam = layer._modules.get("lam")  # which peft may have wrapped
    return lam is not None and has_masks(lam)


_OF_HOST = "the host computes queries, keys and values, and calls lamzoo for the attention alone"


def _layers(model: nn.Module) -> list[HostTakeover]:
    return [module for module in model.modules() if isinstance(module, HostTakeover)]
