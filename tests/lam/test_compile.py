"""lam_attention and mask networks under torch.compile and torch.export, and the memory that folding saves."""

import io
import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lamzoo.lam import FactoredMask, LamConfig, MaskNetwork, lam_attention
from lamzoo.lam.config import Heads, Keys, Sign
from lamzoo.lam.ops import Op
from tests.lam.cases import BACKENDS, OPS, make


class SelfAttention(nn.Module):
    """Masked self-attention over tokens of width 8 with two heads."""

    def __init__(self, config: LamConfig, backend: str = "auto", length: int = 6) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        self.network = MaskNetwork(config, 8, 8, 2, length=length)
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        out = lam_attention(query, key, value, self.network(x, x), op=self.config.op, backend=self.backend)
        return out.transpose(1, 2).flatten(2)


def quick_first(*quick: object, rest: Iterable[object]) -> list[Any]:
    """Parameters of a test that takes seconds for each: some by default, the rest with ``-m slow``."""
    return [*quick, *(pytest.param(*each, marks=pytest.mark.slow) for each in rest if each not in quick)]


@pytest.mark.parametrize(
    ("backend", "op"),
    quick_first(
        ("auto", "mul"), ("sdpa", "add"), ("chunked", "mul"), ("eager", "add"), rest=itertools.product(BACKENDS, OPS)
    ),
)
def test_compiled_attention_equals_eager_with_gradients(op: Op, backend: str) -> None:
    case = make(op=op, allowed=torch.tensor([True, True, False, True, True]), is_causal=True)

    def run(query: Tensor, key: Tensor, value: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return lam_attention(query, key, value, FactoredMask(left, right), **case.options, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    leaves = [tensor.clone().requires_grad_() for tensor in case.tensors]
    expected = run(*leaves)
    torch.testing.assert_close(compiled(*leaves), expected)
    for one, other in zip(
        torch.autograd.grad(compiled(*leaves).square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("keys", "heads"),
    quick_first(
        ("content", "shared"),
        ("position", "per-head"),
        rest=itertools.product(("content", "position"), ("shared", "per-head")),
    ),
)
def test_compiled_positive_masks_equal_eager_with_gradients(keys: Keys, heads: Heads) -> None:
    config = LamConfig(op="mul", sign="positive", rank=3, keys=keys, heads=heads, init="paper")
    module, x = SelfAttention(config), torch.randn(2, 6, 8)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    ours, theirs = (torch.autograd.grad(f(x).square().sum(), list(module.parameters())) for f in (compiled, module))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("op", "sign", "length"), [("mul", "positive", 6), ("add", "free", 6), ("mul", "free", 800)])
@pytest.mark.filterwarnings("ignore")  # that it is the legacy exporter
def test_the_legacy_onnx_exporter_serves_masks(op: Op, sign: Sign, length: int) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    module, x = SelfAttention(LamConfig(op=op, sign=sign, init="paper")).eval(), torch.randn(2, length, 8)
    file = io.BytesIO()
    torch.onnx.export(module, (x,), file, dynamo=False, opset_version=17, input_names=["x"])
    (out,) = onnxruntime.InferenceSession(file.getvalue()).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), module(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("backend", "keys"), [("auto", "position"), ("sdpa", "content")])
def test_exported_module_serves_any_batch(backend: str, keys: Keys) -> None:
    module = SelfAttention(LamConfig(rank=2, keys=keys, init="paper"), backend).eval()
    program = torch.export.export(module, (torch.randn(3, 6, 8),), dynamic_shapes=({0: Dim("batch")},))
    for batch in (2, 5):
        x = torch.randn(batch, 6, 8)
        torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize(("backend", "op"), quick_first(("auto", "mul"), rest=[("auto", "add"), ("eager", "mul")]))
def test_exported_module_serves_any_length(backend: str, op: Op) -> None:
    module = SelfAttention(LamConfig(rank=2, op=op, init="paper"), backend).eval()
    program = torch.export.export(module, (torch.randn(2, 6, 8),), dynamic_shapes=({1: Dim("length", max=4096)},))
    for length in (4, 1100):
        x = torch.randn(2, length, 8)
        torch.testing.assert_close(program.module()(x), module(x))


class LargestOutput(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        return out


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_folding_never_builds_a_dense_matrix(op: Op, is_causal: bool) -> None:
    length = 600
    case = make(op=op, batch=1, heads=1, queries=length, keys=length, value_dim=4).to(torch.float32)
    leaves = [tensor.requires_grad_() for tensor in case.tensors]
    allowed = None if is_causal else (torch.arange(length) < 500)
    sizes = {}
    for backend in ("eager", "sdpa"):
        with LargestOutput() as largest:
            mask = FactoredMask(leaves[3], leaves[4])
            out = lam_attention(
                leaves[0],
                leaves[1],
                leaves[2],
                mask,
                op=op,
                allowed=allowed,
                is_causal=is_causal,
                backend=backend,
            )
            out.sum().backward()
        sizes[backend] = largest.numel
    assert sizes["eager"] == length * length
    assert sizes["sdpa"] <= 16 * length
