"""Published token-reduction methods against the properties that their papers state."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, get_args

import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn
from torch.testing import assert_close

import lamzoo
from benchmarks.peers import Peer, Placement, Pooling, Reduction, Rows, Seen, applied, mean_gmacs
from benchmarks.peers.atm import ATM
from benchmarks.peers.diffrate import DiffRate
from benchmarks.peers.pitome import PiToMe
from benchmarks.peers.selection import EViT, Random, Stride
from benchmarks.peers.tome import ToMe
from lamzoo import LamConfig, add_lam, capture_masks
from lamzoo.errors import ConfigError, UnsupportedHostError
from lamzoo.lam.masks import FactoredMask, PositionTable
from lamzoo.lam.token_map import TokenMap

PEERS: dict[str, Callable[[], Peer]] = {
    "tome": lambda: ToMe(3),
    "pitome": lambda: PiToMe(0.8),
    "diffrate": lambda: DiffRate((1, 0, 2, 0), (2, 1, 0, 1)),
    "atm": lambda: ATM(0.3),
    "evit": lambda: EViT(0.5, (0, 2)),
    "random": lambda: Random(0.5, (0, 2)),
    "stride": lambda: Stride(0.5, (0, 2)),
}
each_peer = pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS)


def model(**kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 5, **kwargs}
    return timm.models.VisionTransformer(**options).eval()


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@contextmanager
def counted(vit: nn.Module) -> Iterator[list[int]]:
    """Notes how many tokens come into each block."""
    counts: list[int] = []
    handles = [block.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1])) for block in vit.blocks]
    yield counts
    for handle in handles:
        handle.remove()


def recorded(vit: nn.Module, peer: Peer, x: Tensor | None = None) -> list[Reduction]:
    """Runs a model and returns the reductions of its layers."""
    reductions: list[Reduction] = []

    class Recorder(type(peer)):  # type: ignore[misc]
        def __call__(self, seen: Seen) -> Reduction | None:
            reduction: Reduction | None = super().__call__(seen)
            reductions.extend([] if reduction is None else [reduction])
            return reduction

    with applied(vit, Recorder(**vars(peer))), torch.no_grad():
        vit(images() if x is None else x)
    return reductions


def seen(key: Tensor, **changes: Any) -> Seen:
    """Returns what a peer receives of a layer with these keys."""
    options = {"index": 0, "depth": 4, "num_prefix_tokens": 0, "has_class_token": False, **changes}
    return Seen(query=torch.randn_like(key), key=key, scale=key.shape[-1] ** -0.5, **options)


def test_tome_without_merging_is_exact() -> None:
    vit, x = model(), images()
    with applied(vit, ToMe(0)):
        merged = vit(x)
    assert torch.equal(merged, vit(x))


def test_tome_leaves_the_published_number_of_tokens() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", embed_dim=12, num_heads=1, num_classes=0).eval()
    with applied(vit, ToMe(13)), counted(vit) as counts, torch.inference_mode():
        vit(torch.randn(1, 3, 224, 224))
    assert counts == [197 - 13 * layer for layer in range(12)]  # r tokens a layer


def test_tome_never_merges_more_than_half_nor_the_class_token() -> None:
    vit = model()
    with applied(vit, ToMe(100)), counted(vit) as counts:
        vit(images())
    assert counts == [17, 9, 5, 3]


def test_tome_merges_equal_tokens_without_a_trace() -> None:
    # A constant image without position embeddings has one patch 16 times; attention weighed by the sizes can't tell.
    vit = model(pos_embed="none")
    x = torch.randn(2, 3, 1, 1).expand(-1, -1, 32, 32)
    with applied(vit, ToMe(5)):
        merged = vit(x)
    assert_close(merged, vit(x))


def test_tome_merges_pairs_of_alternating_patches_into_their_mean() -> None:
    reductions = recorded(model(), ToMe(6))
    tokens, sizes = torch.randn(3, 17, 4), torch.ones(3, 17)
    for reduction in reductions:
        assert reduction.sizes is not None
        few, new_sizes = reduction.token_map(tokens), reduction.sizes
        sums = (tokens * sizes.unsqueeze(-1)).sum(1)
        assert_close((few * new_sizes.unsqueeze(-1)).sum(1), sums)  # nothing is lost
        assert_close(new_sizes.sum(1), torch.full((3,), 17.0))
        assert_close(few[:, 0], tokens[:, 0])  # nothing merges into the class token
        assert (new_sizes > 0.999).all()
        tokens, sizes = few, new_sizes
    first = reductions[0].token_map
    assert first.into is not None
    assert first.kept.shape == (3, 11)
    for sample in range(3):
        gone = sorted(set(range(17)) - set(first.kept[sample].tolist()))
        assert all(token % 2 == 1 for token in gone)  # of the first set: patches 0, 2, 4, ...
        partners = [first.kept[sample, first.into[sample, token]].item() for token in gone]
        assert all(partner % 2 == 0 and partner > 0 for partner in partners)


def test_tome_merges_the_pairs_with_the_most_similar_keys() -> None:
    layer = seen(torch.randn(2, 3, 9, 8), num_prefix_tokens=1)
    reduction = ToMe(2)(layer)
    assert reduction is not None
    keys = layer.key.mean(1)
    for sample in range(2):
        similarity = torch.cosine_similarity(keys[sample, 1::2, None], keys[sample, None, 2::2], dim=-1)
        best = similarity.max(1).values.topk(2).indices
        gone = set(range(9)) - set(reduction.token_map.kept[sample].tolist())
        assert gone == {1 + 2 * i for i in best.tolist()}


@pytest.mark.parametrize(("r", "extra", "counts"), [(2, 0, [2, 2, 2, 2]), (2, 3, [3, 3, 3, 2])])
def test_tome_fills_a_budget_with_one_more_merge_in_the_first_layers(r: int, extra: int, counts: list[int]) -> None:
    vit = model()
    lengths = [reduction.token_map.kept.shape[1] for reduction in recorded(vit, ToMe(r, extra))]
    assert lengths == [17 - sum(counts[: layer + 1]) for layer in range(4)]


def test_pitome_energy_is_bounded_and_that_of_the_paper() -> None:
    layer = seen(torch.randn(2, 3, 9, 8), num_prefix_tokens=1, index=1)
    peer = PiToMe(0.5, alpha=0.7)
    energy = peer.energy(layer)
    margin = 0.9 - 0.9 * 1 / 4
    keys = layer.key.mean(1)[:, 1:]
    for sample, token in product(range(2), range(8)):
        cosines = torch.cosine_similarity(keys[sample, token], keys[sample], dim=-1)
        others = [c for i, c in enumerate(cosines.tolist()) if i != token]
        of_pairs = [c if c >= margin else 0.7 * (math.exp(c - margin) - 1) for c in others]
        assert energy[sample, token].item() == pytest.approx(sum(of_pairs) / 8, abs=1e-5)
    assert (energy > -0.7).all() and (energy < 1).all()


def test_pitome_protects_tokens_that_stand_alone() -> None:
    # Six tokens of one object and two without a neighbour: four of the six may merge, the two never do.
    key = torch.zeros(1, 1, 8, 3)
    key[..., :6, 0], key[..., 6, 1], key[..., 7, 2] = 1.0, 1.0, 1.0
    reduction = PiToMe(0.75)(seen(key + 0.01 * torch.randn_like(key)))
    assert reduction is not None and reduction.sizes is not None
    assert reduction.token_map.kept.shape == (1, 6)  # k = N - N r
    assert {6, 7} <= set(reduction.token_map.kept[0].tolist())
    assert reduction.sizes[0, -2:].tolist() == [1.0, 1.0]


def test_pitome_pairs_neighbours_in_the_order_of_energy() -> None:
    layer = seen(torch.randn(1, 2, 10, 4))
    peer = PiToMe(0.7)
    reduction = peer(layer)
    assert reduction is not None and reduction.token_map.into is not None
    order = peer.energy(layer)[0].argsort(descending=True).tolist()
    gone = set(range(10)) - set(reduction.token_map.kept[0].tolist())
    assert gone == set(order[0:6:2])
    partners = {reduction.token_map.kept[0, reduction.token_map.into[0, token]].item() for token in gone}
    assert partners <= set(order[1:6:2])


def test_pitome_keeps_the_same_share_in_each_layer() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", embed_dim=12, num_heads=1, num_classes=0).eval()
    counts = [r.token_map.kept.shape[1] - 1 for r in recorded(vit, PiToMe(0.9), torch.randn(1, 3, 224, 224))]
    assert counts[:3] == [196 - 20, 176 - 18, 158 - 16]


def test_atm_thresholds_fall_with_the_depth_down_to_a_bound() -> None:
    thresholds = [ATM(0.9, beta=0.1, least=0.5).threshold(index) for index in range(12)]
    assert thresholds[:2] == pytest.approx([0.9, 0.9 - (math.exp(0.1) - 1)])
    assert thresholds == sorted(thresholds, reverse=True)
    assert min(thresholds) == 0.5


def test_atm_merges_exactly_the_pairs_above_the_threshold() -> None:
    key = torch.randn(1, 2, 12, 4)
    layer = seen(key)
    above = (ATM(0.2).matching(layer).similarity > 0.2).sum().item()
    reduction = ATM(0.2)(layer)
    assert reduction is not None
    assert 0 < above < 6
    assert reduction.token_map.kept.shape[1] == 12 - above
    assert ATM(1.0)(layer) is None  # nothing is that similar


def test_atm_merges_as_many_pairs_in_every_sample_of_a_batch() -> None:
    layer = seen(torch.randn(6, 2, 12, 4))
    above = (ATM(0.2).matching(layer).similarity > 0.2).sum(dim=1).float()
    reduction = ATM(0.2)(layer)
    assert reduction is not None
    assert above.unique().numel() > 1
    assert reduction.token_map.kept.shape == (6, 12 - round(above.mean().item()))


def test_atm_matches_small_tokens_to_large_ones_in_the_last_layers() -> None:
    sizes = torch.tensor([[1.0, 3.0, 1.0, 9.0, 2.0, 1.0, 5.0, 4.0]])
    matching = ATM(0.0, split=0.5).matching(seen(torch.randn(1, 2, 8, 4), index=2, sizes=sizes))
    assert sizes[0, matching.sources[0]].tolist() == [1, 1, 1, 2]
    assert (sizes[0, matching.partners[0]] >= 3).all()


def test_diffrate_prunes_the_least_important_tokens_and_merges_the_next() -> None:
    layer = seen(torch.randn(2, 2, 11, 4), num_prefix_tokens=1, has_class_token=True)
    reduction = DiffRate((2, 0, 0, 0), (3, 0, 0, 0))(layer)
    assert reduction is not None and reduction.token_map.into is not None and reduction.sizes is not None
    keys = torch.nn.functional.normalize(layer.key.mean(1), dim=-1)
    for sample in range(2):
        order = (layer.importance()[sample, 1:].argsort() + 1).tolist()
        assert reduction.token_map.kept[sample].tolist() == sorted([0, *order[5:]])
        for source in order[2:5]:
            best = max(order[5:], key=lambda token: (keys[sample, source] @ keys[sample, token]).item())
            assert reduction.token_map.kept[sample, reduction.token_map.into[sample, source]] == best
    assert reduction.sizes.sum(1).tolist() == [9.0, 9.0]  # pruned tokens count no more
    tokens = torch.randn(2, 11, 3)
    dropped = torch.stack([layer.importance()[sample, 1:].argsort()[:2] + 1 for sample in range(2)])
    changed = tokens.scatter(1, dropped.unsqueeze(-1).expand(-1, -1, 3), 100.0)
    assert_close(reduction.token_map(changed), reduction.token_map(tokens))


def test_diffrate_search_stays_within_the_budget_and_improves() -> None:
    vit, x = model(), images()
    budget = 0.7 * lamzoo.profile(vit).gmacs
    start, found = (DiffRate.searched(vit, x, budget, steps=steps) for steps in (0, 3))

    def divergence(peer: DiffRate) -> float:
        with applied(vit, peer), torch.no_grad():
            few = vit(x).log_softmax(-1)
        return torch.nn.functional.kl_div(few, vit(x).log_softmax(-1), log_target=True, reduction="batchmean").item()

    assert start.prune == (0, 0, 0, 0)
    assert mean_gmacs(vit, found, x) <= budget
    assert divergence(found) <= divergence(start)
    with pytest.raises(ConfigError, match="raise the budget"):
        DiffRate.searched(vit, x, 0.01 * budget, steps=0)


def test_class_attention_includes_the_mask_and_the_sizes() -> None:
    key = torch.randn(1, 1, 3, 2)
    bias, sizes = torch.randn(1, 1, 3, 1), torch.tensor([[1.0, 2.0, 3.0]])
    mask = FactoredMask(torch.ones(1, 1, 3, 1), bias)
    layer = seen(key, num_prefix_tokens=1, has_class_token=True, mask=mask, sizes=sizes)
    scores = layer.query[0, 0, 0] @ key[0, 0].T * layer.scale + bias.flatten() + sizes[0].log()
    assert_close(layer.importance()[0], scores.softmax(-1))


def test_evit_keeping_all_is_exact() -> None:
    vit, x = model(), images()
    with applied(vit, EViT(1.0, (0, 1, 2))):
        kept = vit(x)
    assert torch.equal(kept, vit(x))


def test_evit_leaves_the_published_number_of_tokens() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", embed_dim=12, num_heads=1, num_classes=0).eval()
    with applied(vit, EViT(0.7, (3, 6, 9))), counted(vit) as counts, torch.inference_mode():
        vit(torch.randn(1, 3, 224, 224))
    # ceil(0.7 * 196) = 138 with class token and fused one; the fused one then counts among those to choose from.
    assert counts == [197] * 4 + [140] * 3 + [100] * 3 + [72] * 2


def test_evit_keeps_what_the_class_token_attends_to() -> None:
    vit, x = model(), images()
    inputs: list[Tensor] = []
    handle = vit.blocks[0].attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with applied(vit, EViT(0.5, (0,))), counted(vit):
        vit(x)
    handle.remove()
    attn = vit.blocks[0].attn
    query, key, _ = attn.qkv(inputs[0]).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
    weights = ((query @ key.mT) * attn.scale).softmax(-1)[:, :, 0, 1:].mean(1)
    chosen = recorded(vit, EViT(0.5, (0,)), x)[0].token_map.kept
    assert torch.equal(chosen[:, 1:9], weights.topk(8).indices.sort().values + 1)


def test_random_draws_for_each_sample_and_again_the_same_from_its_seed() -> None:
    vit, x = model(), images(1).expand(4, -1, -1, -1)
    outputs = []
    for _ in range(2):
        with applied(vit, Random(0.3, (0,))):
            outputs.append(vit(x))
    assert torch.equal(*outputs)
    assert not torch.allclose(outputs[0][0], outputs[0][1])


def test_stride_spreads_evenly() -> None:
    assert recorded(model(), Stride(0.25, (0,)))[0].token_map.kept.tolist() == [[0, 1, 5, 9, 13]] * 3


MASKS = [
    LamConfig(layers=layers, keys=keys, op=op, rank=3, init="paper")  # type: ignore[arg-type]
    for layers, keys, op in product(["multi", "single"], ["content", "position"], ["add", "mul"])
]
each_mask = pytest.mark.parametrize("mask", MASKS, ids=lambda mask: f"{mask.layers}-{mask.keys}-{mask.op}")


@pytest.mark.parametrize(
    ("peer", "mask"),
    [(PEERS["tome"], mask) for mask in MASKS] + [(peer, MASKS[-2]) for name, peer in PEERS.items() if name != "tome"],
)
def test_masks_follow_their_tokens(peer: Callable[[], Peer], mask: LamConfig) -> None:
    vit = add_lam(model(), mask)
    x = images()
    before = vit(x)
    with applied(vit, peer()), counted(vit) as counts, capture_masks(vit) as masks:
        vit(x)
    assert [record.mask.right.shape[2] for record in masks.values()] == counts
    assert counts[-1] < counts[0]
    assert torch.equal(vit(x), before)


@each_mask
def test_merging_equal_tokens_of_masked_models_leaves_no_trace(mask: LamConfig) -> None:
    # Equal rows of the mask, too, so that a merged token is seen as its parts were.
    vit = add_lam(model(pos_embed="none"), mask)
    for table in (module for module in vit.modules() if isinstance(module, PositionTable)):
        table.weight.data[:, 1:], table.bias.data[:, 1:] = table.weight.data[:, 1:2], table.bias.data[:, 1:2]
    x = torch.randn(2, 3, 1, 1).expand(-1, -1, 32, 32)
    for rows in get_args(Rows):
        with applied(vit, ToMe(5, rows=rows)):
            merged = vit(x)
        assert_close(merged, vit(x))


@pytest.mark.parametrize("layers", ["multi", "single"])
def test_mask_rows_of_merged_tokens_are_averaged_or_those_of_the_destination(layers: str) -> None:
    vit = add_lam(model(), LamConfig(layers=layers, keys="position", init="paper"))  # type: ignore[arg-type]
    with capture_masks(vit) as masks:
        vit(images())
    table = masks["blocks.1.attn"].mask.right
    for rows in get_args(Rows):
        token_map = recorded(vit, ToMe(3, rows=rows))[0].token_map
        with applied(vit, ToMe(3, rows=rows)), capture_masks(vit) as masks:
            vit(images())
        wanted = token_map if rows == "averaged" else TokenMap(17, token_map.kept)
        assert_close(masks["blocks.1.attn"].mask.right, wanted.factor(table))


def test_layer_scale_acts_on_reduced_tokens() -> None:
    vit = model(init_values=1e-6)
    with applied(vit, ToMe(3, pooling="plain")):
        assert_close(
            vit(images()), vit.forward_head(vit.norm(vit._pos_embed(vit.patch_embed(images())))), atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("placement", get_args(Placement))
def test_reducing_between_attention_and_mlp_saves_the_mlp_of_the_same_layer(placement: Placement) -> None:
    vit, lengths = model(), []
    handles = [
        block.mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1])) for block in vit.blocks
    ]
    with applied(vit, ToMe(3, placement=placement)), counted(vit) as counts:
        vit(images())
    for handle in handles:
        handle.remove()
    assert counts == [17, 14, 11, 8]
    assert lengths == ([14, 11, 8, 5] if placement == "between" else counts)


@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_mean_pooling_is_weighted_by_sizes_or_plain(pooling: Pooling) -> None:
    vit = model(class_token=False, global_pool="avg", fc_norm=False)
    peer = ToMe(3, pooling=pooling)
    sizes = recorded(vit, peer)[-1].sizes
    assert sizes is not None
    with applied(vit, peer):
        tokens = vit.forward_features(images())
        pooled = vit.pool(tokens)
    weights = sizes / 16 if pooling == "weighted" else torch.full_like(sizes, 1 / sizes.shape[1])
    assert_close(pooled, (tokens * weights.unsqueeze(-1)).sum(1))


@pytest.mark.parametrize("layers", ["multi", "single"])
def test_models_train_with_merged_tokens(layers: str) -> None:
    vit = add_lam(model(), LamConfig(layers=layers, keys="position", init="paper")).train()  # type: ignore[arg-type]
    with applied(vit, ToMe(3)):
        vit(images()).square().sum().backward()
    gradients = [parameter.grad for parameter in vit.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@each_peer
def test_settings_are_ordered_by_cost(peer: Callable[[], Peer]) -> None:
    vit, x = model(), images(1)
    settings = type(peer()).settings(vit)
    costs = []
    for setting in settings[:: max(1, len(settings) // 8)]:
        with applied(vit, setting):
            costs.append(lamzoo.profile(vit, x).gmacs)
    with applied(vit, settings[-1]):
        assert torch.equal(vit(images()), model()(images()))
    assert costs == sorted(costs)
    assert costs[0] < lamzoo.profile(vit, x).gmacs


def test_models_that_are_not_made_of_timm_blocks_are_refused() -> None:
    with pytest.raises(UnsupportedHostError, match="Linear"), applied(nn.Linear(2, 2), ToMe(1)):
        pass
    with (
        pytest.raises(UnsupportedHostError, match="ParallelScalingBlock"),
        applied(model(block_fn=ParallelScalingBlock), ToMe(1)),
    ):
        pass
    merged = lamzoo.merge_tokens(model(), keep=0.5)
    with pytest.raises(ConfigError, match="remove_reduction"), applied(merged, ToMe(1)):
        pass


@pytest.mark.parametrize("name", [name for name in PEERS if name not in ("random", "atm")])  # which depend on the batch
def test_a_sample_is_reduced_as_if_it_were_alone(name: str) -> None:
    vit, x = model(), images()
    with applied(vit, PEERS[name]()):
        assert_close(torch.cat([vit(sample) for sample in x.split(1)]), vit(x))
