"""Multiply-accumulates and parameters of a model, and the share of them that its learnable masks add."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lamzoo.adapters.wrappers import unwrap
from lamzoo.errors import ConfigError, class_name
from lamzoo.lam import FactoredMask, Lam
from lamzoo.profiling.inputs import Inputs, as_arguments, default_input, evaluating

_GIGA = 1e9


@dataclass(frozen=True)
class Profile:
    """What one forward pass computes, and what the model holds.

    MACs are multiply-accumulates of matrix products and convolutions, attention included, half of what PyTorch counts
    as FLOPs; activations, normalisations and element-wise products are not counted, as everywhere in this field.

    Attributes:
        gmacs: 10^9 MACs of the whole forward pass.
        lam_gmacs: the part that the masks add to the plain backbone: their networks, and the product
            ``left @ right.T`` (``Hm Nq Nk R`` MACs a layer). Always the dense product of the eager backend, so that
            the figure does not depend on the device or on which backend ``"auto"`` picks.
        params_m: 10^6 parameters.
        lam_params_m: the masks' part of them.
        by_layer: GMACs of each module that computes any, by its path, its submodules included
            (``"blocks.3"``, ``"blocks.3.attn"``, ``"blocks.3.attn.lam"``: the mask network alone).
    """

    gmacs: float
    lam_gmacs: float
    params_m: float
    lam_params_m: float
    by_layer: dict[str, float] = field(repr=False)


def profile(model: nn.Module, input: Inputs | None = None) -> Profile:
    """Counts the MACs of one forward pass and the parameters of a model, with or without masks.

    The pass is really run, once, in evaluation mode and without gradients; the model is left as it was.

    Args:
        model: any module; what wrappers of ``torch.compile`` and data parallelism hold is counted.
        input: what the model is called with, a tensor or a sequence of positional arguments. By default one image of
            the size that the model was built for, or one video and one text. The figures are those of the whole input,
            so pass a batch of one.

    Returns:
        The profile.

    Raises:
        ConfigError: the input size is unknown, an attention operation ran that this PyTorch can't count, or nothing at
            all was counted.
    """
    model = unwrap(model)
    inputs = as_arguments(default_input(model) if input is None else input)
    products: list[int] = []
    counter = FlopCounterMode(display=False)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_without_fastpath())
        stack.enter_context(_dense_products(model, products))
        stack.enter_context(counter)
        stack.enter_context(_AttentionCheck(counter))
        model(*inputs)
    by_layer = _by_layer(model, counter)
    total = counter.get_total_flops() / 2
    if not total:
        raise ConfigError(f"No operation of {class_name(model)} could be counted; profile the model uncompiled.")
    lams = {path: module for path, module in model.named_modules() if isinstance(module, Lam)}
    lam_params = {id(p): p.numel() for lam in lams.values() for p in lam.parameters()}
    return Profile(
        gmacs=total / _GIGA,
        lam_gmacs=sum(by_layer.get(path, 0.0) for path in lams) + sum(products) / _GIGA,
        params_m=sum(p.numel() for p in model.parameters()) / 1e6,
        lam_params_m=sum(lam_params.values()) / 1e6,
        by_layer=by_layer,
    )


def _by_layer(model: nn.Module, counter: FlopCounterMode) -> dict[str, float]:
    counts = counter.get_flop_counts()
    paths = [path for path, _ in model.named_modules()]
    flops = {path: sum(counts.get(f"{type(model).__name__}.{path}", {}).values()) for path in paths}
    return {path: count / 2 / _GIGA for path, count in flops.items() if count}


@contextmanager
def _without_fastpath() -> Iterator[None]:
    # nn.MultiheadAttention's fast path is one fused operation that no counter knows.
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _dense_products(model: nn.Module, products: list[int]) -> Iterator[None]:
    """Runs every mask on the eager backend and notes the MACs of its ``left @ right.T`` in ``products``."""

    def note(lam: nn.Module, args: Any, mask: FactoredMask) -> None:
        _, heads, queries, rank = mask.left.shape
        batch = max(mask.left.shape[0], mask.right.shape[0])
        products.append(batch * heads * queries * mask.right.shape[2] * rank)

    lams = [module for module in model.modules() if isinstance(module, Lam)]
    backends = [lam.backend for lam in lams]
    handles = [lam.register_forward_hook(note) for lam in lams]
    try:
        for lam in lams:
            lam.backend = "eager"
        yield
    finally:
        for lam, backend, handle in zip(lams, backends, handles, strict=True):
            lam.backend = backend
            handle.remove()


class _AttentionCheck(TorchDispatchMode):
    """Raises where a fused attention operation adds nothing to the count, as some PyTorch builds have it."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _is_attention(str(func)):
            return func(*args, **kwargs)
        before = self.counter.get_total_flops()
        out = func(*args, **kwargs)
        if self.counter.get_total_flops() == before and args[0].numel():
            raise ConfigError(
                f"torch {torch.__version__} counts {func} as zero, so attention would be missing from the MACs; "
                "use another build of torch, or switch fused attention off in the model."
            )
        return out


def _is_attention(name: str) -> bool:
    return "attention" in name or "transformer_encoder_layer_fwd" in name
