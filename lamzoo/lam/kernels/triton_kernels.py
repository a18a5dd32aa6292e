"""The Triton programs of masked attention, one forward and two backward; importing this file requires triton.

Each works on tiles: a tile of the mask, ``left_tile @ right_tile.T``, is computed on chip beside the tile of scores
that it modulates, and neither is written to memory. Scores are in base 2, because the hardware's exponential is
``exp2``.
"""

# Arguments without an annotation are pointers or integers of the launch, for which Python has no types; triton itself
# is untyped, or missing.
# mypy: disable-error-code="no-untyped-def, import-untyped, import-not-found"

from __future__ import annotations

import triton
import triton.language as tl

# Lengths and heads vary between calls: recompiling for those divisible by 16 would gain nothing.
_ANY = ["heads", "num_queries", "num_keys"]


@triton.jit
def _load(base, stride, rows, num_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Loads the given rows of a ``(num_rows, WIDTH)`` matrix as ``(rows, BLOCK)``, zeros outside of it."""
    columns = tl.arange(0, BLOCK)
    pointers = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]  # 32 bits end at 2^31 elements
    return tl.load(pointers, mask=(rows < num_rows)[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def _store(base, stride, rows, num_rows, tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Stores a tile as :func:`_load` loads it, in the dtype of the matrix."""
    columns = tl.arange(0, BLOCK)
    pointers = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tile = tile.to(base.dtype.element_ty)
    tl.store(pointers, tile, mask=(rows < num_rows)[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def _product(rows, columns):
    """``rows @ columns.T`` in float32; true float32 for float32 inputs, not the tensor cores' 10-bit TF32."""
    return tl.dot(rows, tl.trans(columns), input_precision="ieee")


@triton.jit
def _modulated(scores, mask, MUL: tl.constexpr):
    """Base-2 logits from scaled scores and the mask."""
    if MUL:
        logits = scores * mask
    else:
        logits = scores + mask
    return logits * 1.4426950408889634


@triton.jit
def _permitted(
    allowed, queries, keys, num_queries, num_keys, stride_q, stride_k, CAUSAL: tl.constexpr, ALLOWED: tl.constexpr
):
    """Where attention may go; ``queries`` and ``keys`` are ``(n, 1)`` and ``(1, m)``, or the other way round."""
    permitted = keys < num_keys
    if ALLOWED == "keys":  # key padding: the same vector for every query
        permitted = permitted & (tl.load(allowed + keys.to(tl.int64) * stride_k, mask=permitted, other=0) != 0)
    if ALLOWED == "full":
        pointers = allowed + queries.to(tl.int64) * stride_q + keys.to(tl.int64) * stride_k
        permitted = permitted & (queries < num_queries)
        permitted = permitted & (tl.load(pointers, mask=permitted, other=0) != 0)
    if CAUSAL:
        permitted = permitted & (keys <= queries)
    return permitted


@triton.jit(do_not_specialize=_ANY)
def forward_kernel(
    query, key, value, left, right, allowed, out, logsumexp,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n,
    left_b, left_h, left_n, right_b, right_h, right_n, allowed_b, allowed_h, allowed_q, allowed_k,
    out_b, out_h, out_n,
    heads, num_queries, num_keys, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, RANK: tl.constexpr,
    MUL: tl.constexpr, CAUSAL: tl.constexpr, ALLOWED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """One tile of queries over all keys, with an online softmax; writes ``out`` and the base-2 log-sum-exp."""
    tiles = tl.cdiv(num_queries, BLOCK_Q)
    head_index = tl.program_id(0) // tiles  # tiles of one head run concurrently and share its keys in the cache
    first = tl.program_id(0) % tiles * BLOCK_Q
    b = (head_index // heads).to(tl.int64)
    h = (head_index % heads).to(tl.int64)
    queries = first + tl.arange(0, BLOCK_Q)
    key += b * key_b + h * key_h
    value += b * value_b + h * value_h
    right += b * right_b + h * right_h
    if ALLOWED != "all":
        allowed += b * allowed_b + h * allowed_h
    query_tile = _load(query + b * query_b + h * query_h, query_n, queries, num_queries, DIM, BLOCK_DIM)
    left_tile = _load(left + b * left_b + h * left_h, left_n, queries, num_queries, RANK, BLOCK_RANK)

    total = tl.zeros([BLOCK_Q, BLOCK_VALUE], dtype=tl.float32)
    largest = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    weight_sum = tl.zeros([BLOCK_Q], dtype=tl.float32)
    end = num_keys
    if CAUSAL:
        end = tl.minimum(num_keys, first + BLOCK_Q)
    for start in range(0, end, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        scores = _product(query_tile, _load(key, key_n, keys, num_keys, DIM, BLOCK_DIM)) * scale
        mask = _product(left_tile, _load(right, right_n, keys, num_keys, RANK, BLOCK_RANK))
        permitted = _permitted(
            allowed, queries[:, None], keys[None, :], num_queries, num_keys, allowed_q, allowed_k, CAUSAL, ALLOWED
        )
        logits = tl.where(permitted, _modulated(scores, mask, MUL), float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        # Until the first permitted key of a row its maximum is -inf, and -inf - -inf would be NaN.
        pivot = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp2(logits - pivot[:, None])
        shrink = tl.exp2(largest - pivot)
        value_tile = _load(value, value_n, keys, num_keys, VALUE_DIM, BLOCK_VALUE)
        total = tl.dot(weights.to(value_tile.dtype), value_tile, total * shrink[:, None], input_precision="ieee")
        weight_sum = weight_sum * shrink + tl.sum(weights, 1)
        largest = new_largest

    empty = weight_sum == 0
    weight_sum = tl.where(empty, 1.0, weight_sum)
    _store(
        out + b * out_b + h * out_h, out_n, queries, num_queries, total / weight_sum[:, None], VALUE_DIM, BLOCK_VALUE
    )
    # +inf in a row with nothing allowed makes the backward pass's exp2(logits - logsumexp) zero there, not NaN.
    row_logsumexp = tl.where(empty, float("inf"), largest + tl.log2(weight_sum))
    tl.store(logsumexp + head_index.to(tl.int64) * num_queries + queries, row_logsumexp, mask=queries < num_queries)


@triton.jit(do_not_specialize=_ANY)
def backward_queries_kernel(
    query, key, value, left, right, allowed, out, logsumexp, grad_out, grad_query, grad_left, delta,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n,
    left_b, left_h, left_n, right_b, right_h, right_n, allowed_b, allowed_h, allowed_q, allowed_k,
    out_b, out_h, out_n, grad_out_b, grad_out_h, grad_out_n,
    grad_query_b, grad_query_h, grad_query_n, grad_left_b, grad_left_h, grad_left_n,
    heads, num_queries, num_keys, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, RANK: tl.constexpr,
    MUL: tl.constexpr, CAUSAL: tl.constexpr, ALLOWED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """One tile of queries over all keys: gradients of ``query`` and ``left``, and ``delta = sum(grad_out * out)``."""
    tiles = tl.cdiv(num_queries, BLOCK_Q)
    head_index = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BLOCK_Q
    b = (head_index // heads).to(tl.int64)
    h = (head_index % heads).to(tl.int64)
    queries = first + tl.arange(0, BLOCK_Q)
    key += b * key_b + h * key_h
    value += b * value_b + h * value_h
    right += b * right_b + h * right_h
    if ALLOWED != "all":
        allowed += b * allowed_b + h * allowed_h
    query_tile = _load(query + b * query_b + h * query_h, query_n, queries, num_queries, DIM, BLOCK_DIM)
    left_tile = _load(left + b * left_b + h * left_h, left_n, queries, num_queries, RANK, BLOCK_RANK)
    out_tile = _load(out + b * out_b + h * out_h, out_n, queries, num_queries, VALUE_DIM, BLOCK_VALUE)
    grad_out += b * grad_out_b + h * grad_out_h
    grad_out_tile = _load(grad_out, grad_out_n, queries, num_queries, VALUE_DIM, BLOCK_VALUE)
    row = head_index.to(tl.int64) * num_queries + queries
    row_logsumexp = tl.load(logsumexp + row, mask=queries < num_queries, other=float("inf"))
    row_delta = tl.sum(grad_out_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta + row, row_delta, mask=queries < num_queries)

    query_total = tl.zeros([BLOCK_Q, BLOCK_DIM], dtype=tl.float32)
    left_total = tl.zeros([BLOCK_Q, BLOCK_RANK], dtype=tl.float32)
    end = num_keys
    if CAUSAL:
        end = tl.minimum(num_keys, first + BLOCK_Q)
    for start in range(0, end, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        key_tile = _load(key, key_n, keys, num_keys, DIM, BLOCK_DIM)
        right_tile = _load(right, right_n, keys, num_keys, RANK, BLOCK_RANK)
        scores = _product(query_tile, key_tile) * scale
        mask = _product(left_tile, right_tile)
        permitted = _permitted(
            allowed, queries[:, None], keys[None, :], num_queries, num_keys, allowed_q, allowed_k, CAUSAL, ALLOWED
        )
        logits = tl.where(permitted, _modulated(scores, mask, MUL), float("-inf"))
        weights = tl.exp2(logits - row_logsumexp[:, None])
        grad_weights = _product(grad_out_tile, _load(value, value_n, keys, num_keys, VALUE_DIM, BLOCK_VALUE))
        grad_logits = weights * (grad_weights - row_delta[:, None])
        grad_scores = grad_logits
        grad_mask = grad_logits
        if MUL:
            grad_scores = grad_logits * mask
            grad_mask = grad_logits * scores
        query_total = tl.dot(grad_scores.to(key_tile.dtype), key_tile, query_total, input_precision="ieee")
        left_total = tl.dot(grad_mask.to(right_tile.dtype), right_tile, left_total, input_precision="ieee")

    grad_query += b * grad_query_b + h * grad_query_h
    _store(grad_query, grad_query_n, queries, num_queries, query_total * scale, DIM, BLOCK_DIM)
    grad_left += b * grad_left_b + h * grad_left_h
    _store(grad_left, grad_left_n, queries, num_queries, left_total, RANK, BLOCK_RANK)


@triton.jit(do_not_specialize=_ANY)
def backward_keys_kernel(
    query, key, value, left, right, allowed, logsumexp, grad_out, delta, grad_key, grad_value, grad_right,
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
    """One tile of keys over all queries: gradients of ``key``, ``value`` and ``right``.

    All tiles of scores are transposed, keys by queries, so that no tile of weights needs transposing on chip.
    """
    tiles = tl.cdiv(num_keys, BLOCK_K)
    head_index = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BLOCK_K
    b = (head_index // heads).to(tl.int64)
    h = (head_index % heads).to(tl.int64)
    keys = first + tl.arange(0, BLOCK_K)
    query += b * query_b + h * query_h
    left += b * left_b + h * left_h
    grad_out += b * grad_out_b + h * grad_out_h
    logsumexp += head_index.to(tl.int64) * num_queries
    delta += head_index.to(tl.int64) * num_queries
    if ALLOWED != "all":
        allowed += b * allowed_b + h * allowed_h
    key_tile = _load(key + b * key_b + h * key_h, key_n, keys, num_keys, DIM, BLOCK_DIM)
    value_tile = _load(value + b * value_b + h * value_h, value_n, keys, num_keys, VALUE_DIM, BLOCK_VALUE)
    right_tile = _load(right + b * right_b + h * right_h, right_n, keys, num_keys, RANK, BLOCK_RANK)

    key_total = tl.zeros([BLOCK_K, BLOCK_DIM], dtype=tl.float32)
    value_total = tl.zeros([BLOCK_K, BLOCK_VALUE], dtype=tl.float32)
    right_total = tl.zeros([BLOCK_K, BLOCK_RANK], dtype=tl.float32)
    begin = 0
    if CAUSAL:
        begin = first  # earlier queries see none of these keys
    for start in range(begin, num_queries, BLOCK_Q):
        queries = start + tl.arange(0, BLOCK_Q)
        query_tile = _load(query, query_n, queries, num_queries, DIM, BLOCK_DIM)
        left_tile = _load(left, left_n, queries, num_queries, RANK, BLOCK_RANK)
        scores = _product(key_tile, query_tile) * scale
        mask = _product(right_tile, left_tile)
        permitted = _permitted(
            allowed, queries[None, :], keys[:, None], num_queries, num_keys, allowed_q, allowed_k, CAUSAL, ALLOWED
        )
        logits = tl.where(permitted, _modulated(scores, mask, MUL), float("-inf"))
        row_logsumexp = tl.load(logsumexp + queries, mask=queries < num_queries, other=float("inf"))
        weights = tl.exp2(logits - row_logsumexp[None, :])
        grad_out_tile = _load(grad_out, grad_out_n, queries, num_queries, VALUE_DIM, BLOCK_VALUE)
        value_total = tl.dot(weights.to(grad_out_tile.dtype), grad_out_tile, value_total, input_precision="ieee")
        row_delta = tl.load(delta + queries, mask=queries < num_queries, other=0.0)
        grad_logits = weights * (_product(value_tile, grad_out_tile) - row_delta[None, :])
        grad_scores = grad_logits
        grad_mask = grad_logits
        if MUL:
            grad_scores = grad_logits * mask
            grad_mask = grad_logits * scores
        key_total = tl.dot(grad_scores.to(query_tile.dtype), query_tile, key_total, input_precision="ieee")
        right_total = tl.dot(grad_mask.to(left_tile.dtype), left_tile, right_total, input_precision="ieee")

    grad_key += b * grad_key_b + h * grad_key_h
    _store(grad_key, grad_key_n, keys, num_keys, key_total * scale, DIM, BLOCK_DIM)
    grad_value += b * grad_value_b + h * grad_value_h
    _store(grad_value, grad_value_n, keys, num_keys, value_total, VALUE_DIM, BLOCK_VALUE)
    grad_right += b * grad_right_b + h * grad_right_h
    _store(grad_right, grad_right_n, keys, num_keys, right_total, RANK, BLOCK_RANK)
