"""Factored masks and the networks that make them: the paper's dense mask, the identity, signs, dtypes, lengths."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lamzoo.errors import ConfigError, MaskShapeError
from lamzoo.lam import FactoredMask, LamConfig, MaskNetwork, lam_attention
from lamzoo.lam.config import Keys, Sign
from lamzoo.lam.ops import Op

VARIANTS = [
    LamConfig(rank=3, hidden=hidden, keys=keys, op=op, heads=heads, sign=sign)  # type: ignore[arg-type]
    for hidden in ((), (6, 5))
    for keys in ("content", "position")
    for op, sign in (("mul", "free"), ("mul", "positive"), ("add", "free"))
    for heads in ("shared", "per-head")
]
each_variant = pytest.mark.parametrize(
    "config", VARIANTS, ids=lambda c: f"{c.keys}-{c.op}-{c.sign}-{c.heads}-{len(c.hidden)}"
)
HEADS, LENGTH = 2, 7


def network(config: LamConfig, **changes: Any) -> MaskNetwork:
    options: dict[str, Any] = {"length": LENGTH, "num_prefix_tokens": 1, "grid": (2, 3), **changes}
    return MaskNetwork(config, 4, 4, HEADS, **options)


def perturb(module: nn.Module) -> None:
    """Moves every parameter away from where it was initialised."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))


# --- FactoredMask -------------------------------------------------------------------------------------------------


@settings(derandomize=True, max_examples=40)
@given(sizes=st.tuples(*[st.integers(1, 4)] * 5), shared=st.booleans(), generic=st.booleans(), seed=st.integers(0, 999))
def test_importance_is_the_mean_of_the_dense_mask(
    sizes: tuple[int, int, int, int, int], shared: bool, generic: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    batch, heads, queries, keys, rank = sizes
    left = torch.randn(batch, heads, queries, rank, dtype=torch.float64)
    right = torch.randn(1 if shared else batch, heads, keys, rank, dtype=torch.float64)
    mask = FactoredMask(left, right)
    dense = torch.einsum("bhir,bhjr->bhij", left, right.expand(batch, -1, -1, -1))
    torch.testing.assert_close(mask.dense(), dense)
    torch.testing.assert_close(mask.importance(), dense.mean(2))
    counts = torch.rand(batch, queries) > 0.5 if generic else torch.zeros(batch, queries, dtype=torch.bool)
    expected = torch.zeros(batch, heads, keys, dtype=torch.float64)
    for sample in range(batch):
        if counts[sample].any():
            expected[sample] = dense[sample][:, counts[sample]].mean(1)
    torch.testing.assert_close(mask.importance(counts), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_importance_of_many_queries_does_not_overflow_in_half(dtype: torch.dtype) -> None:
    mask = FactoredMask(torch.full((1, 1, 5000, 1), 40.0, dtype=dtype), torch.ones(1, 1, 2, 1, dtype=dtype))
    expected = torch.full((1, 1, 2), 40.0, dtype=dtype)
    torch.testing.assert_close(mask.importance(), expected)
    torch.testing.assert_close(mask.importance(torch.ones(1, 5000, dtype=torch.bool)), expected)


# --- The paper's mask ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["mul", "add"])
@pytest.mark.parametrize("widths", [(3,), (8, 3), (8, 5, 3)])
def test_position_keys_are_the_papers_dense_network(op: Op, widths: tuple[int, ...]) -> None:
    batch, length, dim = 3, 9, 4
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((dim, *widths)):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    paper = nn.Sequential(*layers, nn.Linear(widths[-1], length)).double()

    config = LamConfig(
        keys="position", op=op, heads="shared", hidden=widths[:-1], rank=widths[-1], init="paper", max_length=length
    )
    ours = MaskNetwork(config, dim, dim, HEADS).double()
    last: Any = paper[-1]
    ours.query.load_state_dict(paper[:-1].state_dict())
    with torch.no_grad():
        ours.table.weight.copy_(last.weight)
        ours.table.bias.copy_(last.bias)

    tokens = torch.randn(batch, length, dim, dtype=torch.float64)
    query, key, value = torch.randn(3, batch, HEADS, length, 5, dtype=torch.float64)
    mask = ours(tokens, tokens)
    dense = paper(tokens)  # (B, N, N), one mask for all heads
    torch.testing.assert_close(mask.dense(), dense[:, None], atol=1e-12, rtol=0)

    scores = query @ key.transpose(-2, -1) / 5**0.5
    scores = scores * dense[:, None] if op == "mul" else scores + dense[:, None]
    expected = torch.softmax(scores, dim=-1) @ value
    for backend in ("eager", "sdpa"):
        out = lam_attention(query, key, value, mask, op=op, backend=backend)
        torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)


def test_paper_init_of_the_table_is_that_of_a_linear() -> None:
    table = network(LamConfig(keys="position", rank=4, init="paper"), length=2000, grid=None).table
    linear = nn.Linear(4, 2000)
    for ours, theirs in ((table.weight, linear.weight), (table.bias, linear.bias)):
        assert ours.abs().max() <= 0.5
        torch.testing.assert_close(ours.std(), theirs.std(), atol=0.02, rtol=0)


# --- The identity -------------------------------------------------------------------------------------------------


@each_variant
def test_fresh_mask_is_the_identity(config: LamConfig) -> None:
    tokens = 100 * torch.randn(3, LENGTH, 4)
    dense = network(config)(tokens, tokens).dense()
    assert dense.shape == (3, HEADS if config.heads == "per-head" else 1, LENGTH, LENGTH)
    neutral = torch.full_like(dense, 1.0 if config.op == "mul" else 0.0)
    tolerance = 1e-6 if config.sign == "positive" else 0.0
    torch.testing.assert_close(dense, neutral, atol=tolerance, rtol=0)


@pytest.mark.parametrize("keys", ["content", "position"])
@pytest.mark.parametrize("sign", ["free", "positive"])
def test_paper_init_is_not_the_identity(keys: Keys, sign: Sign) -> None:
    tokens = torch.randn(3, LENGTH, 4)
    mask = network(LamConfig(keys=keys, op="mul", sign=sign, init="paper"))(tokens, tokens)
    assert (mask.dense() - 1).abs().mean() > 0.02


@each_variant
def test_every_parameter_gets_a_gradient_after_one_step(config: LamConfig) -> None:
    module = network(config)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    tokens, target = torch.randn(8, LENGTH, 4), torch.randn(8, 1, LENGTH, LENGTH)
    for _ in range(2):
        optimizer.zero_grad()
        (module(tokens, tokens).dense() - target).square().mean().backward()
        optimizer.step()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero(), name


@each_variant
def test_every_parameter_changes_the_attention(config: LamConfig) -> None:
    # A parameter whose gradient is rounding alone would be moved by Adam as far as any other.
    module = network(config).double()
    perturb(module)
    tokens = torch.randn(8, LENGTH, 4, dtype=torch.float64)
    query, key, value = torch.randn(3, 8, HEADS, LENGTH, 5, dtype=torch.float64)
    lam_attention(query, key, value, module(tokens, tokens), op=config.op).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize("hidden", [(), (6, 5)])
def test_weights_with_the_bias_of_older_versions_load_and_attend_alike(
    hidden: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    one, other = network(LamConfig(rank=3, hidden=hidden)), network(LamConfig(rank=3, hidden=hidden))
    perturb(one)
    key = f"key.{2 * len(hidden)}.bias"
    old = {**one.state_dict(), key: torch.randn(HEADS * 4)}
    with caplog.at_level("INFO"):
        other.load_state_dict(old)
    assert key in caplog.text
    assert key in old, "the caller's own dictionary"
    tokens, query = torch.randn(2, LENGTH, 4), torch.randn(2, HEADS, LENGTH, 5)
    left, right = one(tokens, tokens)
    biased = FactoredMask(left, right + old[key].view(1, HEADS, 1, 4))
    expected = lam_attention(query, query, query, biased, op="add")
    torch.testing.assert_close(lam_attention(query, query, query, other(tokens, tokens), op="add"), expected)


# --- Signs, dtypes, lengths ---------------------------------------------------------------------------------------


@settings(derandomize=True, max_examples=30)
@given(
    seed=st.integers(0, 2**20), spread=st.sampled_from([0.1, 1.0, 30.0]), keys=st.sampled_from(["content", "position"])
)
def test_positive_masks_are_never_negative(seed: int, spread: float, keys: Keys) -> None:
    torch.manual_seed(seed)
    module = network(LamConfig(rank=3, op="mul", sign="positive", keys=keys, heads="per-head"))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(spread * torch.randn_like(parameter))
    tokens = spread * torch.randn(2, LENGTH, 4)
    mask = module(tokens, tokens)
    assert all((factor >= 0).all() for factor in mask)
    assert mask.dense().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_variant
def test_half_precision_networks(config: LamConfig, dtype: torch.dtype) -> None:
    module = network(config)
    perturb(module)
    tokens = torch.randn(2, LENGTH, 4)
    expected = module(tokens, tokens).dense().detach()
    mask = module.to(dtype)(tokens.to(dtype), tokens.to(dtype))
    assert mask.left.dtype == mask.right.dtype == dtype
    torch.testing.assert_close(mask.dense().float(), expected, atol=0.02 * float(expected.abs().max()), rtol=0.05)
    mask.dense().float().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@each_variant
def test_networks_under_autocast(config: LamConfig, backend: str) -> None:
    module = network(config)
    perturb(module)
    tokens = torch.randn(2, LENGTH, 4)
    query, key, value = torch.randn(3, 2, HEADS, LENGTH, 2)
    expected = lam_attention(query, key, value, module(tokens, tokens), op=config.op, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        mask = module(tokens, tokens)
        mask.check(query, key)
        out = lam_attention(query, key, value, mask, op=config.op, backend=backend)
        half = lam_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), mask, op=config.op, backend=backend)
    assert (out.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert (out - expected).abs().mean() < 0.05
    assert (half - expected).abs().mean() < 0.05
    out.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in module.parameters())


@each_variant
@pytest.mark.parametrize(("batch", "length"), [(0, LENGTH), (1, 1), (2, 3), (2, 2 * LENGTH)])
def test_any_batch_and_length(config: LamConfig, batch: int, length: int) -> None:
    module = network(config, grid=None)
    query_tokens, key_tokens = torch.randn(batch, 5, 4), torch.randn(batch, length, 4)
    mask = module(query_tokens, key_tokens)
    heads = HEADS if config.heads == "per-head" else 1
    assert mask.left.shape == (batch, heads, 5, 4)
    assert mask.right.shape == (1 if config.keys == "position" else batch, heads, length, 4)
    query, key = torch.randn(batch, HEADS, 5, 2), torch.randn(batch, HEADS, length, 2)
    assert lam_attention(query, key, key, mask, op=config.op).shape == (batch, HEADS, 5, 2)


def test_cross_attention_reads_two_widths() -> None:
    module = MaskNetwork(LamConfig(rank=3, heads="shared", hidden=(5,), init="paper"), 6, 4, HEADS)
    queries, keys = torch.randn(2, 3, 6), torch.randn(2, 8, 4)
    mask = module(queries, keys)
    hidden = torch.relu(module.query[2](torch.relu(module.query[0](queries))))
    left = torch.cat([hidden, torch.ones(2, 3, 1)], dim=-1)
    right = module.key[2](torch.relu(module.key[0](keys)))
    torch.testing.assert_close(mask.dense()[:, 0], left @ right.transpose(1, 2))


def test_each_head_has_a_mask_of_its_own() -> None:
    for keys in ("content", "position"):
        module = network(LamConfig(keys=keys, heads="per-head"))
        perturb(module)
        tokens = torch.randn(2, LENGTH, 4)
        first, second = module(tokens, tokens).dense().unbind(1)
        assert not torch.allclose(first, second)


def test_position_table_follows_the_grid() -> None:
    module = network(LamConfig(keys="position", heads="shared", rank=3))
    perturb(module)
    tokens = torch.randn(2, 13, 4)
    mask = module(tokens, tokens, (3, 4))
    assert mask.right.shape == (1, 1, 13, 4)
    table: Tensor = torch.cat([module.table.weight, module.table.bias[..., None]], dim=-1)
    torch.testing.assert_close(mask.right[0, :, 0], table[:, 0])
    with pytest.raises(MaskShapeError, match=r"made for 7 tokens .* got 13 tokens, grid None"):
        module(tokens, tokens)


def test_max_length_wins_over_the_hosts_length() -> None:
    config = LamConfig(keys="position", max_length=20)
    module = network(config)
    assert module.table.weight.shape[1] == 20
    assert module.table.grid is None
    assert network(LamConfig(keys="position", max_length=LENGTH)).table.grid == (2, 3)
    assert network(config, length=None, grid=None).table.weight.shape[1] == 20
    tokens = torch.randn(1, LENGTH, 4)
    assert module(tokens, tokens).right.shape[2] == LENGTH


def test_position_keys_without_a_length_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"keys='position' needs a length, .* LamConfig\.max_length"):
        MaskNetwork(LamConfig(keys="position"), 4, 4, HEADS)


@each_variant
def test_state_dict_round_trip(config: LamConfig) -> None:
    one, other = network(config), network(config)
    perturb(one)
    other.load_state_dict(one.state_dict())
    tokens = torch.randn(2, LENGTH, 4)
    assert torch.equal(one(tokens, tokens).dense(), other(tokens, tokens).dense())
    one.reset_parameters()
    assert not torch.equal(one(tokens, tokens).dense(), other(tokens, tokens).dense())
