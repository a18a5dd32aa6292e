"""What merge_tokens promises of a timm vision transformer, with masks or without."""

import copy
import itertools
import math
import pickle
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import lamzoo
from lamzoo import LamConfig, TokenReduction, add_lam, capture_masks, merge_tokens, prune_tokens, remove_reduction
from lamzoo.errors import ConfigError, UnsupportedHostError
from lamzoo.reduction.matching import match, merged
from lamzoo.reduction.plan import checkerboard, merges_per_layer

CONFIGS: list[LamConfig | None] = [None] + [
    LamConfig(layers=layers, keys=keys, op=op, rank=3, init="paper")
    for layers, keys, op in itertools.product(("multi", "single"), ("content", "position"), ("mul", "add"))
]


def _name(config: LamConfig | None) -> str:
    return "plain" if config is None else f"{config.layers}-{config.keys}-{config.op}"


each_config = pytest.mark.parametrize("config", CONFIGS, ids=_name)
POOLINGS = {
    "class token": {},
    "registers": {"reg_tokens": 2},
    "mean": {"class_token": False, "global_pool": "avg"},
    "norm before the mean": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "mean with the class token": {"global_pool": "avg", "pool_include_prefix": True},
    "attention": {"class_token": False, "global_pool": "map"},
    "largest": {"global_pool": "max"},
}
# By default each configuration with the class token, and each pooling with two configurations.
each_config_and_pooling = pytest.mark.parametrize(
    ("config", "pooling"),
    [
        pytest.param(
            config,
            pooling,
            id=f"{_name(config)}-{pooling}",
            marks=() if pooling == "class token" or config in (CONFIGS[0], CONFIGS[-1]) else pytest.mark.slow,
        )
        for config, pooling in itertools.product(CONFIGS, POOLINGS)
    ],
)


def model(config: LamConfig | None = None, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 5, **kwargs}
    vit = timm.models.VisionTransformer(init_values=0.5, **options).eval()
    return vit if config is None else add_lam(vit, config)


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@each_config_and_pooling
def test_keeping_all_changes_nothing(config: LamConfig | None, pooling: str) -> None:
    vit, x = model(config, **POOLINGS[pooling]), images()
    before, features = vit(x), vit.forward_features(x)
    assert_close(merge_tokens(vit, keep=1)(x), before)
    assert_close(vit.forward_features(x), features)


@pytest.mark.parametrize("keys", ["content", "position"])
def test_fresh_masks_merge_the_tokens_of_the_plain_model(keys: Any) -> None:
    vit, x = merge_tokens(model(), keep=0.4), images()
    masked = merge_tokens(model(LamConfig(keys=keys)), keep=0.4)
    assert_close(masked(x), vit(x))
    assert_close(masked.forward_features(x), vit.forward_features(x))


@each_config
def test_a_sample_is_merged_as_if_it_were_alone(config: LamConfig | None) -> None:
    vit, x = merge_tokens(model(config), keep=0.4), images()
    assert_close(torch.cat([vit(sample) for sample in x.split(1)]), vit(x))


@each_config_and_pooling
def test_the_output_is_the_head_of_the_features_of_every_patch(config: LamConfig | None, pooling: str) -> None:
    vit, x = merge_tokens(model(config, **POOLINGS[pooling]), keep=0.4), images()
    features = vit.forward_features(x)
    assert features.shape[1] == 16 + vit.num_prefix_tokens
    assert_close(vit.forward_head(features), vit(x))
    last = vit.forward_intermediates(x, indices=1, norm=True, intermediates_only=True, output_fmt="NLC")[0]
    assert_close(last, features[:, vit.num_prefix_tokens :])


def test_equal_patches_merge_without_loss() -> None:
    """Half of the patches in each layer: sizes in attention and pooling make up for those that are gone."""
    for pooling in POOLINGS.values():
        vit = model(**pooling)
        vit.pos_embed.data.zero_()
        x = images()
        vit.patch_embed.register_forward_hook(lambda _, args, out: out[:, ::2].repeat_interleave(2, dim=1))
        before = vit(x)
        assert_close(merge_tokens(vit, r=8, at=(0,))(x), before)


@each_config
def test_later_layers_have_fewer_keys_and_queries_fewer_still(config: LamConfig | None) -> None:
    vit = merge_tokens(model(config), keep=0.5)
    if config is None:
        shapes = []
        for block in vit.blocks:
            block.attn.proj.register_forward_hook(lambda _, args, out: shapes.append(out.shape[1]))
        vit(images())
        assert shapes == [15, 12, 9, 1]
        return
    with capture_masks(vit) as masks:
        vit(images())
    assert [tuple(record.attention.shape[2:]) for record in masks.values()] == [(15, 17), (12, 15), (9, 12), (1, 9)]
    assert [tuple(record.mask.dense().shape[2:]) for record in masks.values()] == [(15, 17), (12, 15), (9, 12), (1, 9)]


@pytest.mark.parametrize("config", CONFIGS[1::3])
def test_captured_masks_say_which_tokens_are_one(config: LamConfig) -> None:
    vit, x = merge_tokens(model(config), keep=0.25), images()
    with capture_masks(vit) as masks:
        vit(x)
    first, *_, last = records = list(masks.values())
    assert first.key_places.sort().values[0].tolist() == list(range(17))  # in the order in which they are matched
    for before, after in itertools.pairwise(records):
        assert torch.equal(before.query_places, after.key_places)
        assert before.query_places.shape == (3, 17)
        assert [len(places.unique()) for places in after.key_places] == [after.attention.shape[3]] * 3
    assert torch.equal(last.query_places[:, 0], torch.zeros(3, dtype=torch.int64))
    assert (last.query_places[:, 1:] == -1).all()  # the class token alone
    with capture_masks(prune_tokens(vit, 0.5, (0,))) as masks:
        vit(x)
    places = list(masks.values())[1].key_places
    assert (places >= 0).sum(dim=1).tolist() == [9, 9, 9]


@each_config
def test_removing_gives_the_model_back(config: LamConfig | None) -> None:
    vit, x = model(config), images()
    before, state, classes = vit(x), vit.state_dict(), [type(module) for module in vit.modules()]
    merge_tokens(vit, keep=0.5)
    assert vit.token_reduction == TokenReduction(0.5)
    assert vit.state_dict().keys() == state.keys()
    assert not torch.equal(vit(x), before)
    remove_reduction(vit)
    assert torch.equal(vit(x), before)
    assert [type(module) for module in vit.modules()] == classes
    assert not hasattr(vit, "token_reduction")
    assert not any(module._forward_hooks for module in vit.modules() if config is None)


def test_one_reduction_replaces_another() -> None:
    vit, x = model(LamConfig(rank=3, init="paper")), images()
    pruned = prune_tokens(copy.deepcopy(vit), 0.5, (0,))(x)
    merged = merge_tokens(copy.deepcopy(vit), keep=0.5)(x)
    assert torch.equal(merge_tokens(prune_tokens(copy.deepcopy(vit), 0.5, (0,)), keep=0.5)(x), merged)
    assert torch.equal(prune_tokens(merge_tokens(vit, keep=0.5), 0.5, (0,))(x), pruned)
    assert lamzoo.remove_lam(vit).forward_features(x).shape == (3, 17, 16)


def test_a_call_in_another_thread_is_pooled_as_in_this_one() -> None:
    vit, x = merge_tokens(model(), keep=0.4), images()
    lengths: list[int] = []
    vit.blocks[-1].attn.proj.register_forward_hook(lambda _, args, out: lengths.append(out.shape[1]))
    with ThreadPoolExecutor(1) as pool:
        assert_close(pool.submit(vit, x).result(), vit(x))
    assert lengths == [1, 1]  # the class token alone


@pytest.mark.parametrize(
    "config", [CONFIGS[1], *(pytest.param(config, marks=pytest.mark.slow) for config in (None, *CONFIGS[4::3]))]
)
def test_compiles_as_one_graph_and_agrees(config: LamConfig | None) -> None:
    vit, x = merge_tokens(model(config, depth=3), keep=0.5), images()
    torch._dynamo.reset()
    compiled = torch.compile(vit, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(x), vit(x))


def test_a_compiled_model_matches_tokens_in_one_operator() -> None:
    vit, called = merge_tokens(model(None, depth=3), keep=0.5), []

    def backend(graph: Any, inputs: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    torch.compile(vit, backend=backend, fullgraph=True)(images())
    assert sum("least_pairs" in name for name in called) == 2  # the last layer computes the class token alone
    assert not any("topk" in name for name in called)


@pytest.mark.parametrize("sizes", [None, torch.tensor([1.0, 1, 2, 1, 1, 3, 1]).expand(2, -1)])
@pytest.mark.parametrize("right", [None, torch.randn(1, 2, 7, 3, generator=torch.Generator().manual_seed(0))])
def test_that_operator_is_as_torch_wants_it(sizes: Tensor | None, right: Tensor | None) -> None:
    torch.library.opcheck(torch.ops.lamzoo.least_pairs.default, (torch.randn(2, 7, 4), 2, 1, sizes, right))


@pytest.mark.parametrize(
    "config", [CONFIGS[1], *(pytest.param(config, marks=pytest.mark.slow) for config in (None, *CONFIGS[4::3]))]
)
def test_exports_with_any_batch(config: LamConfig | None) -> None:
    vit = merge_tokens(model(config, depth=2), keep=0.5)
    program = torch.export.export(vit, (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert "lamzoo" not in {str(node.target).partition(".")[0] for node in program.graph.nodes}
    assert_close(program.module()(images(5)), vit(images(5)))


@each_config
def test_gradient_checkpointing_changes_no_gradient(config: LamConfig | None) -> None:
    vit = merge_tokens(model(config), keep=0.4).train()
    gradients = []
    for checkpointing in (False, True):
        vit.set_grad_checkpointing(checkpointing)
        vit.zero_grad()
        outputs = [vit(images()), vit.forward_features(images()), vit(images(2))]  # three passes, then all backward
        sum(output.square().sum() for output in outputs).backward()
        gradients.append([None if p.grad is None else p.grad.clone() for p in vit.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert (plain is None) == (checkpointed is None)
        if plain is not None:
            assert_close(checkpointed, plain)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def fail(*_: object) -> None:
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("config", [None, *CONFIGS[1::3]])
@pytest.mark.parametrize("stop", [interrupt, fail])
@pytest.mark.parametrize("place", ["blocks.0.attn", "blocks.2.mlp", "norm"])
def test_an_interrupted_pass_leaves_no_trace(config: LamConfig | None, stop: Callable[..., None], place: str) -> None:
    vit, x = merge_tokens(model(config), keep=0.4), images()
    before, features = vit(x), vit.forward_features(x)
    for run in (vit, vit.forward_features):
        handle = vit.get_submodule(place).register_forward_pre_hook(stop)
        with pytest.raises((KeyboardInterrupt, RuntimeError)):
            run(x)
        handle.remove()
        assert torch.equal(vit.forward_features(x), features)
        assert torch.equal(vit(x), before)


@pytest.mark.parametrize("config", [None, CONFIGS[1]], ids=["plain", "masked"])
@pytest.mark.parametrize("place", ["blocks.0.attn", "blocks.2.norm1", "blocks.2.mlp"])
def test_after_an_interrupt_a_block_that_runs_on_its_own_merges_nothing(config: LamConfig | None, place: str) -> None:
    vit, tokens = model(config), torch.randn(2, 17, 16)
    expected = [block(tokens) for block in vit.blocks[1:]]
    merge_tokens(vit, keep=0.4)
    for block, alone in zip(vit.blocks[1:], expected, strict=True):
        handle = vit.get_submodule(place).register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            vit(images())
        handle.remove()
        assert_close(block(tokens), alone)


@each_config
def test_a_pass_that_stopped_early_changes_no_later_one(config: LamConfig | None) -> None:
    vit, x = model(config), images()
    whole = vit(x)
    merge_tokens(vit, keep=0.4)
    before, features = vit(x), vit.forward_features(x)
    for run, expected in ((vit, before), (vit.forward_features, features)):
        vit.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
        assert torch.equal(run(x), expected)
    vit.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    assert torch.equal(remove_reduction(vit)(x), whole)
    if config is not None:
        with capture_masks(vit) as masks:
            vit(x)
        assert all(record.key_places is None for record in masks.values())


class MeanOfPatches(timm.models.VisionTransformer):
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x[:, 1:].mean(dim=1))


class SumOfBlocks(timm.models.VisionTransformer):
    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        outputs = [self._pos_embed(self.patch_embed(x))]
        for block in self.blocks:
            outputs.append(block(outputs[-1]))
        return self.norm(sum(outputs))


class TwoRounds(timm.models.VisionTransformer):
    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return self.norm(self.blocks(self.blocks(self._pos_embed(self.patch_embed(x)))))


@pytest.mark.parametrize("kind", [MeanOfPatches, SumOfBlocks, TwoRounds])
@pytest.mark.parametrize("config", [None, *CONFIGS[1::3]])
def test_a_forward_pass_of_the_users_class_gets_every_patch(kind: type[nn.Module], config: LamConfig | None) -> None:
    torch.manual_seed(0)
    vit = kind(img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=5).eval()
    vit, x = vit if config is None else add_lam(vit, config), images()
    before = vit(x)
    assert_close(merge_tokens(vit, keep=1)(x), before)
    assert_close(merge_tokens(vit, keep=0.5)(x), vit.forward_head(vit.forward_features(x)))


@pytest.mark.parametrize(
    "forward",
    [lambda vit: vit.forward_features, lambda vit: partial(vit.get_intermediate_layers, n=[3])],
    ids=["forward_features", "get_intermediate_layers"],
)
def test_a_forward_pass_that_a_user_has_put_in_gets_every_patch(forward: Callable[[nn.Module], Any]) -> None:
    vit, x = model(), images()
    vit.forward = forward(vit)
    assert_close(merge_tokens(vit, keep=0.5)(x), vit.forward(x))


@pytest.mark.parametrize("config", [None, *CONFIGS[1::3]])
@pytest.mark.parametrize("clone", [lambda vit: vit, copy.deepcopy, lambda vit: pickle.loads(pickle.dumps(vit))])
def test_a_stack_that_lost_its_last_blocks_gives_every_patch_back(
    config: LamConfig | None, clone: Callable[[nn.Module], nn.Module]
) -> None:
    for pooling in (POOLINGS["class token"], POOLINGS["mean"]):
        vit, x = clone(merge_tokens(model(config, **pooling), keep=0.4)), images()
        before = vit.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
        vit.prune_intermediate_layers([1])
        assert_close(vit.forward_intermediates(x, indices=[1], intermediates_only=True)[0], before)
        assert vit.blocks[0].attn.lam.shared.current.token_map is None  # the pass has ended
        assert_close(vit(x), vit.forward_head(vit.forward_features(x)))


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def triple_forward(linear: nn.Linear) -> nn.Linear:
    forward = linear.forward
    linear.forward = lambda x: 3 * forward(x)
    return linear


def triple_hook(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_hook(lambda _, args, output: 3 * output)
    return linear


def triple_weight_norm(linear: nn.Linear) -> nn.Linear:
    linear = nn.utils.weight_norm(linear)  # its hook computes the weight in each forward pass
    linear.weight_g.data.mul_(3)
    return linear


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("change", [LoRA, triple_forward, triple_hook, triple_weight_norm])
@pytest.mark.parametrize("config", [None, LamConfig(rank=3, init="paper")], ids=["plain", "masked"])
def test_a_changed_projection_computes_its_own_forward_pass(
    change: Callable[[nn.Linear], nn.Module], config: LamConfig | None
) -> None:
    vit, x = model(), images()
    vit.pos_embed.data.zero_()
    vit.patch_embed.register_forward_hook(lambda _, args, out: out[:, ::2].repeat_interleave(2, dim=1))
    for block in vit.blocks:
        block.attn.qkv = change(block.attn.qkv)
    vit = vit if config is None else add_lam(vit, config)
    before = vit(x)
    assert_close(merge_tokens(vit, r=8, at=(0,))(x), before)


@pytest.mark.parametrize("config", [None, *CONFIGS[1::3]])
def test_traces_with_torch_jit(config: LamConfig | None) -> None:
    vit, x = merge_tokens(model(config, depth=2), keep=0.4), images()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that traces take shapes as constants
        assert_close(torch.jit.trace(vit, images(3), check_trace=False)(x), vit(x))


def test_maps_over_samples_with_vmap() -> None:
    vit, x = merge_tokens(model(LamConfig(layers="single", keys="position", rank=3)), keep=0.4), images()
    assert_close(torch.func.vmap(vit)(x.unsqueeze(1)).squeeze(1), vit(x))


@pytest.mark.parametrize("config", [None, *CONFIGS[1::3]])
def test_any_number_of_images_and_patches(config: LamConfig | None) -> None:
    vit = merge_tokens(model(config), keep=0.01)
    assert vit(images(0)).shape == (0, 5)
    assert vit.forward_features(images(0)).shape == (0, 17, 16)
    for width in (8, 16, 24):
        vit = merge_tokens(model(config, img_size=(8, width)), keep=0.01)
        assert vit(images(2)[..., :8, :width]).isfinite().all()


@pytest.mark.parametrize("config", [None, LamConfig(rank=3, init="paper")], ids=["plain", "masked"])
def test_a_block_that_runs_on_its_own_merges_nothing(config: LamConfig | None) -> None:
    vit, tokens = model(config), torch.randn(2, 17, 16)
    expected = vit.blocks[1](tokens)
    assert_close(merge_tokens(vit, keep=0.5).blocks[1](tokens), expected)


@each_config
def test_a_broken_sample_breaks_no_other(config: LamConfig | None) -> None:
    vit, x = merge_tokens(model(config), keep=0.4), images()
    x[1] = torch.inf
    assert_close(vit(x)[::2], vit(x[::2]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [None, LamConfig(rank=3, init="paper")], ids=["plain", "masked"])
def test_works_in_half_precision(dtype: torch.dtype, config: LamConfig | None) -> None:
    vit, x = merge_tokens(model(config), keep=0.5), images()
    with torch.no_grad(), torch.autocast("cpu", dtype):
        assert vit(x).isfinite().all()
    assert vit.to(dtype)(x.to(dtype)).isfinite().all()


def test_a_budget_is_kept_and_used() -> None:
    vit = model()
    target = 0.7 * lamzoo.profile(vit).gmacs
    merge_tokens(vit, target_gmacs=target)
    assert 0.95 * target < lamzoo.profile(vit).gmacs <= target
    assert lamzoo.profile(merge_tokens(vit, target_gmacs=0.9 * target)).gmacs <= 0.9 * target
    with pytest.raises(ConfigError, match=r"target_gmacs=1e-05: with as few tokens"):
        merge_tokens(vit, target_gmacs=1e-5)
    assert lamzoo.profile(vit).gmacs <= 0.9 * target  # a refusal leaves the earlier reduction


def test_a_budget_that_may_be_meant_as_a_share_is_answered_with_keep(caplog: pytest.LogCaptureFixture) -> None:
    vit = model()
    whole = lamzoo.profile(vit).gmacs
    with pytest.raises(ConfigError, match=r"GMACs; take a higher target, or give the share of patches to keep as keep"):
        merge_tokens(vit, target_gmacs=1e-5)
    merge_tokens(vit, target_gmacs=0.63)
    merge_tokens(vit, target_gmacs=63)
    assert vit.token_reduction == TokenReduction(1.0)
    assert [record.getMessage() for record in caplog.records] == [
        f"target_gmacs={target} is above the {whole:.4g} GMACs of the model with all tokens, which are all kept; "
        f"take a lower target{way_out}."
        for target, way_out in ((0.63, ", or give the share of patches to keep as keep=0.63"), (63, ""))
    ]
    caplog.clear()
    merge_tokens(vit, target_gmacs=whole)  # the last layer saves a little
    assert vit.token_reduction == TokenReduction(1.0)
    assert not caplog.records


@pytest.mark.parametrize("arguments", [{"keep": 0.5}, {"r": 1}, {"keep": 1, "at": (0,)}, {"target_gmacs": 1e-5}])
def test_a_model_in_which_merging_saves_nothing_says_so(arguments: dict[str, Any]) -> None:
    vit = model(depth=1)
    with pytest.raises(ConfigError, match=r"Tokens can't merge in blocks: it has one block, .*; leave it out, or give"):
        merge_tokens(vit, **arguments)
    assert not hasattr(vit, "token_reduction")
    assert not any(module._forward_pre_hooks for module in vit.modules())
    assert merge_tokens(vit, keep=1).token_reduction == TokenReduction(1.0)
    assert merge_tokens(model(depth=1, **POOLINGS["mean"]), keep=0.5)(images()).isfinite().all()


def test_other_image_sizes_keep_the_same_share() -> None:
    vit = merge_tokens(model(LamConfig(keys="position", rank=3), dynamic_img_size=True), keep=0.5)
    with capture_masks(vit) as masks:
        vit(torch.randn(2, 3, 48, 48))
    assert list(masks.values())[-1].attention.shape[2:] == (1, 1 + 18)


@each_config
def test_patches_are_matched_on_the_grid_of_the_image(config: LamConfig | None) -> None:
    vit, x = model(config, dynamic_img_size=True), torch.randn(2, 3, 24, 64)
    merge_tokens(vit, keep=0.5)
    sized = remove_reduction(copy.deepcopy(vit))
    sized.set_input_size((24, 64))
    assert torch.allclose(vit(x), merge_tokens(sized, keep=0.5)(x), atol=1e-6)
    assert torch.allclose(vit.forward_head(vit.forward_features(x)), vit(x), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of target_gmacs, keep and r, and got none"),
        ({"keep": 0.5, "r": 2}, "got keep=0.5, r=2"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"r": -1}, "r=-1"),
        ({"r": 2.5}, "r=2.5"),
        ({"r": 6}, "r=6: 16 patches are too few for so many merges in each layer; take fewer"),
        ({"r": 9, "at": (0,)}, "r=9: 16 patches are too few for so many merges in each layer"),
        ({"keep": 0.5, "at": (3,)}, r"at=\(3,\): tokens can merge in layers 0 to 2 of blocks"),
        ({"keep": 0.5, "at": ()}, "name at least one layer"),
        ({"keep": 0.5, "at": 3}, "at=3: name at least one layer"),
        ({"keep": "half"}, "keep='half': the share of tokens to keep must be a number above 0 and at most 1"),
        ({"target_gmacs": float("nan")}, "target_gmacs=nan: the limit must be a number of GMACs above 0"),
        ({"target_gmacs": -1}, "target_gmacs=-1: the limit"),
        ({"target_gmacs": "1"}, "target_gmacs='1': the limit"),
    ],
)
def test_wrong_settings_are_named_and_leave_an_earlier_reduction(arguments: dict[str, object], message: str) -> None:
    vit = merge_tokens(model(), keep=0.25)
    with pytest.raises(ConfigError, match=message):
        merge_tokens(vit, **arguments)
    assert vit.token_reduction == TokenReduction(0.25)
    assert vit.blocks[0].attn.lam.shared is next(iter(vit._forward_pre_hooks.values())).shared


def test_settings_of_pruning_are_refused_in_merging() -> None:
    with pytest.raises(ConfigError, match="score='attention' is a setting of pruning"):
        TokenReduction(0.5, score="attention")
    with pytest.raises(ConfigError, match="method='mix'"):
        TokenReduction(0.5, "mix")  # type: ignore[arg-type]


def test_models_that_cannot_merge_are_refused_and_left_alone() -> None:
    vit = timm.create_model("beit_base_patch16_224", embed_dim=24, num_heads=2, depth=1, num_classes=2)
    with pytest.raises(UnsupportedHostError, match=r"Beit adds a bias for each pair of positions"):
        merge_tokens(vit, keep=0.5)
    with pytest.raises(UnsupportedHostError):
        merge_tokens(nn.Linear(2, 2), keep=0.5)
    assert not any(module._forward_pre_hooks for module in vit.modules())
    vit = model()
    vit.blocks[2] = vit.blocks[1]
    with pytest.raises(UnsupportedHostError, match="blocks, which runs a block or its attention several times"):
        merge_tokens(vit, keep=0.5)


@pytest.mark.parametrize("config", [None, LamConfig(rank=3)], ids=["plain", "masked"])
def test_causal_attention_over_all_tokens_is_refused(config: LamConfig | None) -> None:
    vit = merge_tokens(model(config), keep=0.5)
    with pytest.raises(UnsupportedHostError, match="while it is called with is_causal"):
        vit(images(), is_causal=True)


def test_what_is_for_pruning_alone_says_so() -> None:
    with pytest.raises(UnsupportedHostError, match=r"no learnable masks.*merge its tokens with lamzoo\.merge_tokens"):
        prune_tokens(model(), 0.5)
    with pytest.raises(ConfigError, match="merged, which has no loss of its own"):
        lamzoo.pruning_loss(merge_tokens(model(), keep=0.5))


def test_masks_come_before_merging() -> None:
    vit = merge_tokens(model(), keep=0.5)
    with pytest.raises(UnsupportedHostError, match="call lamzoo.remove_reduction"):
        add_lam(vit)


@settings(derandomize=True, max_examples=60)
@given(patches=st.integers(1, 300), keep=st.floats(0.01, 1), layers=st.integers(1, 24))
def test_merges_are_spread_evenly(patches: int, keep: float, layers: int) -> None:
    merges = merges_per_layer(patches, keep, layers)
    assert len(merges) == layers
    left, most = patches, 0.0
    for count in merges:
        assert 0 <= count <= left // 2
        most = max(most, count / left)
        left -= count
    due = max(1, math.ceil(keep * patches - 1e-6))
    assert left >= due
    if left > due:  # as many as can merge
        assert keep < 0.51**layers or merges[-1] == (left + merges[-1]) // 2
    if patches - due <= layers * int(0.3 * due):  # no layer would merge more than 30 %
        assert max(merges) - min(merges) <= 1


@settings(derandomize=True, max_examples=60)
@given(patches=st.integers(0, 300), keep=st.floats(0.01, 1), more=st.floats(0, 0.2), layers=st.integers(1, 24))
def test_no_layer_has_fewer_patches_where_more_are_kept(patches: int, keep: float, more: float, layers: int) -> None:
    fewer, others = (merges_per_layer(patches, share, layers) for share in (keep, min(1.0, keep + more)))
    assert all(a >= b for a, b in zip(itertools.accumulate(fewer), itertools.accumulate(others), strict=True))
    longer = merges_per_layer(patches + 1, keep, layers)
    left = [
        [length - gone for gone in itertools.accumulate(plan)]
        for length, plan in ((patches, fewer), (patches + 1, longer))
    ]
    assert all(a <= b for a, b in zip(*left, strict=True))


def test_matching_sees_a_checkerboard() -> None:
    for grid, prefix in (((4, 6), 0), ((3, 2), 2), ((8, 8), 1)):
        patches = grid[0] * grid[1]
        order = checkerboard(patches, prefix, (None, grid), torch.empty(0))
        assert order is not None
        assert order[:prefix].tolist() == list(range(prefix))
        assert torch.equal(order[order], torch.arange(prefix + patches))
        places = order[prefix:] - prefix
        colours = (places // grid[1] + places % grid[1]) % 2
        assert colours.tolist() == [0, 1] * (patches // 2)
    assert checkerboard(35, 1, ((5, 7),), torch.empty(0)) is None  # rows of odd length alternate
    assert checkerboard(24, 1, (None, (5, 5)), torch.empty(0)) is None
    assert checkerboard(6, 0, ((1, 6),), torch.empty(0)) is None


@settings(derandomize=True, max_examples=60)
@given(
    batch=st.integers(1, 3),
    patches=st.integers(2, 13),
    prefix=st.integers(0, 2),
    data=st.data(),
    seed=st.integers(0, 2**20),
)
def test_matching_merges_the_cheapest_and_loses_no_patch(
    batch: int, patches: int, prefix: int, data: st.DataObject, seed: int
) -> None:
    count = data.draw(st.integers(0, patches // 2))
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, prefix + patches, 4, generator=generator)
    sizes = torch.randint(1, 5, (batch, prefix + patches), generator=generator).float()
    token_map, few = match(tokens, count, prefix, sizes)
    assert token_map.into is not None
    assert few.shape == token_map.kept.shape == (batch, prefix + patches - count)
    assert_close(few.sum(1), sizes.sum(1))
    assert_close((few.unsqueeze(-1) * token_map(tokens)).sum(1), (sizes.unsqueeze(-1) * tokens).sum(1))
    assert torch.equal(token_map.kept[:, :prefix], torch.arange(prefix).expand(batch, -1))
    even, odd = tokens[:, prefix::2], tokens[:, prefix + 1 :: 2]
    ours, theirs = sizes[:, prefix::2].unsqueeze(2), sizes[:, prefix + 1 :: 2].unsqueeze(1)
    cost = torch.cdist(even, odd).square() * ours * theirs / (ours + theirs)
    least, partner = cost.min(dim=2)
    for sample in range(batch):
        gone = sorted(set(range(prefix + patches)) - set(token_map.kept[sample].tolist()))
        assert all((token - prefix) % 2 == 0 for token in gone)
        chosen = [(token - prefix) // 2 for token in gone]
        assert_close(least[sample, chosen].sort().values, least[sample].sort().values[:count], rtol=1e-3, atol=1e-4)
        for token, place in zip(gone, chosen, strict=True):
            target = token_map.kept[sample, token_map.into[sample, token]].item()
            assert_close(cost[sample, place, (target - prefix) // 2], least[sample, place], rtol=1e-3, atol=1e-4)
            assert 0 <= partner[sample, place] < odd.shape[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_opposite_and_zero_and_long_tokens_merge_to_finite_ones(dtype: torch.dtype) -> None:
    for tokens in (torch.tensor([1.0, -1.0]), torch.zeros(2), torch.full((2,), 20000.0)):
        tokens = tokens[None, :, None].expand(1, 2, 64).to(dtype).requires_grad_()
        token_map, _ = match(tokens, 1, 0)
        few = merged(tokens, token_map)
        assert few.isfinite().all()
        assert tokens[0, 0, 0] > 1 or torch.autograd.grad(few.sum(), tokens)[0].isfinite().all()
    assert_close(few, tokens[:, :1], rtol=1e-3, atol=0)


def test_equal_tokens_merge_by_their_masks() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = (100 * torch.randn(1, 1, 16, generator=generator)).expand(1, 12, 16)
    right = torch.randn(1, 2, 12, 3, generator=generator)
    by_masks, _ = match(torch.zeros(1, 12, 16), 4, 0, None, right)
    assert torch.equal(match(tokens, 4, 0, None, right)[0].kept, by_masks.kept)
