"""Gradients of lam_attention: checked by finite differences, equal between backends, finite where all is forbidden."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.autograd import gradcheck

from lamzoo.lam import FactoredMask, lam_attention
from lamzoo.lam.ops import Op
from tests.lam.cases import BACKENDS, OPS, SERVE_EVERYTHING, Case, cases, make


def gradients(case: Case, backend: str) -> tuple[Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in case.tensors]
    options = case.options
    if case.bias is not None:
        leaves.append(case.bias.clone().requires_grad_())
        options["bias"] = leaves[-1]
    query, key, value, left, right = leaves[:5]
    out = lam_attention(query, key, value, FactoredMask(left, right), **options, backend=backend)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return torch.autograd.grad((out * weights).sum(), leaves, materialize_grads=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("masking", ["free", "padded", "causal", "row"])
@pytest.mark.parametrize("shared", [False, True])
def test_gradcheck(op: Op, backend: str, masking: str, shared: bool) -> None:
    full = (not shared, not shared)
    case = make(
        op=op, queries=2, keys=3, right_shape=full, left_shape=(True, not shared), is_causal=masking == "causal"
    )
    allowed = None
    if masking == "padded":
        allowed = torch.tensor([[True, True, False], [True, True, True]])[:, None, None]
    elif masking == "row":
        allowed = torch.tensor([[False, False, False], [True, False, True]])

    def run(query: Tensor, key: Tensor, value: Tensor, left: Tensor, right: Tensor) -> Tensor:
        mask = FactoredMask(left, right)
        options = {**case.options, "allowed": allowed}
        return lam_attention(query, key, value, mask, **options, backend=backend)

    assert gradcheck(run, [tensor.requires_grad_() for tensor in case.tensors])


@pytest.mark.parametrize("backend", ["sdpa", "chunked"])
@settings(derandomize=True, max_examples=120)
@given(case=cases())
def test_gradients_are_those_of_eager_and_finite(backend: str, case: Case) -> None:
    case = case.for_backend(backend)
    for one, other in zip(gradients(case, "eager"), gradients(case, backend), strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_half_precision_gradients_are_finite_with_a_fully_masked_row(op: Op, backend: str, dtype: torch.dtype) -> None:
    allowed = torch.ones(4, 5, dtype=torch.bool)
    allowed[1] = False
    bias = torch.zeros(2, 1, 4, 5)
    bias[0, 0, 2] = -torch.inf
    case = replace(make(op=op).to(dtype), allowed=allowed, bias=bias)
    for gradient in gradients(case.for_backend(backend), backend):
        assert gradient.isfinite().all()
        assert gradient.count_nonzero()


@pytest.mark.parametrize("backend", SERVE_EVERYTHING)
def test_bias_learns(backend: str) -> None:
    case = make(bias=torch.randn(1, 2, 4, 5, dtype=torch.float64))
    bias = gradients(case, backend)[-1]

    def run(bias: Tensor) -> Tensor:
        return lam_attention(*case.args, op=case.op, bias=bias, backend=backend)

    assert bias.count_nonzero() == bias.numel()
    assert case.bias is not None
    assert gradcheck(run, [case.bias.requires_grad_()])
