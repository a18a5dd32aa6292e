"""What prune_tokens promises of a timm vision transformer with masks."""

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import lamzoo
from lamzoo import LamConfig, add_lam, capture_masks, prune_tokens, pruning_loss, remove_lam, remove_pruning
from lamzoo.errors import ConfigError, UnsupportedHostError
from lamzoo.reduction.budget import merge_to_share

CONFIGS = [
    LamConfig(layers=layers, keys=keys, op=op, rank=3, init="paper")
    for layers, keys, op in itertools.product(("multi", "single"), ("content", "position"), ("mul", "add"))
]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.layers}-{c.keys}-{c.op}")
each_rest = pytest.mark.parametrize("rest", ["drop", "merge", "nearest"])
POSITION = LamConfig(keys="position", rank=3, init="paper")


def host(**kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 5, **kwargs}
    return timm.models.VisionTransformer(**options).eval()


def model(config: LamConfig = POSITION, **kwargs: object) -> nn.Module:
    return add_lam(host(**kwargs), config)


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@each_config
@each_rest
def test_keeping_all_changes_nothing(config: LamConfig, rest: str) -> None:
    vit, x = model(config), images()
    before = vit(x)
    assert_close(prune_tokens(vit, 1.0, (0, 1, 2), rest=rest)(x), before)


@each_config
@each_rest
def test_a_sample_is_pruned_as_if_it_were_alone(config: LamConfig, rest: str) -> None:
    vit, x = prune_tokens(model(config), 0.5, (0, 2), rest=rest), images()
    together = vit(x)
    assert_close(torch.cat([vit(sample) for sample in x.split(1)]), together)


@each_config
def test_later_layers_see_the_tokens_that_are_left(config: LamConfig) -> None:
    vit = prune_tokens(model(config), 0.5, (0, 2))
    with capture_masks(vit) as masks:
        features = vit.forward_features(images())
    assert [record.attention.shape[-1] for record in masks.values()] == [17, 9, 9, 5]
    assert [record.mask.right.shape[2] for record in masks.values()] == [17, 9, 9, 5]
    assert features.shape == (3, 5, 16)
    assert vit(images()).shape == (3, 5)


def test_position_keys_stay_with_their_tokens() -> None:
    vit = prune_tokens(model(), 0.5, (0,), score="mask")
    with capture_masks(vit) as masks:
        vit(images())
    first, second = masks["blocks.0.attn"], masks["blocks.1.attn"]
    best = first.importance.mean(1)[:, 1:].topk(8).indices.sort().values + 1
    kept = torch.cat([torch.zeros(3, 1, dtype=torch.int64), best], dim=1)
    table = vit.blocks[1].attn.lam.network.table(17)[0]
    for sample in range(3):
        assert_close(second.mask.right[sample], table[:, kept[sample]])


@each_rest
def test_a_shared_mask_loses_the_rows_and_columns_of_tokens_that_left(rest: str) -> None:
    vit = prune_tokens(model(LamConfig(layers="single", rank=3, init="paper")), 0.5, (1,), rest=rest)
    with capture_masks(vit) as masks:
        vit(images())
    first, third = masks["blocks.0.attn"].mask, masks["blocks.2.attn"].mask
    assert third.dense().shape[-2:] == ((10, 10) if rest == "merge" else (9, 9))
    if rest != "nearest":  # which averages rows as well
        rows = {tuple(row) for row in first.left[0, 0].round(decimals=4).tolist()}
        assert {tuple(row) for row in third.left[0, 0, :9].round(decimals=4).tolist()} <= rows


@pytest.mark.parametrize(  # tracing takes seconds: every configuration once, half in two stages
    ("config", "rest", "at"),
    [
        pytest.param(
            config,
            rest,
            at,
            id=f"{rest}-{config.layers}-{config.keys}-{config.op}",
            marks=[pytest.mark.slow] if index else [],
        )
        for index, (config, rest, at) in enumerate(
            zip(CONFIGS, itertools.cycle(("drop", "merge", "nearest")), itertools.cycle(((0, 1), (0,))), strict=False)
        )
    ],
)
def test_compiles_as_one_graph_and_agrees(config: LamConfig, rest: str, at: tuple[int, ...]) -> None:
    vit, x = prune_tokens(model(config, depth=len(at) + 1), 0.5, at, rest=rest), images()
    torch._dynamo.reset()
    compiled = torch.compile(vit, backend="aot_eager", fullgraph=True)
    with torch.no_grad():  # the graph of gradients is that of training, below
        assert_close(compiled(x), vit(x))


@pytest.mark.parametrize("rest", ["merge", *(pytest.param(x, marks=pytest.mark.slow) for x in ("drop", "nearest"))])
def test_exports_with_any_batch(rest: str) -> None:
    vit = prune_tokens(model(depth=2), 0.5, (0,), rest=rest)
    program = torch.export.export(vit, (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert_close(program.module()(images(5)), vit(images(5)))


@pytest.mark.parametrize("layers", ["multi", "single"])
def test_gradient_checkpointing_changes_no_gradient(layers: str) -> None:
    vit = prune_tokens(model(LamConfig(layers=layers, keys="position", rank=3, init="paper")), 0.5, (0, 2)).train()
    gradients = []
    for checkpointing in (False, True):
        vit.set_grad_checkpointing(checkpointing)
        vit.zero_grad()
        loss = vit(images()).square().sum() + vit(images(2)).square().sum()  # two passes, then both backward
        loss.backward()
        gradients.append([None if p.grad is None else p.grad.clone() for p in vit.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert (plain is None) == (checkpointed is None)
        if plain is not None:
            assert_close(checkpointed, plain)


POOLINGS = {
    "class token": {},
    "mean": {"class_token": False, "global_pool": "avg"},
    "mean with the class token": {"global_pool": "avg", "pool_include_prefix": True},
    "norm behind the mean": {"global_pool": "avg", "reg_tokens": 1},
}


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("score", ["mask", "attention", "attention-value", "redundancy"])
def test_hiding_tokens_in_training_is_dropping_them(pooling: str, score: str) -> None:
    vit = prune_tokens(model(**POOLINGS[pooling]), 0.5, (0, 1, 2), score=score)
    for x in images().split(1):  # of one sample alone, the batch's threshold lets the same tokens stay
        dropped = vit.eval()(x)
        assert_close(vit.train()(x), dropped)


@each_config
def test_hiding_tokens_in_training_is_dropping_them_for_every_mask(config: LamConfig) -> None:
    vit = prune_tokens(model(config), 0.6, (0, 2))
    for x in images().split(1):
        dropped = vit.eval()(x)
        assert_close(vit.train()(x), dropped)


@each_config
def test_the_masks_learn_what_to_keep(config: LamConfig) -> None:
    gradients = {}
    for training in ("straight-through", "top-k"):
        vit = prune_tokens(model(config), 0.5, (1,), training=training).train()
        hidden = vit.blocks[1].attn.lam.register_forward_hook(lambda lam, args, mask: mask)
        vit(images()).square().sum().backward()
        hidden.remove()
        gradients[training] = lamzoo.lam_parameters(vit)
    assert any(
        not torch.allclose(a.grad, b.grad) for a, b in zip(*gradients.values(), strict=True) if a.grad is not None
    )


def test_the_loss_is_the_distance_of_each_sample_from_its_share() -> None:
    vit = prune_tokens(model(), 0.5, (0, 1)).train()
    shares = []
    for index in (0, 1):
        vit.blocks[index].register_forward_hook(
            lambda block, args, output: shares.append(block.attn.lam.shared.current.kept[:, 1:].mean(1))
        )
    vit(images())
    expected = torch.stack([(shares[0] - 0.5) ** 2, (shares[1] - 0.25) ** 2]).mean()
    assert expected > 0
    loss = pruning_loss(nn.DataParallel(vit))
    assert_close(loss, expected)
    loss.backward()
    assert vit.blocks[0].attn.lam.network.table(17).shape[-1] == 4
    assert all(p.grad is not None for p in vit.blocks[0].attn.lam.parameters())
    with pytest.raises(ConfigError, match="none since the last call"):
        pruning_loss(vit)


def test_the_loss_of_what_was_not_trained_is_an_error() -> None:
    for vit in (model(), prune_tokens(model(), 0.5, (0,)), prune_tokens(model(), 0.5, (0,), training="top-k").train()):
        vit(images())
        with pytest.raises(ConfigError, match="pruning_loss needs a forward pass in training mode"):
            pruning_loss(vit)


def test_masks_alone_in_training_learn_too() -> None:
    vit = prune_tokens(model(), 0.5, (0,))
    for block in vit.blocks:
        block.attn.lam.train()
    vit(images())
    assert pruning_loss(vit).requires_grad


@pytest.mark.slow
def test_training_pruned_is_one_graph() -> None:
    vit, x = prune_tokens(model(depth=3), 0.5, (0, 1)).train(), images()
    torch._dynamo.reset()
    assert_close(torch.compile(vit, backend="aot_eager", fullgraph=True)(x), vit(x))


def test_capturing_in_training_shows_what_is_hidden() -> None:
    vit = prune_tokens(model(), 0.5, (0,)).train()
    with capture_masks(vit) as masks:
        captured = vit(images())
    assert_close(captured, vit(images()))
    attention, scores = masks["blocks.1.attn"].attention, masks["blocks.1.attn"].scores
    assert scores is not None
    assert_close(scores.attention().sum(dim=(1, 2)) > 0, attention.sum(dim=(1, 2)) > 0)
    assert (attention.sum(dim=(1, 2)) > 0).float().sum() == 3 + 3 * 8  # class tokens, and half of the batch's patches
    assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))


def test_what_cannot_be_hidden_from_the_pooling_is_said() -> None:
    vit = prune_tokens(model(class_token=False, global_pool="map"), 0.5, (0,))
    vit(images())
    with pytest.raises(UnsupportedHostError, match=r"pools by 'attention'.*training='top-k'"):
        vit.train()(images())
    assert prune_tokens(vit, 0.5, (0,), training="top-k")(images()).shape == (3, 5)


def test_a_saved_model_is_pruned_when_it_comes_back(tmp_path: Path) -> None:
    vit = prune_tokens(lamzoo.create_model("lam_vit_micro.cifar10", num_classes=3), 0.6, (1,), rest="merge").eval()
    lamzoo.save_pretrained(vit, tmp_path)
    back = lamzoo.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert back.prune_config == vit.prune_config
    assert_close(back(images()), vit(images()))
    assert not hasattr(lamzoo.create_model(f"local-dir:{tmp_path}", lam=False), "prune_config")


def test_an_interrupted_pass_leaves_no_trace() -> None:
    vit, x = prune_tokens(model(LamConfig(rank=3, init="paper")), 0.5, (0, 1)), images()
    before = vit(x)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = vit.blocks[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        vit(x)
    handle.remove()
    assert_close(vit(x), before)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_are_pruned_too_and_on_their_own(clone: object) -> None:
    vit, x = prune_tokens(model(), 0.5, (0, 2)), images()
    before = vit(x)
    vit.train()(x)  # leaves the decisions, and their graph, for the loss
    copied = clone(vit.eval())  # type: ignore[operator]
    remove_pruning(vit)
    assert_close(copied(x), before)


def test_pruning_anew_replaces_and_removing_restores() -> None:
    vit, x = model(), images()
    before = vit(x)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vit.modules())
    prune_tokens(vit, 0.5, (0, 1, 2), rest="merge")
    prune_tokens(vit, 0.7, (1,))
    assert vit.forward_features(x).shape[1] == 1 + 12
    assert remove_pruning(vit) is vit and not hasattr(vit, "prune_config")
    assert torch.equal(vit(x), before)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vit.modules()) == hooks


def test_removing_the_masks_removes_the_pruning() -> None:
    vit = remove_lam(prune_tokens(add_lam(host()), 0.5, (0,)))
    assert torch.equal(vit(images()), host()(images()))
    assert not hasattr(vit, "prune_config")


def test_the_defaults_are_three_stages_of_seven_tenths() -> None:
    vit = prune_tokens(model(depth=12))
    assert (vit.prune_config.keep, vit.prune_config.at) == (0.7, (3, 6, 9))
    assert vit.forward_features(images()).shape[1] == 1 + 7  # 16, 12, 9, 7
    assert prune_tokens(model(depth=4)).prune_config.at == (1, 2)


@pytest.mark.parametrize("kwargs", [{"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}])
def test_class_and_register_tokens_stay(kwargs: dict) -> None:
    vit = model(**kwargs)
    prefix = vit.num_prefix_tokens
    prune_tokens(vit, 0.01, (0, 1))
    tokens: list[Tensor] = []
    vit.blocks[0].register_forward_hook(lambda block, args, output: tokens.append(output))
    vit(images())
    unpruned = vit.blocks[0](vit._pos_embed(vit.patch_embed(images())))
    assert tokens[0].shape[1] == prefix + 1
    assert_close(tokens[0][:, :prefix], unpruned[:, :prefix])


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_a_target_is_met_as_closely_as_whole_tokens_allow(share: float) -> None:
    vit = model(embed_dim=64)
    target = lamzoo.profile(vit).gmacs * share
    prune_tokens(vit, at=(0, 1, 2), target_gmacs=target)
    assert lamzoo.profile(vit).gmacs <= target
    more = vit.prune_config.keep + 1 / 16
    assert lamzoo.profile(prune_tokens(vit, min(1.0, more), (0, 1, 2))).gmacs > target


def test_a_target_is_met_by_the_counter_that_is_given() -> None:
    tokens = {}

    def count(vit: nn.Module) -> float:
        tokens[vit.prune_config.keep] = vit.forward_features(images(1)).shape[1]
        return float(tokens[vit.prune_config.keep])

    vit = prune_tokens(model(), at=(0,), target_gmacs=9, count_gmacs=count)
    assert vit.prune_config.keep == 0.5  # 8 of 16, and the class token
    assert tokens[0.5] == 9 and tokens[0.501] == 10


def test_a_share_out_of_reach_leaves_the_model_as_it_was() -> None:
    vit = lamzoo.merge_tokens(model(), keep=0.5)
    before = vit(images())
    with pytest.raises(ConfigError, match=r"can't be merged to 0.01 %"):
        merge_to_share(vit, 1e-4)
    assert torch.equal(vit(images()), before)


def test_a_target_above_the_whole_keeps_everything() -> None:
    vit = model()
    assert prune_tokens(vit, target_gmacs=lamzoo.profile(vit).gmacs * 1.1).prune_config.keep == 1.0


def test_a_target_out_of_reach_raises_and_leaves_the_model_as_it_was() -> None:
    vit = prune_tokens(model(), 0.5, (0,))
    before = vit(images())
    with pytest.raises(ConfigError, match=r"target_gmacs=1e-06: with as few tokens as possible at layers \(2,\)"):
        prune_tokens(vit, at=(2,), target_gmacs=1e-6)
    assert torch.equal(vit(images()), before)
    with pytest.raises(ConfigError, match="keep=0.5 beside target_gmacs=1.0: give one of them"):
        prune_tokens(vit, 0.5, target_gmacs=1.0)


def test_the_last_layer_and_layers_beyond_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"at=\(1, 3\): pruning after layer 3, the last of blocks.* from 0 to 2"):
        prune_tokens(model(), 0.5, (1, 3))


def test_models_that_cannot_be_pruned_are_named() -> None:
    with pytest.raises(UnsupportedHostError, match="no learnable masks"):
        prune_tokens(host())
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 16), 2)
    with pytest.raises(UnsupportedHostError, match="timm .* the masks are in layers of torch.*TransformerEncoder"):
        prune_tokens(add_lam(layers))


TOWERS = {
    "class token": {},
    "mean": {"pool_type": "avg"},
    "norm behind the mean": {"pool_type": "avg", "final_ln_after_pool": True},
    "custom blocks": {"block_type": "custom", "qk_norm": True},
}


def tower(**kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    visual = open_clip.transformer.VisionTransformer(
        image_size=32, patch_size=8, width=16, layers=4, heads=2, mlp_ratio=2.0, output_dim=8, **kwargs
    )
    return add_lam(visual.eval(), POSITION)


@pytest.mark.parametrize("kind", TOWERS)
@each_rest
def test_open_clips_towers_are_pruned_in_evaluation_and_training(kind: str, rest: str) -> None:
    visual = prune_tokens(tower(**TOWERS[kind]), 0.5, (0, 2), rest=rest)
    with capture_masks(visual) as masks:
        together = visual(images())
    lengths = [record.attention.shape[-1] for record in masks.values()]
    assert lengths == ([17, 10, 10, 7] if rest == "merge" else [17, 9, 9, 5])
    assert_close(torch.cat([visual(sample) for sample in images().split(1)]), together)
    if rest == "drop":
        assert_close(torch.cat([visual.train()(sample) for sample in images().split(1)]), together)
        assert pruning_loss(visual).requires_grad


@pytest.mark.parametrize("remove", [remove_pruning, remove_lam])
@pytest.mark.parametrize("create", [model, tower])
def test_grids_of_pruned_tokens_are_refused(create: Any, remove: Any) -> None:
    vit: Any = copy.deepcopy(prune_tokens(create(), 0.5, (0,)))
    with pytest.raises(UnsupportedHostError, match="can't be made of pruned tokens; ask for output_fmt='NLC'"):
        vit.forward_intermediates(images())
    found = vit.forward_intermediates(images(), output_fmt="NLC", intermediates_only=True)
    patches = found["image_intermediates"] if create is tower else found
    assert [each.shape[1] for each in patches] == [8, 8, 8, 8]
    remove(vit)
    assert "forward_intermediates" not in vars(vit)
    vit.forward_intermediates(images())


def test_a_clip_model_is_pruned_in_its_image_tower() -> None:
    clip4clip = lamzoo.create_model("lam_clip4clip_micro", lam_in=("head", "vision", "text")).eval()
    frames, text = clip4clip.example_inputs(2)
    plain = lamzoo.profile(clip4clip).gmacs
    words = clip4clip.encode_text(text)
    prune_tokens(clip4clip, 0.5, (0,))
    assert lamzoo.profile(clip4clip).gmacs < plain
    assert torch.equal(clip4clip.encode_text(text), words)
    assert clip4clip(frames, text).isfinite().all()


def test_two_image_towers_are_not_guessed_between() -> None:
    with pytest.raises(UnsupportedHostError, match=r"0\.blocks of timm\..*VisionTransformer, 1\.blocks of timm"):
        prune_tokens(nn.Sequential(model(), model()))
