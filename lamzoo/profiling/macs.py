"""Multiply-accumulates and parameters of a model, and the share added by its learnable masks."""

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
from lamzoo.lam.fused import FusedAttention
from lamzoo.profiling.inputs import Inputs, as_arguments, default_input, evaluating

_GIGA = 1e9


@dataclass(frozen=True)
class Profile:
    """Computational cost and size of a model.

    MACs are multiply-accumulates of matrix products and convolutions, including attention, half of PyTorch's FLOPs;
    activations, normalisations and element-wise products are not counted, as is usual.

    Attributes:
        gmacs: MACs of the forward pass in 10^9.
        lam_gmacs: MACs added by the masks, in 10^9: their networks, and the product ``left @ right.T`` (``Hm Nq Nk R``
            MACs per layer). Always the dense product of the eager backend, so that the figure is independent of the
            device and of the backend chosen by ``"auto"``. Of a layer that takes its fused form (:func:`lamzoo.fuse`),
            what the additional columns of queries, keys and values cost in the linear layer and in the attention.
        params_m: parameters in 10^6.
        lam_params_m: parameters of the masks in 10^6.
        by_layer: GMACs of each module with any, by path and including its submodules (``"blocks.3"``,
            ``"blocks.3.attn"``, ``"blocks.3.attn.lam"``: only the mask network).
        fused_layers: number of layers that took their fused form.
    """

    gmacs: float
    lam_gmacs: float
    params_m: float
    lam_params_m: float
    by_layer: dict[str, float] = field(repr=False)
    fused_layers: int = 0


def profile(model: nn.Module, input: Inputs | None = None) -> Profile:
    """Counts the MACs of one forward pass and the parameters of a model, with or without masks.

    The model runs once, in evaluation mode and without gradients; its state is unchanged.

    Args:
        model: any module; wrappers of ``torch.compile`` and data parallelism are ignored.
        input: the input, a tensor or a sequence of positional arguments; by default one image of the size that the
            model was built for, or one video and one text. The figures refer to the whole input, so use a batch size of
            one.

    Returns:
        The profile.

    Raises:
        ConfigError: the input size is unknown, this PyTorch can't count an attention operation of the model, or no
            operation was counted.
    """
    model = unwrap(model)
    inputs = as_arguments(default_input(model) if input is None else input)
    products: list[int] = []
    fused: list[int] = []
    counter = FlopCounterMode(display=False)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_frozen(model))
        stack.enter_context(_without_fastpath())
        stack.enter_context(_dense_products(model, products))
        stack.enter_context(_fused_columns(model, fused))
        stack.enter_context(counter)
        stack.enter_context(_AttentionCheck(counter))
        model(*inputs)
    by_layer = _by_layer(model, counter)
    total = counter.get_total_flops() / 2
    if not total:
        raise ConfigError(f"No operation of {class_name(model)} was counted; profile the model uncompiled.")
    lams = {path: module for path, module in model.named_modules() if isinstance(module, Lam)}
    lam_params = {id(p): p.numel() for lam in lams.values() for p in lam.parameters()}
    networks = sum(_network_gmacs(path, lam, by_layer) for path, lam in lams.items())
    return Profile(
        gmacs=total / _GIGA,
        lam_gmacs=networks + sum(products + fused) / _GIGA,
        params_m=sum(p.numel() for p in model.parameters()) / 1e6,
        lam_params_m=sum(lam_params.values()) / 1e6,
        by_layer=by_layer,
        fused_layers=len(fused),
    )


def _network_gmacs(path: str, lam: Lam, by_layer: dict[str, float]) -> float:
    """Returns the GMACs of a mask's network, also of the parts that run outside of its forward pass, as in merging."""
    parts = () if lam.network is None else lam.network.named_children()
    return sum(by_layer.get(f"{path}.network.{name}", 0.0) for name, _ in parts)


def _by_layer(model: nn.Module, counter: FlopCounterMode) -> dict[str, float]:
    counts = counter.get_flop_counts()
    paths = [path for path, _ in model.named_modules()]
    flops = {path: sum(counts.get(f"{type(model).__name__}.{path}", {}).values()) for path in paths}
    return {path: count / 2 / _GIGA for path, count in flops.items() if count}


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    # FlopCounterMode needs the gradient function of a module's inputs that require gradients, and a view of a
    # parameter made without gradients, as in the attention pooling of SigLIP, has none.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _without_fastpath() -> Iterator[None]:
    # nn.MultiheadAttention's fast path is one fused operation that FlopCounterMode does not support.
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _dense_products(model: nn.Module, products: list[int]) -> Iterator[None]:
    """Runs every mask on the eager backend and records the MACs of its ``left @ right.T`` in ``products``."""

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


@contextmanager
def _fused_columns(model: nn.Module, macs: list[int]) -> Iterator[None]:
    """Records the MACs that the masks of fused layers add, in ``macs``."""

    def note(layer: nn.Module, args: Any) -> None:
        assert isinstance(layer, FusedAttention)
        tokens, lam, *_ = args
        batch, queries, _ = tokens.shape
        macs.append(batch * layer.mask_macs(queries, lam.key_tokens(tokens).shape[1]))

    layers = [module for module in model.modules() if isinstance(module, FusedAttention)]
    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _AttentionCheck(TorchDispatchMode):
    """Raises if a fused attention operation adds nothing to the count, as in some PyTorch builds."""

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
                "use another build of torch, or disable fused attention in the model."
            )
        return out


def _is_attention(name: str) -> bool:
    return "attention" in name or "transformer_encoder_layer_fwd" in name
