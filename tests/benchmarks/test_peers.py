"""Other people's token reductions against what their papers say of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from benchmarks.peers import Peer, applied
from benchmarks.peers.selection import EViT, Random, Stride
from benchmarks.peers.tome import ToMe
from lamzoo import LamConfig, add_lam, capture_masks
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


def test_tome_merges_the_most_similar_pairs_into_their_mean() -> None:
    merges: list[tuple[TokenMap, Tensor]] = []

    class Noting(ToMe):
        def __call__(self, seen: object) -> tuple[TokenMap, Tensor] | None:
            answer = super().__call__(seen)  # type: ignore[arg-type]
            merges.extend([] if answer is None else [answer])
            return answer

    vit = model()
    with applied(vit, Noting(6)):
        vit(images())
    tokens, sizes = torch.randn(3, 17, 4), torch.ones(3, 17)
    for merge, bias in merges:
        few, new_sizes = merge(tokens), bias.exp()
        sums = (tokens * sizes.unsqueeze(-1)).sum(1)
        assert_close((few * new_sizes.unsqueeze(-1)).sum(1), sums)  # nothing is lost
        assert_close(new_sizes.sum(1), torch.full((3,), 17.0))
        assert_close(few[:, 0], tokens[:, 0])  # the class token is nobody's partner
        assert (new_sizes > 0.999).all()
        tokens, sizes = few, new_sizes
    first = merges[0][0]
    assert first.into is not None
    assert first.kept.shape == (3, 11)
    for sample in range(3):
        gone = sorted(set(range(17)) - set(first.kept[sample].tolist()))
        assert all(token % 2 == 1 for token in gone)  # of the first set: patches 0, 2, 4, ...
        partners = [first.kept[sample, first.into[sample, token]].item() for token in gone]
        assert all(partner % 2 == 0 and partner > 0 for partner in partners)


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
    chosen: list[Tensor] = []

    class Noting(EViT):
        def __call__(self, seen: object) -> object:  # type: ignore[override]
            answer = super().__call__(seen)  # type: ignore[arg-type]
            chosen.extend([] if answer is None else [answer[0].kept])
            return answer

    with applied(vit, Noting(0.5, (0,))):
        vit(x)
    assert torch.equal(chosen[0][:, 1:9], weights.topk(8).indices.sort().values + 1)


def test_random_draws_for_each_sample_and_again_the_same_from_its_seed() -> None:
    vit, x = model(), images(1).expand(4, -1, -1, -1)
    outputs = []
    for _ in range(2):
        with applied(vit, Random(0.3, (0,))):
            outputs.append(vit(x))
    assert torch.equal(*outputs)
    assert not torch.allclose(outputs[0][0], outputs[0][1])


def test_stride_spreads_evenly() -> None:
    vit = model()
    tokens: list[Tensor] = []
    first = vit.blocks[0].register_forward_hook(lambda block, args, output: tokens.append(output))
    with applied(vit, Stride(0.25, (0,))), counted(vit):
        second = vit.blocks[1].register_forward_pre_hook(lambda block, args: tokens.append(args[0]))
        vit(images())
    first.remove()
    second.remove()
    assert_close(tokens[1], tokens[0][:, [0, 1, 5, 9, 13]])


@each_peer
@pytest.mark.parametrize("layers", ["multi", "single"])
@pytest.mark.parametrize("keys", ["content", "position"])
def test_masks_follow_their_tokens(peer: Callable[[], Peer], layers: str, keys: str) -> None:
    vit = add_lam(model(), LamConfig(layers=layers, keys=keys, rank=3, init="paper"))  # type: ignore[arg-type]
    x = images()
    before = vit(x)
    with applied(vit, peer()), counted(vit) as counts, capture_masks(vit) as masks:
        vit(x)
    assert [record.mask.right.shape[2] for record in masks.values()] == counts
    assert counts[-1] < counts[0]
    assert torch.equal(vit(x), before)


@pytest.mark.parametrize("name", [name for name in PEERS if name != "random"])  # which draws anew for each batch
def test_a_sample_is_reduced_as_if_it_were_alone(name: str) -> None:
    vit, x = model(), images()
    with applied(vit, PEERS[name]()):
        assert_close(torch.cat([vit(sample) for sample in x.split(1)]), vit(x))
