"""The flex backend: the mask as a score modification of a compiled FlexAttention; an alternative to Triton."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention.flex_attention import flex_attention

from lamzoo.errors import ConfigError
from lamzoo.lam.kernels.eager import compute_dtype
from lamzoo.lam.masks import FactoredMask
from lamzoo.lam.ops import OPS, Op


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
    if dropout_p:
        return "it has no dropout"
    if query.dtype == torch.float64:
        return "it has no float64"
    if 0 in (*query.shape, *key.shape):
        return "it takes no empty tensors"
    if query.device.type == "cpu" and torch.compiler.is_compiling():
        return "it can't be compiled with the rest of a model on the CPU"
    inputs = (query, key, value, *mask, bias)
    if (
        query.device.type == "cpu"
        and torch.is_grad_enabled()
        and any(x is not None and x.requires_grad for x in inputs)
    ):
        return "it has no gradients on the CPU"
    return None


def flex(
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
    """Masked attention through a compiled FlexAttention; shapes as in :func:`lamzoo.lam.lam_attention`.

    Inside ``torch.autocast`` it computes in the dtype of the autocast.

    Raises:
        ConfigError: torch has reached its limit of recompilations. It would fall back to unfused, dense attention
            silently.
    """
    dtype = compute_dtype(query)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    # Outside of the graph: on the CPU, Inductor fails on a score modification that reads a tensor computed in it.
    left, right = mask.left.float(), mask.right.float()
    bias = None if bias is None else bias.float()
    run: Any = _attend if torch.compiler.is_compiling() else _compiled()
    try:
        out: Tensor = run(query, key, value, left, right, allowed, bias, op, is_causal, scale)
    except FailOnRecompileLimitHit as error:
        raise ConfigError(
            "The flex backend has been compiled for as many kinds of inputs as torch allows; raise "
            "torch._dynamo.config.recompile_limit, or use another backend."
        ) from error
    return out


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    left: Tensor,
    right: Tensor,
    allowed: Tensor | None,
    bias: Tensor | None,
    op: Op,
    is_causal: bool,
    scale: float,
) -> Tensor:
    left, right = left.expand(*query.shape[:3], -1), right.expand(*key.shape[:3], -1)
    scores = (*query.shape[:3], key.shape[2])
    bias = None if bias is None else bias.expand(scores)
    allowed = None if allowed is None else allowed.expand(scores)
    apply = OPS[op].apply

    def modulate(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        value = left[b, h, i, 0] * right[b, h, j, 0]
        for column in range(1, left.shape[-1]):  # a score modification can't sum over a dimension
            value = value + left[b, h, i, column] * right[b, h, j, column]
        score = apply(score, value)
        if bias is not None:
            score = score + bias[b, h, i, j]
        if allowed is not None:
            score = torch.where(allowed[b, h, i, j], score, -torch.inf)
        return torch.where(i >= j, score, -torch.inf) if is_causal else score

    out: Any = flex_attention(query, key, value, score_mod=modulate, scale=scale)
    return out


@cache
def _compiled() -> Any:
    return torch.compile(_attend, dynamic=None, fullgraph=True)
