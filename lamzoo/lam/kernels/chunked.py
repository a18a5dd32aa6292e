"""The chunked backend: exact attention on the CPU by blocks of queries, with memory linear in the length."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lamzoo.lam.kernels.eager import compute_dtype, lacks, no_second_gradients
from lamzoo.lam.kernels.flops import count_flops
from lamzoo.lam.masks import FactoredMask
from lamzoo.lam.ops import OPS, Op

_BLOCK_BYTES = 2**21  # of one block of scores: smaller ones add overhead, larger ones don't fit the cache


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
    return lacks(bias, dropout_p)


def chunked(
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
    """Masked attention, one head and one block of queries at a time; shapes as in :func:`lamzoo.lam.lam_attention`.

    The backward pass recomputes each block. Inside ``torch.autocast`` it computes in the
    dtype of the autocast, as torch's own fused attention does.
    """
    count_flops()
    dtype = compute_dtype(query)
    query, key, value, left, right = (x.to(dtype) for x in (query, key, value, *mask))
    out: Tensor = _forward(query, key, value, left, right, allowed, op, is_causal, scale)
    return out


@torch.library.custom_op("lamzoo::chunked_attention", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    left: Tensor,
    right: Tensor,
    allowed: Tensor | None,
    op: str,
    is_causal: bool,
    scale: float,
) -> Tensor:
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    blocks = _Blocks(query, key, left, right, allowed, op, is_causal, scale)
    for (b, h), rows in blocks:
        torch.mm(blocks.weights(b, h, rows), value[b, h], out=out[b, h, rows])
    return out


@torch.library.custom_op("lamzoo::chunked_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    left: Tensor,
    right: Tensor,
    allowed: Tensor | None,
    out: Tensor,
    op: str,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # Sums over blocks, and over the heads or samples that share a factor, are kept in float32 at least.
    precise = torch.promote_types(query.dtype, torch.float32)
    grads = [torch.zeros_like(x, dtype=precise) for x in (query, key, value, left, right)]
    grad_query, grad_key, grad_value, grad_left, grad_right = grads
    delta = (grad * out).sum(-1, keepdim=True, dtype=precise).to(query.dtype)
    blocks = _Blocks(query, key, left, right, allowed, op, is_causal, scale, count=3)
    for (b, h), rows in blocks:
        lb, rb = _at(left, b, h), _at(right, b, h)
        weights = blocks.weights(b, h, rows)
        grad_rows = grad[b, h, rows]
        _add_product(grad_value[b, h], weights.mT, grad_rows)
        # Of the modulated scores; zero where attention is forbidden, like the weights.
        grad_scores = torch.mm(grad_rows, value[b, h].mT, out=blocks.buffer(2, rows))
        grad_scores.sub_(delta[b, h, rows]).mul_(weights)
        grad_scores, grad_mask = OPS[op].gradients(
            grad_scores, partial(blocks.scores, b, h, rows), partial(blocks.mask, b, h, rows)
        )
        _add_product(grad_left[lb][rows], grad_mask, right[rb])
        _add_product(grad_right[rb], grad_mask.mT, left[lb][rows])
        _add_product(grad_query[b, h, rows], grad_scores, key[b, h])
        _add_product(grad_key[b, h], grad_scores.mT, blocks.query[b, h, rows])
    grad_query *= scale
    return tuple(x.to(query.dtype) for x in grads)  # type: ignore[return-value]


def _add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """Adds ``one @ other`` to ``total``, whose dtype may be wider."""
    if total.dtype == one.dtype:
        total.addmm_(one, other)
    else:
        total.add_(one @ other)


class _Blocks:
    """The blocks of a problem, ``((sample, head), rows)`` each, and the tensors computed for each of them.

    Results are in buffers that the next call of the same method overwrites: allocating memory for each block costs more
    than the computation in it.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        left: Tensor,
        right: Tensor,
        allowed: Tensor | None,
        op: str,
        is_causal: bool,
        scale: float,
        count: int = 2,
    ) -> None:
        self.query, self.key, self.left, self.right = query * scale, key, left, right
        self.op = op
        self.allowed = None if allowed is None else allowed.expand(*query.shape[:3], key.shape[2])
        self.keys = torch.arange(key.shape[2], device=key.device) if is_causal else None
        size = max(16, _BLOCK_BYTES // max(1, key.shape[2] * query.element_size()) // 16 * 16)
        self.rows = min(size, max(1, query.shape[2]))
        self.buffers = query.new_empty(count, self.rows, key.shape[2])

    def __iter__(self) -> Iterator[tuple[tuple[int, int], slice]]:
        batch, heads, queries, _ = self.query.shape
        for b in range(batch):
            for h in range(heads):
                for first in range(0, queries, self.rows):
                    yield (b, h), slice(first, min(first + self.rows, queries))

    def scores(self, b: int, h: int, rows: slice) -> Tensor:
        """Returns the scaled scores without the mask, ``(rows, Nk)``."""
        return torch.mm(self.query[b, h, rows], self.key[b, h].mT, out=self.buffer(0, rows))

    def mask(self, b: int, h: int, rows: slice) -> Tensor:
        """Returns the mask's values, ``(rows, Nk)``."""
        left, right = self.left[_at(self.left, b, h)], self.right[_at(self.right, b, h)]
        return torch.mm(left[rows], right.mT, out=self.buffer(1, rows))

    def weights(self, b: int, h: int, rows: slice) -> Tensor:
        """Returns the attention weights, ``(rows, Nk)``; rows with nothing allowed are zero."""
        scores, mask = self.scores(b, h, rows), self.mask(b, h, rows)
        scores = OPS[self.op].apply_(scores, mask)
        forbidden = self._forbidden(b, h, rows)
        if forbidden is not None:
            scores.masked_fill_(forbidden, -torch.inf)
        weights = torch.softmax(scores, dim=-1, out=mask)  # no longer needed; a third buffer would cost cache
        if forbidden is not None:
            weights.masked_fill_(forbidden, 0.0)  # the softmax of -inf alone is NaN
        return weights

    def _forbidden(self, b: int, h: int, rows: slice) -> Tensor | None:
        forbidden = None if self.allowed is None else ~self.allowed[b, h, rows]
        if self.keys is not None:
            later = self.keys > torch.arange(rows.start, rows.stop, device=self.keys.device)[:, None]
            forbidden = later if forbidden is None else forbidden | later
        return forbidden

    def buffer(self, index: int, rows: slice) -> Tensor:
        """Returns one of the ``count`` buffers, ``(rows, Nk)``; the methods above use the first two."""
        return self.buffers[index, : rows.stop - rows.start]


def _at(factor: Tensor, b: int, h: int) -> tuple[int, int]:
    """Returns the indices of a sample and head in a factor that samples or heads may share."""
    return b if factor.shape[0] > 1 else 0, h if factor.shape[1] > 1 else 0


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


@_backward.register_fake
def _(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in inputs[:5])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.op, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = _backward(grad, *ctx.saved_tensors, ctx.op, ctx.is_causal, ctx.scale)
    return *grads, None, None, None, None


def _second_backward(ctx: Any, *grads: Tensor) -> None:
    raise no_second_gradients("chunked")


_forward.register_autograd(_autograd, setup_context=_setup_context)
_backward.register_autograd(_second_backward)
