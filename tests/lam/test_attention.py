"""lam_attention against the formula written out: values, dtypes, edges and errors, for every backend."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from lamzoo.errors import ConfigError, MaskShapeError
from lamzoo.lam import FactoredMask, available_backends, lam_attention
from lamzoo.lam.kernels.eager import attention_weights
from lamzoo.lam.ops import OPS as RECORDS
from lamzoo.lam.ops import Op
from tests.lam.cases import BACKENDS, OPS, SERVE_EVERYTHING, Case, cases, make, written_out

each_backend = pytest.mark.parametrize("backend", BACKENDS)
TENSORS = ("query", "key", "value", "left", "right")
each_op = pytest.mark.parametrize("op", OPS)


def attend(case: Case, backend: str) -> torch.Tensor:
    return lam_attention(*case.args, **case.options, backend=backend)


@each_backend
@settings(derandomize=True, max_examples=120)
@given(case=cases())
def test_equals_the_formula_in_float64(backend: str, case: Case) -> None:
    case = case.for_backend(backend)
    torch.testing.assert_close(attend(case, backend), written_out(case), atol=1e-10, rtol=0)


@each_backend
@settings(derandomize=True, max_examples=60)
@given(case=cases())
def test_equals_the_formula_in_float32(backend: str, case: Case) -> None:
    case = case.for_backend(backend)
    out = attend(case.to(torch.float32), backend)
    assert out.dtype == torch.float32
    torch.testing.assert_close(
        out.double(), written_out(case.to(torch.float32).to(torch.float64)), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.bfloat16, 8e-2)])
@each_backend
@settings(derandomize=True, max_examples=40)
@given(case=cases())
def test_half_precision_is_close(backend: str, dtype: torch.dtype, tolerance: float, case: Case) -> None:
    case = case.for_backend(backend)
    shrunk = replace(case, left=case.left / 2, right=case.right / 2)  # scores of the usual size
    half = shrunk.to(dtype)
    out = attend(half, backend)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), written_out(half.to(torch.float64)), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", SERVE_EVERYTHING)
@each_op
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_bias_forbids_in_half_precision(op: Op, backend: str, dtype: torch.dtype) -> None:
    case = make(op=op).to(dtype)
    allowed = torch.rand(2, 1, 4, 5) > 0.5
    allowed[0, 0, 1] = False
    lowest = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    expected = attend(replace(case, allowed=allowed), backend)
    torch.testing.assert_close(attend(replace(case, bias=lowest), backend), expected)


@each_backend
@each_op
@pytest.mark.parametrize("is_causal", [False, True])
def test_fully_masked_rows_are_zero_and_others_unharmed(op: Op, backend: str, is_causal: bool) -> None:
    allowed = torch.ones(2, 1, 4, 5, dtype=torch.bool)
    allowed[0, 0, 2] = False
    case = make(op=op, allowed=allowed, is_causal=is_causal)
    out = attend(case, backend)
    assert (out[0, :, 2] == 0).all()
    torch.testing.assert_close(out, written_out(case), atol=1e-10, rtol=0)


@each_backend
@each_op
def test_length_one_returns_the_value(op: Op, backend: str) -> None:
    case = make(op=op, queries=1, keys=1)
    torch.testing.assert_close(attend(case, backend), case.value, atol=1e-12, rtol=0)


@each_backend
@each_op
@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
@pytest.mark.parametrize("gradients", [True, False])
def test_empty_inputs_give_empty_or_zero_outputs(op: Op, backend: str, empty: str, gradients: bool) -> None:
    case = make(op=op, **{empty: 0})  # type: ignore[arg-type]
    case = replace(case, allowed=torch.ones(case.key.shape[2], dtype=torch.bool))
    with torch.set_grad_enabled(gradients):
        out = attend(case, backend)
    assert out.shape == (*case.query.shape[:3], case.value.shape[-1])
    assert (out == 0).all()


@each_backend
@each_op
def test_identity_mask_is_plain_attention(op: Op, backend: str) -> None:
    case = make(op=op, keys=4)
    rank = torch.randn(2, 1, 4, 3, dtype=torch.float64)
    left = torch.cat([rank, torch.ones_like(rank[..., :1])], dim=-1)
    right = torch.zeros_like(left)
    right[..., -1] = 1.0 if op == "mul" else 0.0
    plain = torch.nn.functional.scaled_dot_product_attention(case.query, case.key, case.value)
    torch.testing.assert_close(attend(replace(case, left=left, right=right), backend), plain, atol=1e-12, rtol=0)


@settings(derandomize=True, max_examples=40)
@given(case=cases())
def test_folded_product_is_the_modulated_score(case: Case) -> None:
    scale = case.scale or 0.7
    fold = RECORDS[case.op].fold
    assert fold is not None
    query, key = fold(case.query, case.key, case.left, case.right, scale)
    lead = case.query.shape[:2]
    left, right = case.left.expand(*lead, -1, -1), case.right.expand(*lead, -1, -1)
    dense = torch.einsum("bhir,bhjr->bhij", left, right)
    scores = scale * torch.einsum("bhid,bhjd->bhij", case.query, case.key)
    torch.testing.assert_close(scale * (query @ key.mT), scores * dense if case.op == "mul" else scores + dense)


@settings(derandomize=True, max_examples=40)
@given(case=cases())
def test_attention_weights_sum_to_one_or_zero(case: Case) -> None:
    options = {**case.options, "scale": case.scale or 1.0}
    weights = attention_weights(case.query, case.key, FactoredMask(case.left, case.right), **options)
    assert weights.shape == (*case.query.shape[:3], case.key.shape[2])
    total = weights.sum(-1)
    torch.testing.assert_close(total, (total > 0.5).double())
    torch.testing.assert_close(weights @ case.value, written_out(replace(case, scale=options["scale"])))


@pytest.mark.parametrize("backend", SERVE_EVERYTHING)
@each_op
def test_dropout_changes_the_output_and_keeps_its_mean(op: Op, backend: str) -> None:
    case = make(op=op, batch=1, heads=1)
    many = replace(case, **{f: getattr(case, f).expand(4000, -1, -1, -1) for f in TENSORS})
    plain = attend(case, backend)
    dropped = lam_attention(*many.args, op=op, dropout_p=0.5, backend=backend)
    assert not torch.allclose(dropped[0], dropped[1])
    # Each weight's mean over 4,000 samples errs by 1/63 of itself, and there are five of them.
    torch.testing.assert_close(dropped.mean(0, keepdim=True), plain, atol=0.15, rtol=0)


def test_the_op_has_no_default() -> None:
    with pytest.raises(TypeError, match="'op'"):
        lam_attention(*make().args)  # type: ignore[call-arg]


def test_unknown_backend_unknown_op_and_bad_scale_are_named() -> None:
    case = make()
    with pytest.raises(ConfigError, match=r"'flash'; available: auto, eager, sdpa, chunked, flex, triton"):
        lam_attention(*case.args, op="mul", backend="flash")
    with pytest.raises(ConfigError, match=r"'minus'; it must be 'mul' or 'add'"):
        lam_attention(*case.args, op="minus")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"scale is 0\.0; it must be positive"):
        lam_attention(*case.args, op="mul", scale=0.0)


WRONG = {
    "tensor for a mask": ({"mask": torch.ones(4, 5)}, r"float32 tensor .* FactoredMask"),
    "boolean tensor for a mask": ({"mask": torch.ones(4, 5, dtype=torch.bool)}, r"torch\.bool tensor .*`allowed`"),
    "boolean factor": ({"left": torch.ones(2, 2, 4, 2, dtype=torch.bool)}, r"left factor .* torch\.bool.*`allowed`"),
    "integer factor": ({"right": torch.ones(2, 2, 5, 2, dtype=torch.int64)}, r"right factor .* torch\.int64"),
    "two dtypes": ({"right": torch.ones(2, 2, 5, 2)}, r"left torch\.float64 and right torch\.float32"),
    "three dims": ({"left": torch.ones(2, 4, 2)}, r"left factor .* \(2, 4, 2\); it must have 4 dimensions"),
    "ranks": ({"left": torch.ones(2, 2, 4, 3).double()}, r"left \(2, 2, 4, 3\) and right \(2, 2, 5, 2\)"),
    "queries": ({"left": torch.ones(2, 2, 5, 2).double()}, r"left \(2, 2, 5, 2\).*queries \(2, 2, 4, 3\)"),
    "keys": ({"right": torch.ones(2, 2, 4, 2).double()}, r"right \(2, 2, 4, 2\).*keys \(2, 2, 5, 3\)"),
    "batch": ({"left": torch.ones(3, 2, 4, 2).double()}, r"left \(3, 2, 4, 2\)"),
    "heads": ({"right": torch.ones(2, 3, 5, 2).double()}, r"right \(2, 3, 5, 2\)"),
    "float allowed": ({"allowed": torch.ones(4, 5)}, r"`allowed` is torch\.float32"),
    "boolean bias": ({"bias": torch.ones(4, 5, dtype=torch.bool)}, r"`bias` is torch\.bool.*`allowed`"),
    "padding": (
        {"allowed": torch.ones(2, 5, dtype=torch.bool)},
        r"`allowed` .*\(2, 5\).*\(2, 2, 4, 5\).*\(B, 1, 1, Nk\)",
    ),
    "bias": ({"bias": torch.ones(3, 1, 4, 5)}, r"`bias` .*\(3, 1, 4, 5\)"),
}


@pytest.mark.parametrize(("given_", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("backend", available_backends())
def test_wrong_arguments_are_named(given_: dict[str, torch.Tensor], message: str, backend: str) -> None:
    case = make()
    options = dict(given_)
    left, right = options.pop("left", case.left), options.pop("right", case.right)
    mask = options.pop("mask", FactoredMask(left, right))
    with pytest.raises(MaskShapeError, match=message):
        lam_attention(case.query, case.key, case.value, mask, op="mul", **options, backend=backend)  # type: ignore[arg-type]
