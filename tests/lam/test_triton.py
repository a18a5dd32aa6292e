"""The Triton backend: its promises through the interpreter, what it refuses, that it compiles, and real GPUs."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import lamzoo.lam.kernels.triton as backend
from lamzoo.lam import FactoredMask
from lamzoo.lam.kernels.triton import tiles, triton_attention, unsupported
from lamzoo.lam.ops import Op
from tests.forked import run_code
from tests.lam.cases import OPS, Case, make
from tests.lam.triton_interpreted import check_equals_eager

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
each_op = pytest.mark.parametrize("op", OPS)


@pytest.mark.slow
@needs_triton
def test_interpreted_kernels_keep_their_promises() -> None:
    # In a process of its own, because triton settles at its import whether it interprets, for all that follows.
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/lam/triton_interpreted.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_machines_without_triton_import_the_backend_and_are_told() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from lamzoo.lam import FactoredMask
from lamzoo.lam.kernels.triton import unsupported
x = torch.ones(1, 1, 2, 3)
assert unsupported(x, x, x, FactoredMask(x, x), op="mul", bias=None, dropout_p=0.0) == "triton is not installed"
"""
    run = run_code(code)
    assert run.returncode == 0, run.stderr
    assert not run.stderr


def reason(case: Case, **options: Any) -> str | None:
    return unsupported(*case.args, **{"op": case.op, "bias": None, "dropout_p": 0.0, **options})


def test_what_is_not_served_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_INSTALLED", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = make().to(torch.float32)
    assert reason(case) is None
    assert reason(make(dim=128, value_dim=128, rank=65).to(torch.float16)) is None
    assert reason(case, bias=torch.zeros(4, 5)) == "it takes no bias"
    assert reason(case, dropout_p=0.1) == "it has no dropout"
    assert reason(make()) == "torch.float64 is neither float32, float16 nor bfloat16"
    assert reason(replace(case, key=case.key.half())) == (
        "query, key and value have the dtypes torch.float32, torch.float16 and torch.float32"
    )
    assert reason(make(dim=160).to(torch.float32)) == "head dim 160 is above 128"
    assert reason(make(value_dim=129).to(torch.float32)) == "value head dim 129 is above 128"
    assert reason(make(rank=200).to(torch.float32)) == "mask rank 200 is above 128"
    assert reason(make(rank=0).to(torch.float32)) == "mask rank is 0"
    assert reason(replace(case, key=case.key.to("meta"))) == "its inputs are on several devices"
    meta = Case(*(x.to("meta") for x in case.tensors))
    assert reason(meta) == "its inputs are on 'meta', and it needs CUDA"
    assert reason(case.to(torch.bfloat16)) == "Triton's interpreter can't multiply bfloat16"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert reason(case) == "its inputs are on the CPU, and TRITON_INTERPRET is not set"
    monkeypatch.setattr(backend, "_INSTALLED", False)
    assert reason(case) == "triton is not installed"


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="kernels are interpreted in this process")
@pytest.mark.parametrize("capability", [86, 90])
@pytest.mark.parametrize(
    ("dtype", "width", "rank"),
    [("fp16", 128, 65), ("bf16", 64, 9), ("bf16", 64, 17), ("fp16", 64, 64), ("fp32", 128, 65)],
)
@pytest.mark.parametrize("name", ["forward", "queries", "keys"])
def test_compiles_without_a_gpu_and_fits_its_shared_memory(
    name: Any, dtype: str, width: int, rank: int, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lamzoo.lam.kernels import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(triton_kernels, {"forward": "forward_kernel"}.get(name, f"backward_{name}_kernel"))
    blocks = [max(16, triton.next_power_of_2(size)) for size in (width, rank)]
    tile = tiles(name, *blocks, {"fp32": 4}.get(dtype, 2))
    constants = {
        "DIM": width, "VALUE_DIM": width, "RANK": rank, "MUL": True, "CAUSAL": True, "ALLOWED": "full",
        "BLOCK_Q": tile.queries, "BLOCK_K": tile.keys,
        "BLOCK_DIM": blocks[0], "BLOCK_VALUE": blocks[0], "BLOCK_RANK": blocks[1],
    }  # fmt: skip
    float32 = {"logsumexp", "delta", "grad_left", "grad_right"}
    pointers = {"query", "key", "value", "left", "right", "out", "grad_out", "grad_query", "grad_key", "grad_value"}
    signature, aligned = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in pointers | float32 | {"allowed"}:
            signature[argument] = "*u8" if argument == "allowed" else "*fp32" if argument in float32 else f"*{dtype}"
            aligned[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "fp32" if argument == "scale" else "i32"
            if argument.startswith(("query", "key", "value", "left", "right", "out", "grad_out")):
                aligned[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            "maxnreg": tile.registers,
            "enable_fp_fusion": True,
        },
    )
    assert compiled.metadata.shared <= {86: 99, 90: 227}[capability] * 1024


PROBLEMS: dict[str, dict[str, Any]] = {
    "one token": {"queries": 1, "keys": 1, "dim": 64, "value_dim": 64, "rank": 9},
    "an image": {"queries": 197, "keys": 197, "dim": 64, "value_dim": 64, "rank": 9, "right_shape": (False, False)},
    "long": {"queries": 1100, "keys": 1027, "dim": 64, "value_dim": 64, "rank": 17, "left_shape": (True, False)},
    "wide": {"queries": 300, "keys": 257, "dim": 128, "value_dim": 128, "rank": 65},
    "odd": {"queries": 130, "keys": 131, "dim": 20, "value_dim": 40, "rank": 3},
    "causal": {"queries": 515, "keys": 515, "dim": 64, "value_dim": 64, "rank": 33, "is_causal": True},
    "padded": {
        "queries": 200, "keys": 190, "dim": 32, "value_dim": 32, "rank": 9,
        "allowed": torch.arange(190) < torch.tensor([190, 77])[:, None, None, None],
    },
    "sparse": {
        "queries": 140, "keys": 150, "dim": 64, "value_dim": 64, "rank": 9,
        "allowed": torch.arange(140 * 150).mul(7919).remainder(11).view(140, 150) < 6,
    },
    "a row of nothing": {
        "queries": 70, "keys": 70, "dim": 64, "value_dim": 64, "rank": 9, "is_causal": True,
        "allowed": torch.arange(70) > 2,
    },
}  # fmt: skip


@pytest.mark.gpu
@needs_cuda
@needs_triton
@each_op
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_equals_eager_on_a_gpu(problem: dict[str, Any], op: Op, dtype: torch.dtype, tolerance: float) -> None:
    check_equals_eager(make(op=op, heads=3, **problem), dtype, tolerance, device="cuda")


@pytest.mark.gpu
@needs_cuda
@needs_triton
@pytest.mark.parametrize("backward", [False, True])
def test_memory_grows_with_the_length_not_with_its_square(backward: bool) -> None:
    length, heads = 16384, 4
    tensors = [torch.randn(1, heads, length, 64, device="cuda", dtype=torch.float16) for _ in range(3)]
    factors = [torch.randn(1, 1, length, 9, device="cuda", dtype=torch.float16) for _ in range(2)]
    query, key, value, left, right = (x.requires_grad_(backward) for x in tensors + factors)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = triton_attention(
        query, key, value, FactoredMask(left, right),
        op="mul", allowed=torch.ones(length, dtype=torch.bool, device="cuda"), bias=None, is_causal=True,
        dropout_p=0.0, scale=0.125,
    )  # fmt: skip
    if backward:
        out.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < length**2  # one head's scores at a byte each


@pytest.mark.gpu
@needs_cuda
@needs_triton
def test_inductor_compiles_around_it() -> None:
    case = make(queries=40, keys=50, dim=64, value_dim=64, rank=9).to(torch.float32)
    leaves = [x.cuda().requires_grad_() for x in case.tensors]

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        query, key, value, left, right = tensors
        mask = FactoredMask(left.relu(), right * 2)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = triton_attention(
                query, key, value, mask,
                op="add", allowed=None, bias=None, is_causal=False, dropout_p=0.0, scale=0.125,
            )  # fmt: skip
        return out.transpose(1, 2).flatten(2)

    compiled = torch.compile(run, fullgraph=True)
    found, expected = (torch.autograd.grad(f(*leaves).float().square().sum(), leaves) for f in (compiled, run))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)
