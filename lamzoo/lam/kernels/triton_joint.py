"""A backward pass of masked attention in one Triton program, which adds up gradients of queries with float32 atomics.

It computes scores and mask once where the two programs of ``triton_kernels`` compute them twice, and its gradients of
queries and left factors differ in their last bits from run to run. Importing this file requires triton.
"""

# mypy: disable-error-code="no-untyped-def, import-untyped, import-not-found"

from __future__ import annotations

import triton
import triton.language as tl

from lamzoo.lam.kernels.triton_kernels import (
    _ANY,
    _load,
    _load_row,
    _logits,
    _permitted,
    _product,
    _query_tiles,
    _store,
    _to_base_2,
)


@triton.jit(do_not_specialize=_ANY)
def delta_kernel(
    out, grad_out, delta,
    out_b, out_h, out_n, grad_out_b, grad_out_h, grad_out_n,
    heads, num_queries,
    VALUE_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    """``delta = sum(grad_out * out)`` of one tile of queries."""
    tiles = tl.cdiv(num_queries, BLOCK_Q)
    head_index = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BLOCK_Q
    b = (head_index // heads).to(tl.int64)
    h = (head_index % heads).to(tl.int64)
    queries = first + tl.arange(0, BLOCK_Q)
    out_tile = _load(out + b * out_b + h * out_h, out_n, first, num_queries, BLOCK_Q, VALUE_DIM, BLOCK_VALUE, True)
    grad_out += b * grad_out_b + h * grad_out_h
    grad_out_tile = _load(grad_out, grad_out_n, first, num_queries, BLOCK_Q, VALUE_DIM, BLOCK_VALUE, True)
    row_delta = tl.sum(grad_out_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta + head_index.to(tl.int64) * num_queries + queries, row_delta, mask=queries < num_queries)


@triton.jit
def _add(base, start, num_rows, tile, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHECKED: tl.constexpr):
    """Adds a tile to rows of a contiguous ``(num_rows, BLOCK)`` matrix."""
    rows = tl.arange(0, ROWS)
    pointers = base + tl.cast(start, tl.int64) * BLOCK + (rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :])
    if CHECKED:
        tl.atomic_add(pointers, tile, mask=(start + rows < num_rows)[:, None], sem="relaxed")
    else:
        tl.atomic_add(pointers, tile, sem="relaxed")


@triton.jit
def _joint_step(
    key_total, value_total, right_total, start,
    key_tile, value_tile, right_tile, keys,
    query, left, grad_out, logsumexp, delta, allowed, query_sum, left_sum,
    query_n, left_n, grad_out_n, allowed_q, allowed_k, num_queries, num_keys, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, MUL: tl.constexpr, CAUSAL: tl.constexpr, ALLOWED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_RANK: tl.constexpr,
    CHECKED: tl.constexpr,
):  # fmt: skip
    """Adds the gradients between one tile of queries and one of keys; scores are transposed, keys by queries."""
    queries = start + tl.arange(0, BLOCK_Q)
    query_tile = _load(query, query_n, start, num_queries, BLOCK_Q, DIM, BLOCK_DIM, CHECKED)
    left_tile = _load(left, left_n, start, num_queries, BLOCK_Q, BLOCK_RANK, BLOCK_RANK, CHECKED)
    scores = _product(key_tile, query_tile)
    mask = _product(right_tile, left_tile)
    row_logsumexp = _load_row(logsumexp, queries, num_queries, float("inf"), CHECKED)
    exponents = _logits(scores, mask, scale, MUL) * _to_base_2(scale, MUL) - row_logsumexp[None, :]
    if CHECKED:
        permitted = _permitted(
            allowed, queries[None, :], keys[:, None], num_queries, num_keys, allowed_q, allowed_k, CAUSAL, ALLOWED
        )
        exponents = tl.where(permitted, exponents, float("-inf"))
    weights = tl.exp2(exponents)
    grad_out_tile = _load(grad_out, grad_out_n, start, num_queries, BLOCK_Q, VALUE_DIM, BLOCK_VALUE, CHECKED)
    value_total = tl.dot(weights.to(grad_out_tile.dtype), grad_out_tile, value_total, input_precision="ieee")
    row_delta = _load_row(delta, queries, num_queries, 0.0, CHECKED)
    grad_logits = weights * (_product(value_tile, grad_out_tile) - row_delta[None, :])
    if MUL:
        grad_scores = (grad_logits * mask).to(query_tile.dtype)
        grad_mask = (grad_logits * scores).to(left_tile.dtype)
    else:
        grad_scores = grad_logits.to(query_tile.dtype)
        grad_mask = grad_scores
    key_total = tl.dot(grad_scores, query_tile, key_total, input_precision="ieee")
    right_total = tl.dot(grad_mask, left_tile, right_total, input_precision="ieee")
    query_part = tl.dot(tl.trans(grad_scores), key_tile, input_precision="ieee")
    _add(query_sum, start, num_queries, query_part, BLOCK_Q, BLOCK_DIM, CHECKED)
    left_part = tl.dot(tl.trans(grad_mask), right_tile, input_precision="ieee")
    _add(left_sum, start, num_queries, left_part, BLOCK_Q, BLOCK_RANK, CHECKED)
    return key_total, value_total, right_total


@triton.jit(do_not_specialize=_ANY)
def backward_joint_kernel(
    query, key, value, left, right, allowed, logsumexp, grad_out, delta, grad_key, grad_value, grad_right,
    query_sum, left_sum,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n,
    left_b, left_h, left_n, right_b, right_h, right_n, allowed_b, allowed_h, allowed_q, allowed_k,
    grad_out_b, grad_out_h, grad_out_n, grad_key_b, grad_key_h, grad_key_n,
    grad_value_b, grad_value_h, grad_value_n, grad_right_b, grad_right_h, grad_right_n,
    heads, num_queries, num_keys, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, RANK: tl.constexpr,
    MUL: tl.constexpr, CAUSAL: tl.constexpr, ALLOWED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """One tile of keys over all queries: all gradients; those of ``query`` and ``left`` unscaled, into sums.

    The sums are zero before, contiguous, and as wide as tiles.
    """
    tiles = tl.cdiv(num_keys, BLOCK_K)
    head_index = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BLOCK_K
    b = (head_index // heads).to(tl.int64)
    h = (head_index % heads).to(tl.int64)
    row = head_index.to(tl.int64) * num_queries
    keys = first + tl.arange(0, BLOCK_K)
    query += b * query_b + h * query_h
    left += b * left_b + h * left_h
    grad_out += b * grad_out_b + h * grad_out_h
    logsumexp += row
    delta += row
    query_sum += row * BLOCK_DIM
    left_sum += row * BLOCK_RANK
    if ALLOWED != "all":
        allowed += b * allowed_b + h * allowed_h
    key_tile = _load(key + b * key_b + h * key_h, key_n, first, num_keys, BLOCK_K, DIM, BLOCK_DIM, True)
    value += b * value_b + h * value_h
    value_tile = _load(value, value_n, first, num_keys, BLOCK_K, VALUE_DIM, BLOCK_VALUE, True)
    right += b * right_b + h * right_h
    right_tile = _load(right, right_n, first, num_keys, BLOCK_K, BLOCK_RANK, BLOCK_RANK, True)

    key_total = tl.zeros([BLOCK_K, BLOCK_DIM], dtype=tl.float32)
    value_total = tl.zeros([BLOCK_K, BLOCK_VALUE], dtype=tl.float32)
    right_total = tl.zeros([BLOCK_K, BLOCK_RANK], dtype=tl.float32)
    begin, diagonal, unchecked, end = _query_tiles(first, num_queries, CAUSAL, ALLOWED, BLOCK_Q, BLOCK_K)
    if ALLOWED == "all":
        # Queries sum over keys, so that rows beyond the last key must be zero, unlike in the program by keys.
        unchecked = tl.where(first + BLOCK_K > num_keys, 0, unchecked)
        for tile in range(diagonal, diagonal + unchecked):
            key_total, value_total, right_total = _joint_step(
                key_total, value_total, right_total, begin + tile * BLOCK_Q,
                key_tile, value_tile, right_tile, keys,
                query, left, grad_out, logsumexp, delta, allowed, query_sum, left_sum,
                query_n, left_n, grad_out_n, allowed_q, allowed_k, num_queries, num_keys, scale,
                DIM, VALUE_DIM, MUL, CAUSAL, ALLOWED, BLOCK_Q, BLOCK_DIM, BLOCK_VALUE, BLOCK_RANK, False,
            )  # fmt: skip
    for checked in range(0, end - unchecked):
        tile = tl.where(checked < diagonal, checked, checked + unchecked)
        key_total, value_total, right_total = _joint_step(
            key_total, value_total, right_total, begin + tile * BLOCK_Q,
            key_tile, value_tile, right_tile, keys,
            query, left, grad_out, logsumexp, delta, allowed, query_sum, left_sum,
            query_n, left_n, grad_out_n, allowed_q, allowed_k, num_queries, num_keys, scale,
            DIM, VALUE_DIM, MUL, CAUSAL, ALLOWED, BLOCK_Q, BLOCK_DIM, BLOCK_VALUE, BLOCK_RANK, True,
        )  # fmt: skip

    if MUL:
        right_total = right_total * scale
    grad_key += b * grad_key_b + h * grad_key_h
    _store(grad_key, grad_key_n, first, num_keys, key_total * scale, BLOCK_K, DIM, BLOCK_DIM)
    grad_value += b * grad_value_b + h * grad_value_h
    _store(grad_value, grad_value_n, first, num_keys, value_total, BLOCK_K, VALUE_DIM, BLOCK_VALUE)
    grad_right += b * grad_right_b + h * grad_right_h
    _store(grad_right, grad_right_n, first, num_keys, right_total, BLOCK_K, RANK, BLOCK_RANK)
