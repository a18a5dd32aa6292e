"""The backends of :func:`lamzoo.lam.lam_attention`: the one place where a further one is added."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lamzoo.errors import ConfigError
from lamzoo.lam.config import Op
from lamzoo.lam.kernels.eager import eager
from lamzoo.lam.kernels.sdpa import sdpa
from lamzoo.lam.masks import FactoredMask


class Kernel(Protocol):
    """Masked attention with every argument given; shapes as in :func:`lamzoo.lam.lam_attention`."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: FactoredMask,
        *,
        op: Op,
        allowed: Tensor | None,
        bias: Tensor | None,
        is_causal: bool,
        dropout_p: float,
        scale: float,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Backend:
    """A kernel and where it is the one to use.

    Attributes:
        kernel: the function.
        prefers: whether ``"auto"`` should take it for this query, key, mask and op.
    """

    kernel: Kernel
    prefers: Callable[[Tensor, Tensor, FactoredMask, Op], bool]


def _folding_is_cheap(query: Tensor, key: Tensor, mask: FactoredMask, op: Op) -> bool:
    # Below some 1,000 tokens a dense mask costs nothing measurable; above, folding costs 2-17 % for additive masks
    # and for multiplicative ones of rank 1, and still less than the dense mask up to rank 4.
    return (op == "add" or mask.left.shape[-1] <= 4) and _is_long(query.shape[2] * key.shape[2])


def _is_long(scores: int | torch.SymInt) -> bool:
    if isinstance(scores, torch.SymInt) and torch.compiler.is_exporting():
        return True  # a comparison would limit the exported program to lengths on this side of it
    return bool(scores >= 1024**2)


# In the order in which "auto" asks; the last one serves everything.
BACKENDS: dict[str, Backend] = {
    "sdpa": Backend(sdpa, prefers=_folding_is_cheap),
    "eager": Backend(eager, prefers=lambda *_: True),
}


def available_backends() -> list[str]:
    """Returns the names that ``backend=`` accepts beside ``"auto"``."""
    return list(BACKENDS)


def choose(backend: str, query: Tensor, key: Tensor, mask: FactoredMask, op: Op) -> Kernel:
    """Returns the kernel of that name, or for ``"auto"`` the first that prefers the inputs.

    Raises:
        ConfigError: an unknown name.
    """
    if backend == "auto":
        return next(entry.kernel for entry in BACKENDS.values() if entry.prefers(query, key, mask, op))
    if backend not in BACKENDS:
        raise ConfigError(f"Unknown attention backend {backend!r}; available: auto, {', '.join(BACKENDS)}.")
    return BACKENDS[backend].kernel
