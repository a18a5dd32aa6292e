"""Which backend serves a call: the crossovers of "auto", pins, refusals; and what chunked and flex promise alone."""

import math
import operator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from lamzoo.errors import ConfigError, MaskShapeError
from lamzoo.lam import FactoredMask, LamConfig, attention_backend, available_backends, kernels, lam_attention
from lamzoo.lam.kernels import BACKENDS, RULES, Rule, choose, chunked, flex, sdpa, triton
from lamzoo.lam.ops import OPS as RECORDS
from lamzoo.lam.ops import Op
from lamzoo.profiling.memory import peak_growth
from tests.forked import run_code
from tests.lam.cases import BACKENDS as BACKENDS_OF_CPU
from tests.lam.cases import OPS, Case, cases, make, written_out

each_op = pytest.mark.parametrize("op", OPS)


def chosen(case: Case, backend: str = "auto", dropout_p: float = 0.0) -> str:
    kernel = choose(backend, *case.args, op=case.op, bias=case.bias, dropout_p=dropout_p)
    (name,) = (name for name, entry in BACKENDS.items() if entry.kernel is kernel)
    return name


def of_length(length: int, rank: int, op: Op, device: str = "cpu") -> Case:
    tokens, factor = (torch.empty(1, 1, length, width, device=device) for width in (8, rank))
    return Case(tokens, tokens, tokens, factor, factor, op)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.device == "cpu"])
def test_auto_follows_the_crossovers(rule: Rule) -> None:
    length = math.isqrt(rule.min_scores)
    assert chosen(of_length(max(1, length), rule.max_rank, rule.op)) == rule.backend
    if length:
        assert chosen(of_length(length - 1, rule.max_rank, rule.op)) != rule.backend


@each_op
def test_auto_takes_triton_on_a_gpu_in_half_precision(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "RULES", [replace(rule, device="meta") for rule in RULES if rule.device == "cuda"])
    monkeypatch.setattr(triton, "_unsupported_device", lambda device, dtype: None)
    case, other = of_length(197, 9, op, "meta"), {"mul": "eager", "add": "sdpa"}[op]
    half, short = case.to(torch.bfloat16), of_length(159, 9, op, "meta").to(torch.bfloat16)
    assert chosen(half) == chosen(case.to(torch.float16)) == "triton"
    assert chosen(case) == chosen(half, dropout_p=0.1) == chosen(short) == other
    with forward_ad.dual_level():
        assert chosen(half) == other
    assert torch.func.vmap(lambda _: torch.tensor(chosen(half) == other))(torch.zeros(2)).all()


def test_auto_takes_eager_where_no_rule_serves() -> None:
    assert chosen(of_length(8, 2, "mul")) == "eager"
    assert chosen(of_length(4096, 9, "add", device="meta")) == "eager"


def test_auto_passes_over_what_cannot_serve() -> None:
    case = of_length(4096, 9, "mul")
    assert chosen(case) == "chunked"
    assert chosen(replace(case, bias=torch.zeros(1))) != "chunked"
    assert chosen(case, dropout_p=0.1) != "chunked"


@each_op
def test_transforms_of_long_sequences_pass_over_chunked(op: Op) -> None:
    case = make(op=op, batch=1, heads=1, queries=800, keys=800, dim=4, value_dim=4, rank=34).to(torch.float64)
    assert chosen(case) == "chunked"
    query, *others = case.tensors

    def attend(query: Tensor, backend: str = "auto") -> Tensor:
        key, value, left, right = others
        return lam_attention(query, key, value, FactoredMask(left, right), op=op, backend=backend)

    (out, tangent), (like, exact) = (
        torch.func.jvp(lambda x, name=name: attend(x, name), (query,), (query.cos(),)) for name in ("auto", "eager")
    )
    torch.testing.assert_close(out, like)
    torch.testing.assert_close(tangent, exact)
    assert exact.norm() > 0
    torch.testing.assert_close(
        *(torch.func.grad(lambda x, n=n: attend(x, n).sin().sum())(query) for n in ("auto", "eager"))
    )
    with forward_ad.dual_level(), pytest.raises(ConfigError, match=r"torch.func and forward-mode gradients"):
        attend(query, "chunked")


def test_chunked_refuses_second_gradients_with_a_way_out() -> None:
    case = make(op="mul", batch=1, heads=1, queries=4, keys=5, dim=4, value_dim=4, rank=2)
    leaves = [x.requires_grad_() for x in case.tensors]
    out = lam_attention(*leaves[:3], FactoredMask(*leaves[3:]), op="mul", backend="chunked")
    (grad,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(ConfigError, match=r"chunked.* no second gradients.*attention_backend\('eager'\)"):
        grad.sum().backward()


def test_a_pin_holds_where_no_backend_is_named_and_only_inside() -> None:
    case = of_length(8, 2, "mul")
    with attention_backend("sdpa"):
        assert chosen(case) == "sdpa"
        assert chosen(case, "eager") == "eager"
        with attention_backend("auto"):
            assert chosen(case) == "eager"
        assert chosen(case) == "sdpa"
    assert chosen(case) == "eager"


def test_a_pin_ends_with_an_error() -> None:
    with pytest.raises(RuntimeError), attention_backend("sdpa"):
        raise RuntimeError
    assert chosen(of_length(8, 2, "mul")) == "eager"


def test_a_pin_of_an_unknown_name_raises_at_once() -> None:
    with pytest.raises(ConfigError, match="'flash'; available: auto, eager"), attention_backend("flash"):
        pytest.fail("the pin was taken")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("sdpa", "ran"),
        ("", "ran"),
        ("flash", "Unknown attention backend 'flash', from LAMZOO_ATTENTION_BACKEND;"),
    ],
)
def test_the_environment_pins_a_process(value: str, said: str) -> None:
    code = """
import torch, lamzoo
from lamzoo.lam import kernels
kernels.BACKENDS["eager"] = None if kernels.pinned() != "auto" else kernels.BACKENDS["eager"]
x = torch.ones(1, 1, 2, 3)
try:
    lamzoo.lam_attention(x, x, x, lamzoo.FactoredMask(x, x), op="mul")
    print("ran")
except lamzoo.LamzooError as error:
    print(error)
"""
    run = run_code(code, env={"LAMZOO_ATTENTION_BACKEND": value})
    assert run.returncode == 0, run.stderr
    assert said in run.stdout


@pytest.mark.parametrize(
    ("backend", "options", "reason"),
    [
        ("chunked", {"bias": torch.zeros(4, 5)}, "it takes no bias"),
        ("chunked", {"dropout_p": 0.1}, "it has no dropout"),
        ("flex", {"dropout_p": 0.1}, "it has no dropout"),
        ("flex", {}, "it has no float64"),
        ("triton", {"bias": torch.zeros(4, 5)}, "it takes no bias"),
    ],
)
def test_a_backend_asked_for_by_name_says_what_it_cannot_do(backend: str, options: dict, reason: str) -> None:
    with pytest.raises(
        ConfigError, match=f"The {backend} backend doesn't support this attention: {reason}; use 'auto'"
    ):
        lam_attention(*make().args, op="mul", backend=backend, **options)


def test_flex_never_goes_on_with_dense_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(flex._attend, backend="eager", dynamic=None, fullgraph=True)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    case = make(dim=16, value_dim=16).to(torch.float32)
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        lam_attention(*case.args, op="mul", backend="flex")
        with pytest.raises(ConfigError, match="compiled for as many kinds of inputs as torch allows"):
            lam_attention(*case.args, op="add", backend="flex")
    torch._dynamo.reset()


def test_flex_refuses_gradients_on_the_cpu() -> None:
    case = make().to(torch.float32)
    refused = {**dict(zip(("query", "key", "value"), case.args, strict=False)), "mask": case.args[3]}
    case.left.requires_grad_()
    assert flex.unsupported(**refused, op="mul", bias=None, dropout_p=0.0) == "it has no gradients on the CPU"
    with torch.no_grad():
        assert flex.unsupported(**refused, op="mul", bias=None, dropout_p=0.0) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "what"), [("mul", "all"), ("add", "causal"), ("mul", "allowed"), ("mul", "bias"), ("add", "shared")]
)
def test_flex_equals_eager(op: Op, what: str) -> None:
    torch._dynamo.reset()
    allowed = torch.rand(2, 1, 40, 50) > 0.5
    allowed[0, 0, 3] = False  # nothing
    full = (what != "shared",) * 2
    case = make(op=op, queries=40, keys=50, dim=16, value_dim=16, rank=9, left_shape=(True, full[0]), right_shape=full)
    case = replace(
        case.to(torch.float32),
        is_causal=what == "causal",
        allowed=allowed if what == "allowed" else None,
        bias=torch.randn(1, 2, 40, 50) if what == "bias" else None,
    )
    with torch.no_grad():
        found, expected = (lam_attention(*case.args, **case.options, backend=name) for name in ("flex", "eager"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@each_op
def test_flex_serves_autocast_on_the_cpu(op: Op) -> None:
    torch._dynamo.reset()
    bias = torch.randn(1, 2, 40, 50, dtype=torch.bfloat16)
    case = replace(make(op=op, queries=40, keys=50, dim=16, value_dim=16).to(torch.float32), bias=bias)
    left, right = (factor.bfloat16() for factor in (case.left, case.right))  # as a mask's linear layers give them
    args = (*case.args[:3], FactoredMask(left, right))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = (lam_attention(*args, **case.options, backend=name) for name in ("flex", "eager"))
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


@given(cases())
def test_folding_half_of_the_heads_at_a_time_gives_the_same(case: Case) -> None:
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        whole = lam_attention(*case.args, **case.options, backend="sdpa")
        patch.setattr(sdpa, "_LONG", 0)
        halves = lam_attention(*case.args, **case.options, backend="sdpa")
    torch.testing.assert_close(halves, whole)


@pytest.mark.parametrize(("length", "grad", "heads"), [(9_000, False, [2, 3]), (9_000, True, [5]), (3_000, False, [5])])
def test_long_sequences_are_folded_half_of_the_heads_at_a_time(
    length: int, grad: bool, heads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(batch=1, heads=5, queries=9, keys=length, dim=96, value_dim=8, rank=2).to(torch.float32)
    attended: list[int] = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: object) -> torch.Tensor:
        attended.append(query.shape[1])
        return query

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    with torch.set_grad_enabled(grad):
        lam_attention(*case.args, op="add", backend="sdpa")
    assert attended == heads


@each_op
@pytest.mark.parametrize("rows", [16, 32, 48])
def test_blocks_of_any_size_give_the_same(op: Op, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(op=op, queries=50, keys=40, is_causal=True, allowed=torch.rand(2, 1, 50, 40) > 0.3)
    whole = results(case)
    monkeypatch.setattr(chunked, "_BLOCK_BYTES", rows * 40 * 8)
    for one, other in zip(results(case), whole, strict=True):
        torch.testing.assert_close(one, other)


def results(case: Case) -> tuple[torch.Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in case.tensors]
    out = lam_attention(*leaves[:3], FactoredMask(*leaves[3:]), **case.options, backend="chunked")
    return out, *torch.autograd.grad(out.square().sum(), leaves)


@pytest.mark.parametrize("backward", [False, True])
def test_chunked_memory_does_not_grow_with_the_square_of_the_length(backward: bool) -> None:
    case = make(batch=1, heads=2, queries=3000, keys=3000, dim=32, value_dim=32, rank=9).to(torch.float32)
    leaves = [x.requires_grad_(backward) for x in case.tensors]

    def grown(backend: str) -> int:
        def run() -> None:
            out = lam_attention(*leaves[:3], FactoredMask(*leaves[3:]), op="mul", backend=backend)
            if backward:
                out.sum().backward()

        return peak_growth(run)[1]

    dense = 2 * 3000**2 * 4
    assert grown("chunked") < dense / 2
    assert grown("eager") > dense  # or the meter sees nothing


def test_chunked_counts_its_flops() -> None:
    case = make(batch=2, heads=3, queries=7, keys=5, dim=4, value_dim=6, rank=9, left_shape=(True, False))
    leaves = [x.requires_grad_() for x in case.tensors]
    scores = 2 * 3 * 7 * 5
    with FlopCounterMode(display=False) as counter:
        out = lam_attention(*leaves[:3], FactoredMask(*leaves[3:]), op="mul", backend="chunked")
        assert counter.get_total_flops() == 2 * scores * (4 + 6 + 9)
        out.sum().backward()
    assert counter.get_total_flops() == 2 * scores * (4 + 6 + 9) + 2 * scores * (3 * 4 + 2 * 6 + 3 * 9)


@pytest.mark.parametrize("is_causal", [False, True])
def test_chunked_operators_pass_opcheck(is_causal: bool) -> None:
    case = make(left_shape=(True, False), right_shape=(False, False), allowed=torch.rand(2, 1, 4, 5) > 0.5)
    tensors = [x.requires_grad_() for x in case.tensors]
    torch.library.opcheck(chunked._forward, (*tensors, case.allowed, "mul", is_causal, 0.5))


@cache
def causal_and_written_out(op: Op) -> tuple[Case, Tensor]:
    case = make(op=op, queries=30, keys=40, dim=8, value_dim=8, is_causal=True).to(torch.float32)
    return case, written_out(case)


@each_op
@pytest.mark.parametrize("backend", BACKENDS_OF_CPU)
@pytest.mark.parametrize("narrow", ["query", "key", "value", "mask", "none", "all"])
def test_autocast_serves_inputs_of_several_dtypes(op: Op, backend: str, narrow: str) -> None:
    case, expected = causal_and_written_out(op)
    leaves = dict(zip(("query", "key", "value", "left", "right"), case.tensors, strict=True))
    for name in {"mask": ("left", "right"), "none": (), "all": tuple(leaves)}.get(narrow, (narrow,)):
        leaves[name] = leaves[name].bfloat16()
    tensors = [x.detach().clone().requires_grad_() for x in leaves.values()]
    args = (*tensors[:3], FactoredMask(*tensors[3:]))
    with torch.autocast("cpu", torch.bfloat16):
        out = lam_attention(*args, **case.options, backend=backend)
    assert out.dtype == tensors[0].dtype
    torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0.1)
    for tensor, grad in zip(tensors, torch.autograd.grad(out.float().square().sum(), tensors), strict=True):
        assert grad.dtype == tensor.dtype and grad.any()


@pytest.mark.parametrize("backend", BACKENDS_OF_CPU)
def test_several_dtypes_outside_of_autocast_are_refused_by_name(backend: str) -> None:
    query, key, value, mask = make().to(torch.float32).args
    with pytest.raises(MaskShapeError, match=r"torch\.float32, torch\.float32 and torch\.bfloat16; outside of"):
        lam_attention(query, key, value.bfloat16(), mask, op="mul", backend=backend)


def test_every_backend_is_listed() -> None:
    assert available_backends() == ["eager", "sdpa", "chunked", "flex", "triton"]


class _FusedWidths(TorchFunctionMode):
    """Notes the widths of query, key and value of each call of torch's fused attention, and answers for it."""

    def __init__(self) -> None:
        super().__init__()
        self.widths: list[tuple[int, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.widths.append(tuple(x.shape[-1] for x in args))
        return torch.empty_like(args[2])


@pytest.mark.parametrize(
    ("op", "device", "width"), [("add", "cpu", 73), ("add", "cuda", 80), ("mul", "cpu", 189), ("mul", "cuda", 192)]
)
def test_folded_widths_are_multiples_of_8_where_fused_kernels_ask_for_that(op: Op, device: str, width: int) -> None:
    dim, rank = (64, 9) if op == "add" else (63, 3)
    with FakeTensorMode(), _FusedWidths() as fused:  # tensors of a device that need not be there
        x, factor = torch.empty(1, 2, 5, dim, device=device), torch.empty(1, 2, 5, rank, device=device)
        out = lam_attention(x, x, x, FactoredMask(factor, factor), op=op, backend="sdpa")
    assert fused.widths == [(width,) * 3]
    assert out.shape == x.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_folded_attention_runs_in_a_fused_kernel_on_cuda() -> None:
    query, key, value = torch.randn(3, 2, 4, 50, 64, device="cuda")
    mask = FactoredMask(*torch.randn(2, 2, 4, 50, 9, device="cuda"))
    expected = lam_attention(query, key, value, mask, op="add", backend="eager")
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):  # which raises where it would be left
        out = lam_attention(query, key, value, mask, op="add", backend="sdpa")
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-3)


def test_a_new_op_is_one_record(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = {"apply": operator.sub, "apply_": operator.isub, "gradients": lambda grad, *_: (grad, -grad)}
    sub = replace(RECORDS["add"], **functions, fold=None)
    monkeypatch.setitem(RECORDS, "sub", sub)
    case = make()
    case.left.requires_grad_()
    negated = FactoredMask(-case.left, case.right)
    expected = lam_attention(*case.args[:3], negated, op="add", backend="eager")
    (gradient,) = torch.autograd.grad(expected.square().sum(), case.left)
    for backend in ("auto", "eager", "chunked"):
        found = lam_attention(*case.args, op="sub", backend=backend)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), case.left)[0], gradient)
    for backend, reason in (("sdpa", "op='sub' can't be folded"), ("triton", "it has no op='sub'")):
        with pytest.raises(ConfigError, match=f"The {backend} backend doesn't support this attention: {reason}"):
            lam_attention(*case.args, op="sub", backend=backend)  # type: ignore[arg-type]
    assert LamConfig(op="sub").mask_op is sub  # type: ignore[arg-type]
