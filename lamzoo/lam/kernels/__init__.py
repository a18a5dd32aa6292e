"""The backends of :func:`lamzoo.lam.lam_attention`, and which of them serves a call: the one place to add another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lamzoo.errors import ConfigError
from lamzoo.lam.config import Op
from lamzoo.lam.kernels import chunked, eager, flex, sdpa, triton
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


class Unsupported(Protocol):
    """Says why a kernel can't serve these inputs, as a clause, or None where it can."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: FactoredMask, *, bias: Tensor | None, dropout_p: float
    ) -> str | None: ...


def _serves_everything(
    query: Tensor, key: Tensor, value: Tensor, mask: FactoredMask, *, bias: Tensor | None, dropout_p: float
) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """A kernel, and what it can't do.

    Attributes:
        kernel: the function.
        unsupported: asked before the kernel is called.
        is_exportable: whether it consists of torch's own operators, which other runtimes know.
    """

    kernel: Kernel
    unsupported: Unsupported = _serves_everything
    is_exportable: bool = False


BACKENDS: dict[str, Backend] = {
    "eager": Backend(eager.eager, is_exportable=True),
    "sdpa": Backend(sdpa.sdpa, is_exportable=True),
    "chunked": Backend(chunked.chunked, chunked.unsupported),
    "flex": Backend(flex.flex, flex.unsupported),
    "triton": Backend(triton.triton_attention, triton.unsupported),
}


@dataclass(frozen=True)
class Rule:
    """Where ``"auto"`` takes a backend.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        op: how the mask acts.
        max_rank: columns of the factors, up to which it is the fastest.
        min_scores: ``Nq * Nk``, from which on it is.
        backend: its name.
    """

    device: str
    op: Op
    max_rank: int
    min_scores: int
    backend: str


# The crossovers, in the order in which they are asked; what no rule serves goes to "eager". Those of the CPU are from
# benchmarks/results/kernels.csv (benchmarks/kernels.py measures them); additive masks of some 200 tokens, where one
# layer alone can't say, from a whole ViT-B (benchmarks/speed.py under LAMZOO_ATTENTION_BACKEND). On CUDA nothing was
# measured yet: there, it is what PyTorch's own kernels do well, and "flex" and "triton" wait to be asked for by name.
RULES = (
    Rule("cpu", "mul", max_rank=1, min_scores=0, backend="sdpa"),
    Rule("cpu", "mul", max_rank=2, min_scores=1024**2, backend="sdpa"),
    Rule("cpu", "mul", max_rank=65, min_scores=768**2, backend="chunked"),
    Rule("cpu", "add", max_rank=33, min_scores=160**2, backend="sdpa"),
    Rule("cpu", "add", max_rank=65, min_scores=768**2, backend="chunked"),
    Rule("cuda", "mul", max_rank=4, min_scores=1024**2, backend="sdpa"),
    Rule("cuda", "add", max_rank=65, min_scores=1024**2, backend="sdpa"),
)

_pinned = os.environ.get("LAMZOO_ATTENTION_BACKEND", "auto")


@contextmanager
def attention_backend(name: str) -> Iterator[None]:
    """Pins the backend of every masked attention that doesn't name one itself, in all threads.

    The environment variable ``LAMZOO_ATTENTION_BACKEND``, read when lamzoo is imported, does the same for a process.

    Args:
        name: one of :func:`available_backends`, or ``"auto"``.

    Raises:
        ConfigError: an unknown name.
    """
    global _pinned
    _check_name(name)
    before, _pinned = _pinned, name
    try:
        yield
    finally:
        _pinned = before


def available_backends() -> list[str]:
    """Returns the names that ``backend=`` accepts beside ``"auto"``."""
    return list(BACKENDS)


def choose(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: FactoredMask,
    *,
    op: Op,
    bias: Tensor | None,
    dropout_p: float,
) -> Kernel:
    """Returns the kernel of that name; for ``"auto"`` the pinned one, or the one that the crossovers name.

    Raises:
        ConfigError: an unknown name, or a backend that was asked for by name and can't serve these inputs.
    """
    name = _pinned if backend == "auto" else backend
    _check_name(name)
    if name != "auto":
        entry = BACKENDS[name]
        reason = entry.unsupported(query, key, value, mask, bias=bias, dropout_p=dropout_p)
        if reason:
            raise ConfigError(f"The {name} backend can't serve this attention: {reason}; use 'auto' or another one.")
        return entry.kernel
    rank, scores = mask.left.shape[-1], query.shape[2] * key.shape[2]
    for rule in RULES:
        entry = BACKENDS[rule.backend]
        if (
            (query.device.type, op) == (rule.device, rule.op)
            and rank <= rule.max_rank
            and _at_least(scores, rule.min_scores)
            and (entry.is_exportable or not (torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()))
            and not entry.unsupported(query, key, value, mask, bias=bias, dropout_p=dropout_p)
        ):
            return entry.kernel
    return BACKENDS["eager"].kernel


def _at_least(scores: int | torch.SymInt, bound: int) -> bool:
    if isinstance(scores, torch.SymInt) and torch.compiler.is_exporting():
        return True  # a comparison would limit the exported program to lengths on this side of it
    return bool(scores >= bound)


def _check_name(name: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise ConfigError(f"Unknown attention backend {name!r}; available: auto, {', '.join(BACKENDS)}.")
