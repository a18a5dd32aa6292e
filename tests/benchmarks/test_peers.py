"""Published token-reduction methods against the properties that their papers state."""

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
from benchmarks.peers import Peer, Placement, Pooling, Reduction, Rows, Seen, applied
from benchmarks.peers.selection import EViT, Random, Stride
from benchmarks.peers.tome import ToMe
from lamzoo import LamConfig, add_lam, capture_masks
from lamzoo.errors import UnsupportedHostError
from lamzoo.lam.masks import PositionTable
from lamzoo.lam.token_map import TokenMap

PEERS: dict[str, Callable[[], Peer]] = {
    "tome": lambda: ToMe(3),
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


@each_peer
@each_mask
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


@each_peer
def test_settings_are_ordered_by_cost(peer: Callable[[], Peer]) -> None:
    vit = model()
    settings = type(peer()).settings(vit)
    costs = []
    for setting in settings[:: max(1, len(settings) // 8)]:
        with applied(vit, setting):
            costs.append(lamzoo.profile(vit).gmacs)
    with applied(vit, settings[-1]):
        assert torch.equal(vit(images()), model()(images()))
    assert costs == sorted(costs)
    assert costs[0] < lamzoo.profile(vit).gmacs


def test_models_that_are_not_made_of_timm_blocks_are_refused() -> None:
    with pytest.raises(UnsupportedHostError, match="Linear"), applied(nn.Linear(2, 2), ToMe(1)):
        pass
    with (
        pytest.raises(UnsupportedHostError, match="ParallelScalingBlock"),
        applied(model(block_fn=ParallelScalingBlock), ToMe(1)),
    ):
        pass


@pytest.mark.parametrize("name", [name for name in PEERS if name != "random"])  # which draws anew for each batch
def test_a_sample_is_reduced_as_if_it_were_alone(name: str) -> None:
    vit, x = model(), images()
    with applied(vit, PEERS[name]()):
        assert_close(torch.cat([vit(sample) for sample in x.split(1)]), vit(x))
