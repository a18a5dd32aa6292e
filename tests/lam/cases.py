"""Random attention problems for the property tests, and the formula of masked attention written out row by row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from lamzoo.lam import FactoredMask
from lamzoo.lam.ops import Op

OPS: tuple[Op, ...] = ("mul", "add")
BACKENDS = ("eager", "sdpa", "chunked", "auto")  # those that a CPU runs in float64, uncompiled
SERVE_EVERYTHING = ("eager", "sdpa", "auto")  # bias and dropout included


@dataclass(frozen=True)
class Case:
    """The arguments of one call of ``lam_attention``."""

    query: Tensor
    key: Tensor
    value: Tensor
    left: Tensor
    right: Tensor
    op: Op = "mul"
    allowed: Tensor | None = None
    bias: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value, self.left, self.right

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor, FactoredMask]:
        return self.query, self.key, self.value, FactoredMask(self.left, self.right)

    @property
    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("op", "allowed", "bias", "is_causal", "scale")}

    def for_backend(self, backend: str) -> Case:
        """The case without what a backend doesn't serve."""
        return self if backend in SERVE_EVERYTHING else replace(self, bias=None)

    def to(self, dtype: torch.dtype) -> Case:
        names = ("query", "key", "value", "left", "right") + (() if self.bias is None else ("bias",))
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})


def written_out(case: Case) -> Tensor:
    """Softmax attention with M, one query at a time and over the permitted keys alone, so that no infinity appears."""
    query, key, value, left, right = case.tensors
    batch, heads, num_queries, dim = query.shape
    num_keys, scores_shape = key.shape[2], (*query.shape[:3], key.shape[2])
    scale = dim**-0.5 if case.scale is None else case.scale
    left, right = left.expand(batch, heads, -1, -1), right.expand(batch, heads, -1, -1)
    permitted = torch.ones(scores_shape, dtype=torch.bool)
    if case.allowed is not None:
        permitted = permitted & case.allowed
    bias = torch.zeros(scores_shape, dtype=query.dtype) if case.bias is None else case.bias.expand(scores_shape)
    out = torch.zeros(batch, heads, num_queries, value.shape[-1], dtype=query.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(num_queries):
                last = i if case.is_causal else num_keys - 1
                keys = [
                    j for j in range(num_keys) if permitted[b, h, i, j] and bias[b, h, i, j] > -torch.inf and j <= last
                ]
                if not keys:
                    continue
                score = scale * torch.einsum("jd,d->j", key[b, h, keys], query[b, h, i])
                mask = torch.einsum("jr,r->j", right[b, h, keys], left[b, h, i])
                score = (score * mask if case.op == "mul" else score + mask) + bias[b, h, i, keys]
                weight = torch.exp(score - score.max())
                out[b, h, i] = torch.einsum("j,jd->d", weight / weight.sum(), value[b, h, keys])
    return out


def make(
    *,
    seed: int = 0,
    batch: int = 2,
    heads: int = 2,
    queries: int = 4,
    keys: int = 5,
    dim: int = 3,
    value_dim: int = 2,
    rank: int = 2,
    left_shape: tuple[bool, bool] = (True, True),
    right_shape: tuple[bool, bool] = (True, True),
    **options: Any,
) -> Case:
    """Builds a float64 case; ``left_shape`` and ``right_shape`` say whether (batch, heads) are full or 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def factor(full: tuple[bool, bool], tokens: int) -> Tensor:
        return normal(batch if full[0] else 1, heads if full[1] else 1, tokens, rank)

    return Case(
        normal(batch, heads, queries, dim),
        normal(batch, heads, keys, dim),
        normal(batch, heads, keys, value_dim),
        factor(left_shape, queries),
        factor(right_shape, keys),
        **options,
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    size, flag = st.integers(1, 5), st.booleans()
    case = make(
        seed=draw(st.integers(0, 2**20)),
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 3)),
        queries=draw(size),
        keys=draw(size),
        dim=draw(size),
        value_dim=draw(size),
        rank=draw(st.integers(1, 4)),
        left_shape=(draw(flag), draw(flag)),
        right_shape=(draw(flag), draw(flag)),
        op=draw(st.sampled_from(OPS)),
        is_causal=draw(flag),
        scale=draw(st.sampled_from([None, 0.3, 1.5])),
    )
    full = (*case.query.shape[:3], case.key.shape[2])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def shape() -> tuple[int, ...]:
        sizes = tuple(size if draw(flag) else 1 for size in full)
        return sizes[draw(st.integers(0, 4)) :]

    if draw(flag):
        case = replace(case, allowed=torch.rand(shape(), generator=generator) > 0.4)
    if draw(flag):
        bias = torch.randn(shape(), generator=generator, dtype=torch.float64)
        case = replace(case, bias=bias.masked_fill(bias > 1, -torch.inf))
    return case
