"""Which forward pass a block belongs to: checkpointing, wrappers, turns, stacks cut short, and nothing left behind."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import lamzoo
from lamzoo.adapters import add_lam, remove_lam
from lamzoo.lam import LamConfig, SharedState
from lamzoo.lam.passes import StackPass
from tests.adapters.timm_hosts import HOSTS

SIZES = ((32, 32), (16, 64), (64, 16))  # as many patches, in other grids
CASES = [("single", "content"), ("single", "position"), ("multi", "position")]
REDUCED = [("pruned", "position"), ("merged", "position"), ("plain", "content")]
cases = pytest.mark.parametrize(("layers", "keys"), CASES)
all_cases = pytest.mark.parametrize(("layers", "keys"), [*CASES, *REDUCED])


def masked(layers: str, keys: str, name: str = "vit_tiny_patch16_224", **kwargs: object) -> nn.Module:
    return add_lam(HOSTS[name].create(**kwargs), LamConfig(layers=layers, keys=keys, init="paper", rank=3))


def reduced(layers: str, keys: str, **kwargs: object) -> nn.Module:
    """A model whose tokens are "pruned", or "merged" with masks or in the "plain" host; or as :func:`masked`."""
    if layers == "plain":
        return lamzoo.merge_tokens(HOSTS["vit_tiny_patch16_224"].create(**kwargs), keep=0.4)
    model = masked("single" if (layers, keys) in REDUCED else layers, keys, **kwargs)
    if layers == "pruned":
        lamzoo.prune_tokens(model, keep=0.5, at=[0])
    if layers == "merged":
        lamzoo.merge_tokens(model, keep=0.4)
    return model


def state_of(model: nn.Module) -> SharedState:
    return next(module.shared for module in model.modules() if hasattr(module, "shared"))


def views() -> list[Tensor]:
    return [torch.randn(1, 3, *size) for size in SIZES]


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor], images: list[Tensor]) -> dict[str, Tensor]:
    """Gradients of several passes whose backward passes come after all of them."""
    model.zero_grad()
    sum(run(image).square().sum() for image in images).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for name, g in grads.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert_close(found[name], grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@all_cases
def test_fully_sharded_blocks_with_checkpointing_keep_gradients(layers: str, keys: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = reduced(layers, keys, dynamic_img_size=True).train()
    sharded, images = copy.deepcopy(model), views()
    mesh = init_device_mesh("cpu", (1,))
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    sharded.set_grad_checkpointing(True)
    assert_same(gradients(sharded, sharded, images), gradients(model, model, images))


@cases
@pytest.mark.parametrize("every", [2, 3])
def test_reruns_of_several_blocks_find_each_blocks_pass(layers: str, keys: str, every: int) -> None:
    model, images = masked(layers, keys, depth=4, dynamic_img_size=True), views()
    lamzoo.prune_tokens(model, keep=0.5, at=[0, 2], training="top-k").train()

    def run(image: Tensor, every: int | None = None) -> Tensor:
        x = model.norm_pre(model._pos_embed(model.patch_embed(image)))
        x = model.blocks(x) if every is None else timm.models.checkpoint_seq(model.blocks, x, every=every)
        return model.forward_head(model.norm(x))

    expected = gradients(model, run, images)
    assert_same(gradients(model, lambda image: run(image, every), images), expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("layers", "keys"), [CASES[1], *REDUCED[1:]])
def test_checkpointing_of_the_whole_model_around_that_of_its_blocks(layers: str, keys: str, reentrant: bool) -> None:
    model, images = reduced(layers, keys, dynamic_img_size=True), [x.requires_grad_() for x in views()]
    expected = gradients(model, model, images)
    model.set_grad_checkpointing(True)
    assert_same(gradients(model, lambda x: checkpoint(model, x, use_reentrant=reentrant), images), expected)


@pytest.mark.parametrize(("layers", "keys"), [CASES[2], REDUCED[2]])
def test_reentrant_checkpointing_finds_the_pass(layers: str, keys: str) -> None:
    model, images = reduced(layers, keys, dynamic_img_size=True), views()
    expected = gradients(model, model, images)
    timm.layers.set_reentrant_ckpt(True)
    try:
        model.set_grad_checkpointing(True)
        assert_same(gradients(model, model, images), expected)
    finally:
        timm.layers.set_reentrant_ckpt(False)


@cases
@pytest.mark.parametrize("trained", [".lam.", "blocks.1.mlp"])
def test_checkpointing_of_a_frozen_model_keeps_gradients(layers: str, keys: str, trained: str) -> None:
    model, images = masked(layers, keys, dynamic_img_size=True), views()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    expected = gradients(model, model, images)
    model.set_grad_checkpointing(True)
    assert_same(gradients(model, model, images), expected)


def test_a_graph_can_go_backward_twice() -> None:
    model, x = masked("single", "position"), views()[0]
    model.set_grad_checkpointing(True)
    loss = model(x).square().sum()
    first, second = (torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert_close(one, other)


class NodeObject:
    """A Python object of an autograd node, such as torch 2.11 makes anew each time it is asked for one."""

    def __init__(self, node: Any) -> None:
        self.node = node

    def __getattr__(self, name: str) -> Any:
        return getattr(self.node, name)


@all_cases
def test_reruns_find_their_pass_whatever_object_their_node_is(
    layers: str, keys: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = reduced(layers, keys, dynamic_img_size=True), views()
    expected = gradients(model, model, images)
    current_node, made = torch._C._current_autograd_node, []

    def new_object() -> NodeObject | None:
        node = current_node()
        made.append(None if node is None else NodeObject(node))  # in a list, so that no two have the same id
        return made[-1]

    monkeypatch.setattr(torch._C, "_current_autograd_node", new_object)
    model.set_grad_checkpointing(True)
    assert_same(gradients(model, model, images), expected)
    assert any(made)


@all_cases
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_reruns_in_other_threads_find_their_pass(layers: str, keys: str, device: str) -> None:
    # Of CUDA tensors, one thread executes all backward passes; of CPU tensors, each caller does its own.
    model = reduced(layers, keys, dynamic_img_size=True).to(device)
    images, parameters = [image.to(device) for image in views()], list(model.parameters())
    start = Barrier(len(images))

    def differentiate(loss: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    def work(image: Tensor) -> list[tuple[Tensor | None, ...]]:
        start.wait()
        return [differentiate(model(image).square().sum()) for _ in range(4)]

    expected = [differentiate(model(image).square().sum()) for image in images]
    model.set_grad_checkpointing(True)
    with ThreadPoolExecutor(len(images)) as pool:
        only_backward = list(pool.map(differentiate, [model(image).square().sum() for image in images]))
        both = list(pool.map(work, images))
    assert not state_of(model)._passes
    for index, wanted in enumerate(expected):
        for found in (only_backward[index], *both[index]):
            for one, other in zip(found, wanted, strict=True):
                assert (one is None) == (other is None)
                if one is not None:
                    assert_close(one, other, rtol=1e-3, atol=1e-4 if device == "cpu" else 1e-3)


@cases
def test_a_backward_pass_within_a_rerun_leaves_it_its_pass(layers: str, keys: str) -> None:
    model, (image, other, _) = masked(layers, keys, dynamic_img_size=True).eval(), views()
    expected = gradients(model, model, [image])
    model.set_grad_checkpointing(True)
    inner = model(other).square().sum()
    ran: list[int] = []

    def differentiate(*_: object) -> None:
        if torch._C._current_graph_task_id() >= 0 and not ran:
            ran.append(1)
            torch.autograd.grad(inner, list(model.parameters()), allow_unused=True)

    model.blocks[1].attn.register_forward_pre_hook(differentiate)
    assert_same(gradients(model, model, [image]), expected)
    assert ran


@pytest.mark.parametrize("name", ["single", "pruned", "merged"])
def test_a_backward_pass_that_raises_leaves_nothing_behind(name: str) -> None:
    model, image = reduced(name, "position"), views()[0]
    model.set_grad_checkpointing(True)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    with torch.utils.checkpoint.set_checkpoint_early_stop(False):  # so that reruns end and their pass stays
        loss = model(image).square().sum()
    model.blocks[1].norm1.weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        loss.backward()
    assert not state_of(model)._passes


@cases
@pytest.mark.parametrize("grad", [True, False])
def test_passes_that_take_turns_keep_their_own_mask_and_grid(layers: str, keys: str, grad: bool) -> None:
    model, images = masked(layers, keys, dynamic_img_size=True).eval(), views()
    with torch.set_grad_enabled(grad):
        expected = [model.blocks(model._pos_embed(model.patch_embed(image))) for image in images]
        tokens = [model._pos_embed(model.patch_embed(image)) for image in images]
        # Blocks begin one image after the other, each where it last was.
        model.patch_embed(images[0])
        tokens[0] = model.blocks[0](tokens[0])
        model.patch_embed(images[1])
        tokens[1] = model.blocks[0](tokens[1])
        assert_close(model.blocks[1](tokens[0]), expected[0])
        assert_close(model.blocks[1](tokens[1]), expected[1])


@pytest.mark.parametrize("clone", [None, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("grad", [True, False])
def test_a_stack_that_lost_its_last_layers_ends_its_pass(clone: Callable | None, grad: bool) -> None:
    model, x = masked("single", "content", depth=4).eval(), views()[0]
    model = model if clone is None else clone(model)
    expected = model.forward_intermediates(x, indices=[1], intermediates_only=True)
    model.prune_intermediate_layers([1])
    with torch.set_grad_enabled(grad):
        (out,) = model.forward_intermediates(x, indices=[1], intermediates_only=True)
    assert_close(out, expected[0])
    assert state_of(model).current.mask is None and not state_of(model)._passes
    del model.blocks[1]  # and once more
    model(x)
    assert state_of(model).current.mask is None


def test_a_stack_whose_layers_have_further_names_ends_its_pass() -> None:
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 3, enable_nested_tensor=False
    )
    model.alias = model.layers[0]
    add_lam(model, LamConfig(layers="single"))
    model(torch.randn(2, 5, 16)).sum().backward()
    assert not state_of(model)._passes


def test_a_shallow_copy_of_a_layer_does_not_join_its_stack() -> None:
    model, x = masked("single", "content").eval(), views()[0]
    expected = model(x)
    for block in model.blocks:
        copied = copy.copy(block.attn.lam)
        assert copied.shared is block.attn.lam.shared
        del copied
    assert torch.equal(model(x), expected) and not state_of(model)._passes


def test_a_pass_that_raises_midway_leaves_nothing_behind() -> None:
    model, x = masked("single", "position").eval(), views()[0]
    expected = model(x)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    handle = model.blocks[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(x)
    handle.remove()
    assert not state_of(model)._passes
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    "create",
    [
        lambda: masked("single", "position"),
        lambda: masked("single", "position", "vit_base_patch16_18x2_224"),  # two attentions a block
        lambda: reduced("merged", "position"),
        lambda: reduced("plain", "content"),
    ],
    ids=["masked", "two attentions", "merged", "merged without masks"],
)
def test_no_pass_outlives_its_graph(create: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[StackPass] = weakref.WeakSet()
    init = StackPass.__init__

    def noting_init(self: StackPass, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)
        alive.add(self)

    monkeypatch.setattr(StackPass, "__init__", noting_init)
    model = create()
    for checkpointing in (True, False):
        model.set_grad_checkpointing(checkpointing)
        loss = model(views()[0]).sum()
        assert alive or not checkpointing  # the graph holds them
        loss.backward()
        del loss
    with torch.no_grad():
        model(views()[0])
    gc.collect()
    assert not alive


def test_remove_lam_removes_every_hook() -> None:
    model = masked("single", "position")
    lamzoo.prune_tokens(model, keep=0.5, at=[0])
    remove_lam(model)
    for module in model.modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks)
        flags = (module._forward_hooks_always_called, module._forward_pre_hooks_with_kwargs)
        assert not any((*hooks, *flags))
