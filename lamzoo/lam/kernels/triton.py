"""The Triton backend: a fused operator that rebuilds the mask tile by tile and never stores an N x N tensor.

This file has the operator as torch sees it: shapes, gradients, FLOPs and unsupported inputs. The GPU programs are in
``triton_kernels``, which is imported with triton itself at the first call.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

from lamzoo.lam.kernels.eager import compute_dtype, lacks, no_second_gradients
from lamzoo.lam.kernels.flops import count_flops
from lamzoo.lam.masks import FactoredMask
from lamzoo.lam.ops import Op

MAX_HEAD_DIM = 128
MAX_RANK = 128

_MUL = {"mul": True, "add": False}  # the programs' branch of each op
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_INSTALLED = importlib.util.find_spec("triton") is not None


def triton_attention(
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
) -> Tensor:
    """Masked attention in one fused kernel; shapes as in :func:`lamzoo.lam.lam_attention`.

    Differentiable once, in query, key, value and both factors. Inside ``torch.autocast`` it computes in the dtype of
    the autocast, as torch's own fused attention does. Float32 is computed as float32, never as TF32.
    """
    count_flops()
    dtype = compute_dtype(query)
    out, _ = lam_attention_forward(
        query.to(dtype), key.to(dtype), value.to(dtype), mask.left.to(dtype), mask.right.to(dtype),
        allowed, op, is_causal, float(scale),
    )  # fmt: skip
    return out


def unsupported(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: FactoredMask,
    *,
    op: Op,
    bias: Tensor | None,
    dropout_p: float,
) -> str | None:
    """Returns why the backend doesn't support these inputs, as a clause, or None if it does."""
    dtype, dims, rank = compute_dtype(query), (query.shape[-1], value.shape[-1]), mask.left.shape[-1]
    if op not in _MUL:
        return f"it has no op={op!r}"
    if (reason := lacks(bias, dropout_p)) is not None:
        return reason
    if dtype not in _DTYPES:
        return f"{dtype} is neither float32, float16 nor bfloat16"
    if {compute_dtype(key), compute_dtype(value)} != {dtype}:
        return f"query, key and value have the dtypes {query.dtype}, {key.dtype} and {value.dtype}"
    for name, size, largest in (
        ("head dim", dims[0], MAX_HEAD_DIM),
        ("value head dim", dims[1], MAX_HEAD_DIM),
        ("mask rank", rank, MAX_RANK),
    ):
        if size > largest:
            return f"{name} {size} is above {largest}"
        if size == 0:
            return f"{name} is 0"
    if not query.device == key.device == value.device == mask.left.device == mask.right.device:
        return "its inputs are on several devices"
    return _unsupported_device(query.device, dtype)


@torch.compiler.assume_constant_result  # a graph can't hold calls of the driver
def _unsupported_device(device: torch.device, dtype: torch.dtype) -> str | None:
    if not _INSTALLED:
        return "triton is not installed"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "its inputs are on the CPU, and TRITON_INTERPRET is not set"
        # Triton 3.9's interpreter multiplies the bits of bfloat16 as if they were integers.
        return "Triton's interpreter can't multiply bfloat16" if dtype == torch.bfloat16 else None
    if device.type != "cuda":
        return f"its inputs are on {device.type!r}, and it needs CUDA"
    if torch.version.hip is not None:
        return "its tiles are sized for the shared memory of NVIDIA GPUs"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU's compute capability is below 8.0"
    if not (os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")):
        return "Triton finds no C compiler, with which it builds its launchers"
    return None


@custom_op("lamzoo::lam_attention_forward", mutates_args=())
def lam_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    left: Tensor,
    right: Tensor,
    allowed: Tensor | None,
    op: str,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The operator of :func:`triton_attention`.

    Args:
        query: ``(B, H, Nq, d)``, float32, float16 or bfloat16, any strides.
        key: ``(B, H, Nk, d)``, the dtype of ``query``.
        value: ``(B, H, Nk, dv)``, likewise.
        left: ``(1|B, 1|H, Nq, R)``, likewise.
        right: ``(1|B, 1|H, Nk, R)``, likewise.
        allowed: bool, broadcastable to ``(B, H, Nq, Nk)``.
        op: ``"mul"`` or ``"add"``.
        is_causal: query ``i`` may attend to keys ``0..i`` only.
        scale: of the scores before the mask, positive.

    Returns:
        The output ``(B, H, Nq, dv)``, and for the backward pass the log-sum-exp of the scores to base 2, float32
        ``(B, H, Nq)``, ``inf`` in rows with nothing allowed.
    """
    from lamzoo.lam.kernels.triton_kernels import forward_kernel

    out, logsumexp = _empty_outputs(query, key, value)
    if out.numel():
        problem = _Problem.of(query, key, value, left, right, allowed, op, is_causal, scale)
        problem.launch(forward_kernel, "forward", out, logsumexp)
    return out, logsumexp


@custom_op("lamzoo::lam_attention_backward", mutates_args=())
def lam_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    left: Tensor,
    right: Tensor,
    allowed: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    op: str,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`lam_attention_forward` in query, key, value, left and right, in their shapes and dtypes."""
    from lamzoo.lam.kernels.triton_kernels import backward_keys_kernel, backward_queries_kernel

    grads = _empty_grads(query, key, value, left, right)
    if not (query.numel() and key.numel()):
        for grad in grads:
            grad.zero_()
        return grads
    # A factor that heads or samples share gets a gradient from each of them, summed at the end in float32.
    lead = query.shape[:2]
    full = [grad if grad.shape[:2] == lead else _empty(grad, lead, torch.float32) for grad in grads]
    problem = _Problem.of(query, key, value, left, right, allowed, op, is_causal, scale)
    grad_out, delta = _rows(grad_out, lead), torch.empty_like(logsumexp)
    problem.launch(backward_queries_kernel, "queries", out, logsumexp, grad_out, full[0], full[3], delta)
    # Second, because it reads the delta that the first one writes.
    problem.launch(backward_keys_kernel, "keys", logsumexp, grad_out, delta, full[1], full[2], full[4])
    for grad, parts in zip(grads, full, strict=True):
        if parts is not grad:
            grad.copy_(parts.sum_to_size(grad.shape))
    return grads


@lam_attention_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(query, key, value)


@lam_attention_backward.register_fake
def _(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, left: Tensor, right: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_grads(query, key, value, left, right)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.op, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_out: Tensor, grad_logsumexp: Tensor) -> tuple[Tensor | None, ...]:
    grads = lam_attention_backward(grad_out, *ctx.saved_tensors, ctx.op, ctx.is_causal, ctx.scale)
    return *grads, None, None, None, None


def _second_backward(ctx: Any, *grads: Tensor) -> None:
    raise no_second_gradients("triton")


lam_attention_forward.register_autograd(_backward, setup_context=_setup_context)
lam_attention_backward.register_autograd(_second_backward)


KernelName = Literal["forward", "queries", "keys"]


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of a kernel.

    Attributes:
        queries: rows of a tile of queries, a power of two, at least 16.
        keys: rows of a tile of keys, likewise.
        warps: groups of 32 threads for each tile.
        stages: tiles in flight between memory and the tensor cores.
        registers: largest number of registers of a thread, by which more tiles share a multiprocessor; None for no
            limit.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


@cache  # called with each launch
def tiles(kernel: KernelName, dim: int, rank: int, itemsize: int) -> Tiles:
    """Returns the tiles of a kernel for the larger of the head dims, a mask rank and the bytes of an element.

    Not autotuned: that would take minutes at the first call of every shape, and the choice is narrow. Half precision up
    to 64 wide uses tiles within 2 % of the fastest of ``benchmarks/tiles.py`` on an H200, minus a stage where the
    mask's tiles are large; the others are the largest tiles that the compiler, for compute capabilities 8.0 and 9.0,
    keeps (nearly) entirely in registers. All need less than 99 KB of shared memory, the limit of GPUs below the A100
    and H100.
    """
    wide = dim > 64 or rank > 64
    if itemsize == 4:  # no tensor cores, so operands fill the registers too
        return Tiles(16, 16, 8, 1) if wide else Tiles(32, 32, 8, 1)
    if wide:
        return {
            "forward": Tiles(64 if rank > 64 else 128, 32, 8, 2),
            "queries": Tiles(64, 32, 8, 2),
            "keys": Tiles(32, 64, 8, 2),
        }[kernel]
    stages = 3 if rank <= 32 else 2
    return {
        "forward": Tiles(128, 64, 8, stages, registers=128),
        "queries": Tiles(64, 64, 4, stages),
        "keys": Tiles(64, 64, 4, 2),
    }[kernel]


@dataclass(frozen=True)
class _Problem:
    """Inputs of the kernels, as ``(B, H, N, width)`` with zero strides where they broadcast.

    Factors are zero beyond their ``rank`` columns, up to the width of a tile: rows of, say, nine elements would start
    at odd addresses, from which a GPU loads one element at a time.
    """

    inputs: tuple[Tensor, ...]
    rank: int
    allowed: Tensor | None
    op: str
    is_causal: bool
    scale: float

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        left: Tensor,
        right: Tensor,
        allowed: Tensor | None,
        op: str,
        is_causal: bool,
        scale: float,
    ) -> _Problem:
        lead, rank = query.shape[:2], left.shape[-1]
        left, right = _padded(left), _padded(right)
        inputs = tuple(_rows(x, lead) for x in (query, key, value, left, right))
        if allowed is not None:
            allowed = allowed.view(torch.uint8).expand(*query.shape[:3], key.shape[2])
        return cls(inputs, rank, allowed, op, is_causal, scale)

    def launch(self, kernel: Any, name: KernelName, *others: Tensor, tile: Tiles | None = None) -> None:
        """Runs a kernel, one program for each tile of each head.

        Args:
            kernel: the program.
            name: of the kernel.
            *others: its further tensors, in its order.
            tile: tile sizes; those of :func:`tiles` by default.
        """
        query, key, value, _, _ = self.inputs
        batch, heads, num_queries, dim = query.shape
        num_keys, value_dim = key.shape[2], value.shape[3]
        blocks = [_block(dim), _block(value_dim), _block(self.rank)]
        tile = tile or tiles(name, max(blocks[:2]), blocks[2], query.element_size())
        rows, block = (num_keys, tile.keys) if name == "keys" else (num_queries, tile.queries)
        # Key padding, the same for all queries, is read as a row.
        kind = "all"
        strides: tuple[int, ...] = (0, 0, 0, 0)
        if self.allowed is not None:
            strides = self.allowed.stride()
            kind = "full" if strides[2] else "keys"
        with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
            kernel[(batch * heads * -(-rows // block),)](
                *self.inputs, self.allowed, *others,
                *_strides(*self.inputs), *strides, *_strides(*others),
                heads, num_queries, num_keys, self.scale,
                DIM=dim, VALUE_DIM=value_dim, RANK=self.rank,
                MUL=_MUL[self.op], CAUSAL=self.is_causal, ALLOWED=kind,
                BLOCK_Q=tile.queries, BLOCK_K=tile.keys,
                BLOCK_DIM=blocks[0], BLOCK_VALUE=blocks[1], BLOCK_RANK=blocks[2],
                num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
                enable_fp_fusion=True,  # Triton's default is to change
            )  # fmt: skip


def _block(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())  # tl.dot takes powers of two from 16 on


def _padded(factor: Tensor) -> Tensor:
    missing = _block(factor.shape[-1]) - factor.shape[-1]
    return F.pad(factor, (0, missing)) if missing else factor


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors if x.ndim == 4 for stride in x.stride()[:3]]  # log-sum-exps are contiguous


def _rows(x: Tensor, lead: torch.Size) -> Tensor:
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    return x.expand(*lead, -1, -1)


def _empty_outputs(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    out = _empty(query, query.shape[:2], query.dtype, value.shape[-1])
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


def _empty_grads(*inputs: Tensor) -> Any:
    return tuple(_empty(x, x.shape[:2], x.dtype) for x in inputs)


def _empty(like: Tensor, lead: torch.Size, dtype: torch.dtype, width: int | None = None) -> Tensor:
    # Tokens before heads in memory, as in the layers before and after: their transposes are then free.
    shape = (lead[0], like.shape[2], lead[1], like.shape[3] if width is None else width)
    return like.new_empty(shape, dtype=dtype).transpose(1, 2)
