"""The backends of :func:`lamzoo.lam.lam_attention` and the choice between them: the one place to add another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lamzoo.errors import ConfigError
from lamzoo.lam.kernels import chunked, eager, flex, sdpa, triton
from lamzoo.lam.kernels.eager import compute_dtype
from lamzoo.lam.masks import FactoredMask
from lamzoo.lam.ops import Op


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
    """Returns why a kernel doesn't support these inputs, as a clause, or None if it does."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: FactoredMask,
        *,
        op: Op,
        bias: Tensor | None,
        dropout_p: float,
    ) -> str | None: ...


def _supports_all(*_: Any, **__: Any) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """A kernel and its limits.

    Attributes:
        kernel: the function.
        unsupported: called before the kernel.
        is_exportable: whether it consists of torch's own operators, which other runtimes implement.
    """

    kernel: Kernel
    unsupported: Unsupported = _supports_all
    is_exportable: bool = False


BACKENDS: dict[str, Backend] = {
    "eager": Backend(eager.eager, is_exportable=True),
    "sdpa": Backend(sdpa.sdpa, sdpa.unsupported, is_exportable=True),
    "chunked": Backend(chunked.chunked, chunked.unsupported),
    "flex": Backend(flex.flex, flex.unsupported),
    "triton": Backend(triton.triton_attention, triton.unsupported),
}


@dataclass(frozen=True)
class Rule:
    """A range of inputs for which ``"auto"`` picks a backend.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        op: how the mask acts.
        max_rank: largest number of columns of the factors.
        min_scores: smallest ``Nq * Nk``.
        backend: name of the backend.
        is_half: whether it is for float16 and bfloat16 only.
    """

    device: str
    op: Op
    max_rank: int
    min_scores: int
    backend: str
    is_half: bool = False


# The first rule that matches is taken; without one, "eager". Those of the CPU are from benchmarks/results/kernels.csv
# (measured by benchmarks/kernels.py); additive masks of some 200 tokens, for which a single layer is not conclusive,
# from a whole ViT-B (benchmarks/speed.py under LAMZOO_ATTENTION_BACKEND). Those of CUDA for half precision are from
# benchmarks/results/kernels.gpu.csv: large batches of 197 to 16,384 tokens, heads of 64, up to 17 columns, on an H200.
# "triton" is the fastest there without gradients, and in training too but for additive masks of up to 1,024 tokens,
# for which it is 5 % behind to 10 % ahead of "sdpa". Small batches and other widths are assumed to be alike, and the
# other rules of CUDA are the ranges in which PyTorch's own kernels are known to be fast.
RULES = (
    Rule("cpu", "mul", max_rank=1, min_scores=0, backend="sdpa"),
    Rule("cpu", "mul", max_rank=2, min_scores=1024**2, backend="sdpa"),
    Rule("cpu", "mul", max_rank=65, min_scores=768**2, backend="chunked"),
    Rule("cpu", "add", max_rank=33, min_scores=160**2, backend="sdpa"),
    Rule("cpu", "add", max_rank=65, min_scores=768**2, backend="chunked"),
    Rule("cuda", "mul", max_rank=1, min_scores=0, backend="sdpa"),
    Rule("cuda", "mul", max_rank=33, min_scores=160**2, backend="triton", is_half=True),
    Rule("cuda", "add", max_rank=33, min_scores=160**2, backend="triton", is_half=True),
    Rule("cuda", "mul", max_rank=4, min_scores=1024**2, backend="sdpa"),
    Rule("cuda", "add", max_rank=65, min_scores=0, backend="sdpa"),
)

_VARIABLE = "LAMZOO_ATTENTION_BACKEND"
_pinned = os.environ.get(_VARIABLE) or "auto"


@contextmanager
def attention_backend(name: str) -> Iterator[None]:
    """Pins the backend of every masked attention that doesn't name one, in all threads; a context manager.

    The environment variable ``LAMZOO_ATTENTION_BACKEND`` does the same for a process; it is read at import.

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


def pinned() -> str:
    """Returns the name of the pinned backend, ``"auto"`` if there is none."""
    return _pinned


def available_backends() -> list[str]:
    """Returns the names that ``backend=`` accepts besides ``"auto"``."""
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
    """Returns the kernel of a backend; for ``"auto"`` that of the pinned backend, or of the first rule that matches.

    Raises:
        ConfigError: an unknown name, or a named backend that doesn't support these inputs or can't be exported.
    """
    name = _pinned if backend == "auto" else backend
    _check_name(name, pinned=backend == "auto")
    if name != "auto":
        entry = BACKENDS[name]
        reason = entry.unsupported(query, key, value, mask, op=op, bias=bias, dropout_p=dropout_p)
        if _is_exporting() and not entry.is_exportable:
            reason = "an exported program would need lamzoo to run it"
        if reason:
            raise ConfigError(f"The {name} backend doesn't support this attention: {reason}; use 'auto' or another.")
        return entry.kernel
    rank, scores = mask.left.shape[-1], query.shape[2] * key.shape[2]
    for rule in RULES:
        entry = BACKENDS[rule.backend]
        if (
            (query.device.type, op) == (rule.device, rule.op)
            and rank <= rule.max_rank
            and _at_least(scores, rule.min_scores)
            and (not rule.is_half or compute_dtype(query).itemsize == 2)
            and (entry.is_exportable or not _is_exporting())
            and not entry.unsupported(query, key, value, mask, op=op, bias=bias, dropout_p=dropout_p)
        ):
            return entry.kernel
    return BACKENDS["eager"].kernel


def _is_exporting() -> bool:
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return tracing or torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


def _at_least(scores: int | torch.SymInt, bound: int) -> bool:
    if isinstance(scores, torch.SymInt) and torch.compiler.is_exporting():
        return True  # a comparison would limit the exported program to lengths on one side of it
    return bool(scores >= bound)


def _check_name(name: str, pinned: bool = False) -> None:
    if name != "auto" and name not in BACKENDS:
        source = f", from {_VARIABLE}" if pinned else ""  # attention_backend has checked its names
        raise ConfigError(f"Unknown attention backend {name!r}{source}; available: auto, {', '.join(BACKENDS)}.")
