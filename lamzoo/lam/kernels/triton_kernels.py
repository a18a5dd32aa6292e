"""The Triton programs of masked attention, one forward and two backward; importing this file requires triton.

Each works on tiles: a tile of the mask, ``left_tile @ right_tile.T``, is computed on chip beside the tile of scores
that it modulates, and neither is written to memory. Exponents are in base 2, because the hardware's exponential is
``exp2``. Tiles that lie within the matrices and below the causal diagonal are computed without checks; the others,
and all tiles under an ``allowed`` mask, are checked elementwise.
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
def _pointers(base, stride, start, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to ``(ROWS, BLOCK)`` elements from row ``start`` on; only the scalar base depends on ``start``."""
    rows = tl.arange(0, ROWS).to(tl.int64)  # 32 bits end at 2^31 elements
    return base + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + tl.arange(0, BLOCK)[None, :])


@triton.jit
def _inside(start, num_rows, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    inside = (start + tl.arange(0, ROWS) < num_rows)[:, None]
    if WIDTH < BLOCK:
        inside = inside & (tl.arange(0, BLOCK) < WIDTH)[None, :]
    return inside


@triton.jit
def _load(
    base, stride, start, num_rows, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHECKED: tl.constexpr
):
    """Loads rows from ``start`` on of a ``(num_rows, WIDTH)`` matrix as ``(ROWS, BLOCK)``, zeros outside of it.

    Unless ``CHECKED``, all rows must exist.
    """
    pointers = _pointers(base, stride, start, ROWS, BLOCK)
    if CHECKED:
        tile = tl.load(pointers, mask=_inside(start, num_rows, ROWS, WIDTH, BLOCK), other=0.0)
    elif WIDTH < BLOCK:
        tile = tl.load(pointers, mask=(tl.arange(0, BLOCK) < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def _load_row(base, columns, num_columns, other, CHECKED: tl.constexpr):
    """Loads elements of a vector of ``num_columns``, ``other`` outside of it."""
    if CHECKED:
        row = tl.load(base + columns, mask=columns < num_columns, other=other)
    else:
        row = tl.load(base + columns)
    return row


@triton.jit
def _store(base, stride, start, num_rows, tile, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Stores a tile as :func:`_load` loads it, in the dtype of the matrix."""
    inside = _inside(start, num_rows, ROWS, WIDTH, BLOCK)
    tl.store(_pointers(base, stride, start, ROWS, BLOCK), tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _product(rows, columns):
    """``rows @ columns.T`` in float32; true float32 for float32 inputs, not the tensor cores' 10-bit TF32."""
    return tl.dot(rows, tl.trans(columns), input_precision="ieee")


@triton.jit
def _to_base_2(scale, MUL: tl.constexpr):
    """Factor of :func:`_logits`, which is free in the subtraction of a maximum; it holds a scale that is positive."""
    factor = 1.4426950408889634
    if MUL:
        factor = scale * 1.4426950408889634
    return factor


@triton.jit
def _logits(scores, mask, scale, MUL: tl.constexpr):
    """Modulated scores, up to the factor of :func:`_to_base_2`."""
    if MUL:
        logits = scores * mask
    else:
        logits = scores * scale + mask
    return logits


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


@triton.jit
def _key_tiles(
    first, num_keys, CAUSAL: tl.constexpr, ALLOWED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Numbers of tiles of keys: those that a tile of queries attends to, and the first of them, which need no check."""
    end = num_keys
    unchecked = num_keys
    if CAUSAL:
        end = tl.minimum(num_keys, first + BLOCK_Q)
        unchecked = tl.minimum(num_keys, first + 1)
    if ALLOWED != "all":
        unchecked = 0
    return tl.cdiv(end, BLOCK_K), unchecked // BLOCK_K


@triton.jit
def _forward_step(
    total, largest, weight_sum, start,
    query_tile, left_tile, queries, key, value, right, allowed, key_n, value_n, right_n, allowed_q, allowed_k,
    num_queries, num_keys, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, MUL: tl.constexpr, CAUSAL: tl.constexpr, ALLOWED: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_RANK: tl.constexpr,
    CHECKED: tl.constexpr,
):  # fmt: skip
    """Adds one tile of keys to the online softmax."""
    keys = start + tl.arange(0, BLOCK_K)
    scores = _product(query_tile, _load(key, key_n, start, num_keys, BLOCK_K, DIM, BLOCK_DIM, CHECKED))
    mask = _product(left_tile, _load(right, right_n, start, num_keys, BLOCK_K, BLOCK_RANK, BLOCK_RANK, CHECKED))
    logits = _logits(scores, mask, scale, MUL)
    if CHECKED:
        permitted = _permitted(
            allowed, queries[:, None], keys[None, :], num_queries, num_keys, allowed_q, allowed_k, CAUSAL, ALLOWED
        )
        logits = tl.where(permitted, logits, float("-inf"))
    factor = _to_base_2(scale, MUL)
    new_largest = tl.maximum(largest, tl.max(logits, 1) * factor)
    pivot = new_largest
    if CHECKED:  # until the first permitted key of a row its maximum is -inf, and -inf - -inf would be NaN
        pivot = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    weights = tl.exp2(logits * factor - pivot[:, None])
    shrink = tl.exp2(largest - pivot)
    value_tile = _load(value, value_n, start, num_keys, BLOCK_K, VALUE_DIM, BLOCK_VALUE, CHECKED)
    total = tl.dot(weights.to(value_tile.dtype), value_tile, total * shrink[:, None], input_precision="ieee")
    return total, new_largest, weight_sum * shrink + tl.sum(weights, 1)


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
    """One tile of queries over all keys, with an online softmax; writes ``out`` and the base-2 log-sum-exp.

    Factors are ``BLOCK_RANK`` wide, zero beyond ``RANK``.
    """
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
    query_tile = _load(query + b * query_b + h * query_h, query_n, first, num_queries, BLOCK_Q, DIM, BLOCK_DIM, True)
    left_tile = _load(left + b * left_b + h * left_h, left_n, first, num_queries, BLOCK_Q, BLOCK_RANK, BLOCK_RANK, True)

    total = tl.zeros([BLOCK_Q, BLOCK_VALUE], dtype=tl.float32)
    largest = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    weight_sum = tl.zeros([BLOCK_Q], dtype=tl.float32)
    end, unchecked = _key_tiles(first, num_keys, CAUSAL, ALLOWED, BLOCK_Q, BLOCK_K)
    if ALLOWED == "all":
        for tile in range(0, unchecked):
            total, largest, weight_sum = _forward_step(
                total, largest, weight_sum, tile * BLOCK_K,
                query_tile, left_tile, queries, key, value, right, allowed,
                key_n, value_n, right_n, allowed_q, allowed_k, num_queries, num_keys, scale,
                DIM, VALUE_DIM, MUL, CAUSAL, ALLOWED, BLOCK_K, BLOCK_DIM, BLOCK_VALUE, BLOCK_RANK, False,
            )  # fmt: skip
    for tile in range(unchecked, end):
        total, largest, weight_sum = _forward_step(
            total, largest, weight_sum, tile * BLOCK_K,
            query_tile, left_tile, queries, key, value, right, allowed,
            key_n, value_n, right_n, allowed_q, allowed_k, num_queries, num_keys, scale,
            DIM, VALUE_DIM, MUL, CAUSAL, ALLOWED, BLOCK_K, BLOCK_DIM, BLOCK_VALUE, BLOCK_RANK, True,
        )  # fmt: skip

    empty = weight_sum == 0
    weight_sum = tl.where(empty, 1.0, weight_sum)
    out += b * out_b + h * out_h
    _store(out, out_n, first, num_queries, total / weight_sum[:, None], BLOCK_Q, VALUE_DIM, BLOCK_VALUE)
    # +inf in a row with nothing allowed makes the backward pass's exp2(logits - logsumexp) zero there, not NaN.
    row_logsumexp = tl.where(empty, float("inf"), largest + tl.log2(weight_sum))
    tl.store(logsumexp + head_index.to(tl.int64) * num_queries + queries, row_logsumexp, mask=queries < num_queries)


@triton.jit
def _queries_step(
    query_total, left_total, start,
    query_tile, left_tile, grad_out_tile, row_logsumexp, row_delta, queries,
    key, value, right, allowed, key_n, value_n, right_n, allowed_q, allowed_k,
    num_queries, num_keys, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, MUL: tl.constexpr, CAUSAL: tl.constexpr, ALLOWED: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_RANK: tl.constexpr,
    CHECKED: tl.constexpr,
):  # fmt: skip
    """Adds what one tile of keys contributes to the gradients of queries and left factors."""
    keys = start + tl.arange(0, BLOCK_K)
    key_tile = _load(key, key_n, start, num_keys, BLOCK_K, DIM, BLOCK_DIM, CHECKED)
    right_tile = _load(right, right_n, start, num_keys, BLOCK_K, BLOCK_RANK, BLOCK_RANK, CHECKED)
    scores = _product(query_tile, key_tile)
    mask = _product(left_tile, right_tile)
    exponents = _logits(scores, mask, scale, MUL) * _to_base_2(scale, MUL) - row_logsumexp[:, None]
    if CHECKED:
        permitted = _permitted(
            allowed, queries[:, None], keys[None, :], num_queries, num_keys, allowed_q, allowed_k, CAUSAL, ALLOWED
        )
        exponents = tl.where(permitted, exponents, float("-inf"))
    value_tile = _load(value, value_n, start, num_keys, BLOCK_K, VALUE_DIM, BLOCK_VALUE, CHECKED)
    grad_logits = tl.exp2(exponents) * (_product(grad_out_tile, value_tile) - row_delta[:, None])
    grad_scores = grad_logits
    grad_mask = grad_logits
    if MUL:
        grad_scores = grad_logits * mask
        grad_mask = grad_logits * (scores * scale)  # before the cast: unscaled, they overflow float16 early
    query_total = tl.dot(grad_scores.to(key_tile.dtype), key_tile, query_total, input_precision="ieee")
    left_total = tl.dot(grad_mask.to(right_tile.dtype), right_tile, left_total, input_precision="ieee")
    return query_total, left_total


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
    query_tile = _load(query + b * query_b + h * query_h, query_n, first, num_queries, BLOCK_Q, DIM, BLOCK_DIM, True)
    left_tile = _load(left + b * left_b + h * left_h, left_n, first, num_queries, BLOCK_Q, BLOCK_RANK, BLOCK_RANK, True)
    out_tile = _load(out + b * out_b + h * out_h, out_n, first, num_queries, BLOCK_Q, VALUE_DIM, BLOCK_VALUE, True)
    grad_out += b * grad_out_b + h * grad_out_h
    grad_out_tile = _load(grad_out, grad_out_n, first, num_queries, BLOCK_Q, VALUE_DIM, BLOCK_VALUE, True)
    row = head_index.to(tl.int64) * num_queries
    row_logsumexp = _load_row(logsumexp + row, queries, num_queries, float("inf"), True)
    row_delta = tl.sum(grad_out_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta + row + queries, row_delta, mask=queries < num_queries)

    query_total = tl.zeros([BLOCK_Q, BLOCK_DIM], dtype=tl.float32)
    left_total = tl.zeros([BLOCK_Q, BLOCK_RANK], dtype=tl.float32)
    end, unchecked = _key_tiles(first, num_keys, CAUSAL, ALLOWED, BLOCK_Q, BLOCK_K)
    if ALLOWED == "all":
        for tile in range(0, unchecked):
            query_total, left_total = _queries_step(
                query_total, left_total, tile * BLOCK_K,
                query_tile, left_tile, grad_out_tile, row_logsumexp, row_delta, queries,
                key, value, right, allowed, key_n, value_n, right_n, allowed_q, allowed_k,
                num_queries, num_keys, scale,
                DIM, VALUE_DIM, MUL, CAUSAL, ALLOWED, BLOCK_K, BLOCK_DIM, BLOCK_VALUE, BLOCK_RANK, False,
            )  # fmt: skip
    for tile in range(unchecked, end):
        query_total, left_total = _queries_step(
            query_total, left_total, tile * BLOCK_K,
            query_tile, left_tile, grad_out_tile, row_logsumexp, row_delta, queries,
            key, value, right, allowed, key_n, value_n, right_n, allowed_q, allowed_k,
            num_queries, num_keys, scale,
            DIM, VALUE_DIM, MUL, CAUSAL, ALLOWED, BLOCK_K, BLOCK_DIM, BLOCK_VALUE, BLOCK_RANK, True,
        )  # fmt: skip

    grad_query += b * grad_query_b + h * grad_query_h
    _store(grad_query, grad_query_n, first, num_queries, query_total * scale, BLOCK_Q, DIM, BLOCK_DIM)
    grad_left += b * grad_left_b + h * grad_left_h
    _store(grad_left, grad_left_n, first, num_queries, left_total, BLOCK_Q, RANK, BLOCK_RANK)


@triton.jit
def _keys_step(
    key_total, value_total, right_total, start,
    key_tile, value_tile, right_tile, keys,
    query, left, grad_out, logsumexp, delta, allowed, query_n, left_n, grad_out_n, allowed_q, allowed_k,
    num_queries, num_keys, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, MUL: tl.constexpr, CAUSAL: tl.constexpr, ALLOWED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_RANK: tl.constexpr,
    CHECKED: tl.constexpr,
):  # fmt: skip
    """Adds what one tile of queries contributes to the gradients of keys, values and right factors."""
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
    grad_scores = grad_logits
    grad_mask = grad_logits
    if MUL:
        grad_scores = grad_logits * mask
        grad_mask = grad_logits * (scores * scale)  # before the cast: unscaled, they overflow float16 early
    key_total = tl.dot(grad_scores.to(query_tile.dtype), query_tile, key_total, input_precision="ieee")
    right_total = tl.dot(grad_mask.to(left_tile.dtype), left_tile, right_total, input_precision="ieee")
    return key_total, value_total, right_total


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

    All tiles of scores are transposed, keys by queries, so that no tile of weights needs transposing on chip. A tile
    of keys that ends beyond the last key needs no check: its rows there are not stored.
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
    key_tile = _load(key + b * key_b + h * key_h, key_n, first, num_keys, BLOCK_K, DIM, BLOCK_DIM, True)
    value_tile = _load(
        value + b * value_b + h * value_h, value_n, first, num_keys, BLOCK_K, VALUE_DIM, BLOCK_VALUE, True
    )
    right_tile = _load(
        right + b * right_b + h * right_h, right_n, first, num_keys, BLOCK_K, BLOCK_RANK, BLOCK_RANK, True
    )

    key_total = tl.zeros([BLOCK_K, BLOCK_DIM], dtype=tl.float32)
    value_total = tl.zeros([BLOCK_K, BLOCK_VALUE], dtype=tl.float32)
    right_total = tl.zeros([BLOCK_K, BLOCK_RANK], dtype=tl.float32)
    begin, diagonal, unchecked, end = _query_tiles(first, num_queries, CAUSAL, ALLOWED, BLOCK_Q, BLOCK_K)
    if ALLOWED == "all":
        for tile in range(diagonal, diagonal + unchecked):
            key_total, value_total, right_total = _keys_step(
                key_total, value_total, right_total, begin + tile * BLOCK_Q,
                key_tile, value_tile, right_tile, keys,
                query, left, grad_out, logsumexp, delta, allowed, query_n, left_n, grad_out_n, allowed_q, allowed_k,
                num_queries, num_keys, scale,
                DIM, VALUE_DIM, MUL, CAUSAL, ALLOWED, BLOCK_Q, BLOCK_DIM, BLOCK_VALUE, BLOCK_RANK, False,
            )  # fmt: skip
    for checked in range(0, end - unchecked):
        tile = tl.where(checked < diagonal, checked, checked + unchecked)
        key_total, value_total, right_total = _keys_step(
            key_total, value_total, right_total, begin + tile * BLOCK_Q,
            key_tile, value_tile, right_tile, keys,
            query, left, grad_out, logsumexp, delta, allowed, query_n, left_n, grad_out_n, allowed_q, allowed_k,
            num_queries, num_keys, scale,
            DIM, VALUE_DIM, MUL, CAUSAL, ALLOWED, BLOCK_Q, BLOCK_DIM, BLOCK_VALUE, BLOCK_RANK, True,
        )  # fmt: skip

    grad_key += b * grad_key_b + h * grad_key_h
    _store(grad_key, grad_key_n, first, num_keys, key_total * scale, BLOCK_K, DIM, BLOCK_DIM)
    grad_value += b * grad_value_b + h * grad_value_h
    _store(grad_value, grad_value_n, first, num_keys, value_total, BLOCK_K, VALUE_DIM, BLOCK_VALUE)
    grad_right += b * grad_right_b + h * grad_right_h
    _store(grad_right, grad_right_n, first, num_keys, right_total, BLOCK_K, RANK, BLOCK_RANK)


@triton.jit
def _query_tiles(
    first, num_queries, CAUSAL: tl.constexpr, ALLOWED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Tiles of queries that attend to a tile of keys.

    Returns the first such query, and the numbers of tiles on the causal diagonal, which are checked, of unchecked
    tiles after them, and of all tiles.
    """
    begin = 0
    diagonal = 0
    if CAUSAL:
        begin = first  # earlier queries see none of these keys
        diagonal = (BLOCK_K + BLOCK_Q - 1) // BLOCK_Q
    count = tl.maximum(num_queries - begin, 0)
    unchecked = tl.maximum(count // BLOCK_Q - diagonal, 0)
    if ALLOWED != "all":
        unchecked = 0
    return begin, diagonal, unchecked, tl.cdiv(count, BLOCK_Q)
