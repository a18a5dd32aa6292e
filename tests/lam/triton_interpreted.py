"""The Triton backend through Triton's interpreter, on the CPU.

Whether kernels are interpreted is settled when triton is imported, for the whole process; so this file isn't collected
with the others, and ``test_triton.py`` runs it in a process of its own. By hand:
``TRITON_INTERPRET=1 python -m pytest tests/lam/triton_interpreted.py``.
"""

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lamzoo.errors import ConfigError
from lamzoo.lam import FactoredMask
from lamzoo.lam.kernels import Kernel
from lamzoo.lam.kernels.eager import eager
from lamzoo.lam.kernels.triton import lam_attention_backward, lam_attention_forward, triton_attention
from lamzoo.lam.ops import Op
from tests.lam.cases import OPS, Case, cases, make

each_op = pytest.mark.parametrize("op", OPS)


@pytest.fixture(autouse=True, scope="session")
def _interpreted() -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"


def outputs_and_gradients(kernel: Kernel, case: Case, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """The output, then the gradients of query, key, value, left and right of a fixed weighted sum of it."""
    query, key, value, left, right = leaves
    scale = query.shape[-1] ** -0.5 if case.scale is None else case.scale
    out = kernel(
        query, key, value, FactoredMask(left, right),
        op=case.op, allowed=case.allowed, bias=None, is_causal=case.is_causal, dropout_p=0.0, scale=scale,
    )  # fmt: skip
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view_as(out).to(out.dtype)
    return out, *torch.autograd.grad((out * weights).sum(), leaves)


def check_equals_eager(
    case: Case, dtype: torch.dtype = torch.float32, tolerance: float = 1e-5, device: str = "cpu"
) -> None:
    """Compares with the eager kernel in float64 on the same rounded inputs, relative to the largest number of each."""
    tempered = replace(case, left=case.left / case.left.shape[-1])  # for scores of the usual size
    if case.allowed is not None:
        tempered = replace(tempered, allowed=case.allowed.to(device))
    leaves = [x.to(device, dtype).requires_grad_() for x in tempered.tensors]
    found = outputs_and_gradients(triton_attention, tempered, leaves)
    expected = outputs_and_gradients(eager, tempered, [x.detach().double().requires_grad_() for x in leaves])
    names = ("out", "query", "key", "value", "left", "right")
    for name, one, other in zip(names, found, expected, strict=True):
        assert one.dtype == dtype and one.shape == other.shape, name
        largest = max(1.0, other.abs().max().item())
        torch.testing.assert_close(
            one.double(), other, atol=tolerance * largest, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


SIZES = {  # queries, keys, head dim, value head dim, rank; below, at and above the sizes of a tile
    "one token": (1, 1, 3, 3, 1),
    "15 and 17": (15, 17, 32, 32, 9),
    "16 and 16": (16, 16, 64, 64, 33),
    "65 and 15, narrow value": (65, 15, 64, 20, 9),
    "17 and 130, wide value": (17, 130, 32, 64, 2),
    "33 and 20, everything wide": (33, 20, 128, 128, 65),
}


@each_op
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_equals_eager_with_all_gradients_at_every_size(size: tuple[int, ...], op: Op) -> None:
    queries, keys, dim, value_dim, rank = size
    check_equals_eager(make(op=op, batch=1, queries=queries, keys=keys, dim=dim, value_dim=value_dim, rank=rank))


@each_op
@pytest.mark.parametrize(
    ("left_shape", "right_shape"),
    [((True, False), (False, False)), ((True, False), (True, False)), ((True, True), (False, True)),
     ((False, False), (True, True))],
)  # fmt: skip
def test_factors_shared_by_heads_or_samples_get_the_sum_of_their_gradients(
    left_shape: tuple[bool, bool], right_shape: tuple[bool, bool], op: Op
) -> None:
    check_equals_eager(make(op=op, queries=20, keys=18, rank=9, left_shape=left_shape, right_shape=right_shape))


@each_op
@pytest.mark.parametrize(("queries", "keys"), [(65, 65), (20, 40), (40, 20)])
def test_causal_attention_equals_eager(queries: int, keys: int, op: Op) -> None:
    check_equals_eager(make(op=op, batch=1, heads=1, queries=queries, keys=keys, is_causal=True))


@each_op
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("queries", "keys", "rank"), [(64, 64, 1), (70, 100, 9), (100, 70, 17)])
def test_whole_tiles_and_the_rest_equal_eager(queries: int, keys: int, rank: int, is_causal: bool, op: Op) -> None:
    sizes = {"queries": queries, "keys": keys, "dim": 16, "value_dim": 32, "rank": rank}
    check_equals_eager(make(op=op, batch=1, heads=1, is_causal=is_causal, **sizes))


ALLOWED = {
    "padding": torch.arange(20) < torch.tensor([20, 13])[:, None, None, None],
    "vector": torch.arange(20) % 3 != 1,
    "matrix": (torch.arange(18)[:, None] * torch.arange(20)) % 5 < 3,
    "per head": torch.arange(20) != torch.tensor([2, 19])[:, None, None],
    "column": torch.arange(18)[:, None] % 4 != 1,
    "full": (torch.arange(2 * 2 * 18 * 20) * 7919 % 11 < 6).view(2, 2, 18, 20),
    "transposed": (torch.arange(20 * 18) * 7919 % 11 < 6).view(20, 18).T,
    "scalar": torch.tensor(False),
}


@pytest.mark.parametrize("allowed", ALLOWED.values(), ids=ALLOWED)
def test_allowed_equals_eager_however_it_broadcasts(allowed: Tensor) -> None:
    check_equals_eager(make(queries=18, keys=20, allowed=allowed))


@each_op
def test_allowed_and_causal_hold_together(op: Op) -> None:
    allowed = torch.rand(2, 1, 35, 40) > 0.4
    check_equals_eager(make(op=op, heads=1, queries=35, keys=40, allowed=allowed, is_causal=True))


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_with_nothing_allowed_are_zero_and_so_are_their_gradients(op: Op, dtype: torch.dtype) -> None:
    allowed = torch.rand(2, 1, 18, 17) > 0.4
    allowed[0, 0, 3] = allowed[1, 0, 17] = False
    case = make(op=op, queries=18, keys=17, allowed=allowed).to(dtype)
    out, query, *rest = outputs_and_gradients(triton_attention, case, [x.requires_grad_() for x in case.tensors])
    for gradient in (out, query):
        assert not gradient[0, :, 3].any() and not gradient[1, :, 17].any()
        assert gradient[0, :, 4].any()
    assert all(gradient.isfinite().all() for gradient in (out, query, *rest))


@each_op
def test_half_precision_is_close_with_all_gradients(op: Op) -> None:  # float16: the interpreter has no bfloat16
    case = make(op=op, batch=1, queries=130, keys=66, dim=32, value_dim=32, rank=9, left_shape=(True, False))
    check_equals_eager(case, torch.float16, tolerance=2e-3)


@settings(derandomize=True, max_examples=6)
@given(case=cases())
def test_any_small_problem_equals_eager(case: Case) -> None:
    check_equals_eager(replace(case, bias=None))


@each_op
@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
def test_empty_inputs_give_empty_or_zero_outputs_and_gradients(op: Op, empty: str) -> None:
    case = make(op=op, **{empty: 0}).to(torch.float32)  # type: ignore[arg-type]
    found = outputs_and_gradients(triton_attention, case, [tensor.requires_grad_() for tensor in case.tensors])
    assert [x.shape for x in found[1:]] == [x.shape for x in case.tensors]
    assert found[0].shape == (*case.query.shape[:3], case.value.shape[-1])
    assert not any(x.any() for x in found)


def test_strided_inputs_equal_contiguous_ones() -> None:
    qkv = torch.randn(1, 19, 3, 2, 8)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    left = torch.randn(1, 2, 5, 19).mT  # its last dim isn't contiguous
    right = torch.randn(1, 1, 19, 10)[..., ::2]
    case = make(batch=1, queries=19, keys=19)
    strided = [query, key, value, left, right]
    assert not any(x.is_contiguous() for x in strided)
    found = outputs_and_gradients(triton_attention, case, [x.requires_grad_() for x in strided])
    copies = [x.detach().contiguous().requires_grad_() for x in strided]
    for one, other in zip(found, outputs_and_gradients(triton_attention, case, copies), strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_factors_of_another_dtype_get_gradients_in_theirs() -> None:
    case = make().to(torch.float32)
    half = replace(case, query=case.query.half(), key=case.key.half(), value=case.value.half())
    found = outputs_and_gradients(triton_attention, half, [x.requires_grad_() for x in half.tensors])
    assert [x.dtype for x in found] == [torch.float16] * 4 + [torch.float32] * 2


def test_autocast_computes_in_its_dtype() -> None:
    case = make(batch=1).to(torch.float32)
    leaves = [x.requires_grad_() for x in case.tensors]
    with torch.autocast("cpu", dtype=torch.float16):
        found = outputs_and_gradients(triton_attention, case, leaves)
    assert [x.dtype for x in found] == [torch.float16] + [torch.float32] * 5
    half = [x.detach().half().requires_grad_() for x in leaves]
    for one, other in zip(found, outputs_and_gradients(triton_attention, case, half), strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), atol=0, rtol=0)


@pytest.mark.parametrize("shared", [False, True])
def test_operators_pass_opcheck(shared: bool) -> None:
    full = (not shared, not shared)
    allowed = torch.ones(5, dtype=torch.bool) if shared else None
    case = make(heads=2, batch=1, right_shape=full, left_shape=(True, not shared), allowed=allowed)
    tensors = [x.requires_grad_() for x in case.to(torch.float32).tensors]
    torch.library.opcheck(lam_attention_forward, (*tensors, case.allowed, "mul", True, 0.5))
    detached = [x.detach() for x in tensors]
    out, logsumexp = lam_attention_forward(*detached, case.allowed, "mul", True, 0.5)
    arguments = (torch.randn_like(out), *detached, case.allowed, out, logsumexp, "mul", True, 0.5)
    # No autograd: it's the backward pass, differentiable once.
    torch.library.opcheck(lam_attention_backward, arguments, test_utils=("test_schema", "test_faketensor"))


class Attention(nn.Module):
    """The backend behind a module, on query, key, value, left and right."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def forward(self, *tensors: Tensor) -> Tensor:
        query, key, value, left, right = tensors
        return triton_attention(
            query, key, value, FactoredMask(left, right),
            op=self.case.op, allowed=self.case.allowed, bias=None, is_causal=True, dropout_p=0.0, scale=0.5,
        )  # fmt: skip


def test_compiles_as_one_graph_with_gradients() -> None:
    case = make(allowed=torch.tensor([True, True, False, True, True]))
    leaves = [x.requires_grad_() for x in case.to(torch.float32).tensors]
    module = Attention(case)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    found, expected = (torch.autograd.grad(run(*leaves).square().sum(), leaves) for run in (compiled, module))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_compiles_under_autocast() -> None:
    case = make().to(torch.float32)
    module = Attention(case)

    def run(*tensors: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return module(*tensors)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(*case.tensors)
    torch.testing.assert_close(compiled, run(*case.tensors))
    assert compiled.dtype == torch.float16


def test_exported_program_holds_the_operator_and_serves_any_length() -> None:
    case = make(queries=6, keys=6).to(torch.float32)
    length = torch.export.Dim("length", max=4096)
    program = torch.export.export(Attention(case), case.tensors, dynamic_shapes=(({2: length},) * 5,))
    assert "lam_attention_forward" in str(program.graph)
    longer = make(queries=9, keys=9).to(torch.float32)
    torch.testing.assert_close(program.module()(*longer.tensors), Attention(case)(*longer.tensors))


def test_flops_are_those_of_the_formula_also_in_a_counter_made_before(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import flop_counter

    case = make(batch=2, heads=3, queries=7, keys=5, dim=4, value_dim=6, rank=9, left_shape=(True, False))
    tensors = [x.requires_grad_() for x in case.to(torch.float32).tensors]
    for operator in ("lam_attention_forward", "lam_attention_backward"):
        monkeypatch.delitem(flop_counter.flop_registry, getattr(torch.ops.lamzoo, operator))
    scores = 2 * 3 * 7 * 5
    with FlopCounterMode(display=False) as counter:
        out = Attention(case)(*tensors)
        assert counter.get_total_flops() == 2 * scores * (4 + 6 + 9)
        out.sum().backward()
    assert counter.get_total_flops() == 2 * scores * (4 + 6 + 9) + 2 * scores * (3 * 4 + 2 * 6 + 3 * 9)


def test_only_what_the_backward_pass_reads_is_saved() -> None:
    case = make(left_shape=(True, False), right_shape=(False, False), allowed=torch.ones(5, dtype=torch.bool))
    leaves = [x.requires_grad_() for x in case.to(torch.float32).tensors]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = Attention(case)(*leaves)
    inputs = [*leaves, case.allowed]
    made = [x for x in saved if not any(x.data_ptr() == y.data_ptr() for y in inputs if y is not None)]
    assert [x.shape for x in made] == [out.shape, out.shape[:3]]


def test_gradients_of_factors_stay_in_the_range_of_float16() -> None:
    case = make(op="mul", batch=1, heads=1, queries=20, keys=18, dim=64, value_dim=64, rank=4)
    query, key, value, left, right = (x.half() for x in case.tensors)
    leaves = [4 * query, 4 * key, value, left / 4, right]

    def gradients(kernel: Kernel) -> tuple[Tensor, ...]:
        tensors = [x.detach().requires_grad_() for x in leaves]
        out = kernel(
            *tensors[:3], FactoredMask(*tensors[3:]),
            op="mul", allowed=None, bias=None, is_causal=False, dropout_p=0.0, scale=0.125,
        )  # fmt: skip
        return torch.autograd.grad((out * 2.0**7).sum(), tensors)

    assert all(grad.isfinite().all() for grad in gradients(eager))
    assert all(grad.isfinite().all() for grad in gradients(triton_attention))


def test_second_gradients_are_refused_with_a_way_out() -> None:
    case = make(op="add", batch=1, heads=1, queries=4, keys=5, dim=16, value_dim=16, rank=2)
    leaves = [x.requires_grad_() for x in case.tensors]
    out = triton_attention(
        *leaves[:3], FactoredMask(*leaves[3:]),
        op="add", allowed=None, bias=None, is_causal=False, dropout_p=0.0, scale=0.25,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(ConfigError, match=r"no second gradients.*attention_backend\('eager'\)"):
        grad.sum().backward()
