"""One layer's mask in a stack: sharing, passes, copies and the recorder."""

import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lamzoo.errors import ConfigError, MaskShapeError
from lamzoo.lam import Lam, LamConfig, MaskNetwork, MaskRecord, SharedState, lam_attention
from lamzoo.lam.ops import Op
from tests.lam.cases import SERVE_EVERYTHING, Case, written_out

DIM, HEADS, LENGTH = 6, 2, 5


class Block(nn.Module):
    """Residual masked attention without projections; tells the shared state when it begins, as adapters do."""

    def __init__(self, lam: Lam) -> None:
        super().__init__()
        self.lam = lam

    def forward(self, x: Tensor) -> Tensor:
        self.lam.shared.enter(x, id(self), needs_pass=self.lam.network is None)
        heads = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        out = x + self.lam.attend(x, x, heads, heads, heads).transpose(1, 2).flatten(2)
        self.lam.shared.leave(out)
        return out


def stack(config: LamConfig, depth: int = 3) -> nn.ModuleList:
    shared = SharedState()
    blocks = nn.ModuleList()
    for index in range(depth):
        network = MaskNetwork(config, DIM, DIM, HEADS, length=LENGTH) if config.layers == "multi" or not index else None
        blocks.append(Block(Lam(config, network, shared, is_last=index == depth - 1)))
    return blocks.double()


def run(blocks: nn.ModuleList, x: Tensor, checkpointed: bool = False) -> Tensor:
    blocks[0].lam.shared.begin()  # type: ignore[union-attr,operator]
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
    return x


def tokens(batch: int = 2) -> Tensor:
    return torch.randn(batch, LENGTH, DIM, dtype=torch.float64)


SINGLE = LamConfig(layers="single", op="mul", heads="shared", rank=2, init="paper")
MULTI = LamConfig(layers="multi", op="mul", heads="shared", rank=2, init="paper")


def test_single_layers_share_the_first_mask() -> None:
    blocks, records = stack(SINGLE), list[MaskRecord]()
    for block in blocks:
        block.lam.recorder = records.append  # type: ignore[union-attr]
    x = tokens()
    run(blocks, x)
    first = blocks[0].lam.network(x, x)  # type: ignore[union-attr,operator]
    assert len(records) == 3
    for record in records:
        assert torch.equal(record.mask.left, first.left)
        assert torch.equal(record.mask.right, first.right)
    assert [name for name, _ in blocks.named_parameters() if not name.startswith("0.lam.network.")] == []


def test_multi_layers_have_masks_of_their_own() -> None:
    blocks, records = stack(MULTI), list[MaskRecord]()
    for block in blocks:
        block.lam.recorder = records.append  # type: ignore[union-attr]
    run(blocks, tokens())
    assert not torch.allclose(records[0].mask.dense(), records[1].mask.dense())


def test_follower_before_its_first_layer_is_refused() -> None:
    blocks = stack(SINGLE)
    with pytest.raises(ConfigError, match=r"layers='single' .* first"):
        blocks[1](tokens())


def test_mask_is_forgotten_when_the_stack_ends() -> None:
    blocks = stack(SINGLE)
    run(blocks, tokens())
    with pytest.raises(ConfigError, match=r"layers='single' .* first"):
        blocks[1](tokens())


def test_mask_of_another_batch_is_refused() -> None:
    blocks = stack(SINGLE)
    blocks[0](tokens(2))
    with pytest.raises(MaskShapeError, match=r"left \(2, 1, 5, 3\)"):
        blocks[1](tokens(3))


def test_threads_do_not_see_each_others_masks() -> None:
    blocks = stack(SINGLE)
    blocks[0](tokens())
    errors = []

    def follow() -> None:
        try:
            blocks[1](tokens())
        except ConfigError as error:
            errors.append(error)

    thread = threading.Thread(target=follow)
    thread.start()
    thread.join()
    assert len(errors) == 1
    blocks[1](tokens())


@pytest.mark.parametrize("config", [SINGLE, MULTI], ids=["single", "multi"])
def test_checkpointing_gives_the_same_gradients_even_of_two_inputs_at_once(config: LamConfig) -> None:
    blocks, one, other = stack(config), tokens(), tokens()

    def gradients(checkpointed: bool) -> list[Tensor]:
        loss = run(blocks, one, checkpointed).square().sum() + run(blocks, other, checkpointed).pow(3).sum()
        with torch.no_grad():
            run(blocks, tokens())  # as an evaluation between forward and backward would
        return list(torch.autograd.grad(loss, list(blocks.parameters())))

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("config", [SINGLE, MULTI], ids=["single", "multi"])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_drop_the_shared_mask_and_share_a_state_of_their_own(config: LamConfig, clone: object) -> None:
    blocks, x = stack(config), tokens()
    blocks[0](x)  # a pass that has begun, with a mask in it that has a graph
    copied = clone(blocks)  # type: ignore[operator]
    assert copied[0].lam.shared is copied[2].lam.shared
    assert copied[0].lam.shared is not blocks[0].lam.shared  # type: ignore[union-attr]
    assert copied[0].lam.shared.current.mask is None
    assert torch.equal(run(copied, x), run(blocks, x))


@pytest.mark.parametrize("op", ["mul", "add"])
@pytest.mark.parametrize("backend", SERVE_EVERYTHING)
def test_recorder_sees_the_attention_and_changes_no_output(op: Op, backend: str) -> None:
    config = LamConfig(op=op, rank=2, init="paper", heads="per-head")
    lam = Lam(config, MaskNetwork(config, DIM, DIM, HEADS).double(), SharedState())
    lam.backend = backend
    x = tokens()
    query, key, value = torch.randn(3, 2, HEADS, LENGTH, 3, dtype=torch.float64)
    allowed = torch.tensor([True, True, True, False, True])
    bias = torch.randn(1, HEADS, LENGTH, LENGTH, dtype=torch.float64)
    arguments = {"allowed": allowed, "bias": bias, "is_causal": True, "scale": 0.4}
    plain = lam.attend(x, x, query, key, value, **arguments)  # type: ignore[arg-type]
    records: list[MaskRecord] = []
    lam.recorder = records.append
    recorded = lam.attend(x, x, query, key, value, **arguments)  # type: ignore[arg-type]
    torch.testing.assert_close(recorded, plain, atol=1e-12, rtol=0)
    (record,) = records
    # The weights are what attention returns for one-hot values.
    one_hot = torch.eye(LENGTH, dtype=torch.float64).expand(2, HEADS, -1, -1)
    case = Case(query, key, one_hot, *record.mask, op=op, **arguments)  # type: ignore[arg-type]
    torch.testing.assert_close(record.attention, written_out(case), atol=1e-12, rtol=0)
    torch.testing.assert_close(record.importance, record.mask.dense()[:, :, allowed].mean(2))
    assert not any(tensor.requires_grad for tensor in (*record.mask, record.attention, record.importance))


def test_attend_is_lam_attention_under_the_networks_mask() -> None:
    lam = Lam(MULTI, MaskNetwork(MULTI, DIM, DIM, HEADS).double(), SharedState())
    x = tokens()
    query, key, value = torch.randn(3, 2, HEADS, LENGTH, 3, dtype=torch.float64)
    expected = lam_attention(query, key, value, lam(x, x), op=MULTI.op, backend="eager")
    out, weights = lam.attend_with_weights(x, x, query, key, value)
    torch.testing.assert_close(lam.attend(x, x, query, key, value), expected)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weights @ value, expected)


def test_recorded_dropout_drops() -> None:
    lam = Lam(MULTI, MaskNetwork(MULTI, DIM, DIM, HEADS).double(), SharedState())
    x = tokens()
    query, key, value = torch.randn(3, 2, HEADS, LENGTH, 3, dtype=torch.float64)
    _, weights = lam.attend_with_weights(x, x, query, key, value, dropout_p=0.5)
    assert 0 < int((weights == 0).sum()) < weights.numel()


def test_wrong_arguments_are_refused_with_and_without_a_recorder() -> None:
    lam = Lam(MULTI, MaskNetwork(MULTI, DIM, DIM, HEADS).double(), SharedState())
    x = tokens()
    query = torch.randn(2, HEADS, LENGTH, 3, dtype=torch.float64)
    for recorder in (None, lambda record: None):
        lam.recorder = recorder
        with pytest.raises(MaskShapeError, match=r"`allowed` is torch\.float32"):
            lam.attend(x, x, query, query, query, allowed=torch.ones(LENGTH))
        with pytest.raises(ConfigError, match=r"scale is -1"):
            lam.attend(x, x, query, query, query, scale=-1.0)
    lam.recorder = None
    lam.backend = "flash"
    with pytest.raises(ConfigError, match=r"'flash'; available"):
        lam.attend(x, x, query, query, query)
