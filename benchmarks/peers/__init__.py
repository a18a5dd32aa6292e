"""Published training-free token-reduction methods behind one interface, as baselines.

Each method is implemented from its paper, in a file of its own, and reduces tokens where its paper does: between
attention and MLP, or after a block. They run on timm ``VisionTransformer`` models, plain or with masks, and these train
with them: gradients pass through the values of tokens, and not through the choice of tokens and their weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Self, Unpack

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import lamzoo
from lamzoo.errors import ConfigError, UnsupportedHostError, class_name
from lamzoo.lam import FactoredMask, Lam, SharedState
from lamzoo.lam.config import Sign
from lamzoo.lam.layer import AttentionOptions
from lamzoo.lam.ops import OPS, Op
from lamzoo.lam.passes import StackPass
from lamzoo.lam.token_map import TokenMap, take
from lamzoo.reduction.matching import full_precision
from lamzoo.reduction.merging import AttendBySizes

__all__ = ["Peer", "Reduction", "Seen", "applied", "mean_gmacs"]

Placement = Literal["between", "after"]
Rows = Literal["averaged", "destination"]
Pooling = Literal["weighted", "plain"]


@dataclass(frozen=True)
class Seen:
    """The information about a layer that a peer receives after the layer's attention.

    Attributes:
        index: index of the layer, from 0.
        depth: number of layers.
        query: queries ``(B, H, N, d)``.
        key: keys ``(B, H, N, d)``.
        scale: scale of the attention scores.
        num_prefix_tokens: number of class and register tokens, which come first.
        has_class_token: whether the first of them is a class token.
        sizes: number of patches in each token, float ``(B, N)``; None before any merge.
        mask: the layer's learnable mask, if any.
        op: how the mask acts.
    """

    index: int
    depth: int
    query: Tensor
    key: Tensor
    scale: float
    num_prefix_tokens: int
    has_class_token: bool
    sizes: Tensor | None = None
    mask: FactoredMask | None = None
    op: Op = "add"

    @property
    def features(self) -> Tensor:
        """Keys averaged over heads and normalised, ``(B, N, d)``, float32; their products are cosine similarities."""
        return F.normalize(self.key.float().mean(dim=1), dim=-1)

    def known_sizes(self) -> Tensor:
        """Returns the sizes; all 1 before any merge."""
        if self.sizes is not None:
            return self.sizes
        return torch.ones(self.key.shape[0], self.key.shape[2], device=self.key.device)

    def importance(self) -> Tensor:
        """Computes the class token's attention to each token, averaged over heads, ``(B, N)``.

        Without a class token, averages over all queries.
        """
        rows = slice(1) if self.has_class_token else slice(None)
        scores = (self.query[:, :, rows] * self.scale) @ self.key.mT
        if self.mask is not None:
            scores = OPS[self.op].apply(scores, self.mask.left[:, :, rows] @ self.mask.right.mT)
        if self.sizes is not None:
            scores = scores + self.sizes.log()[:, None, None, :]
        return scores.softmax(dim=-1).mean(dim=(1, 2))


@dataclass(frozen=True)
class Reduction:
    """The reduction of a layer's tokens.

    Attributes:
        token_map: from the layer's tokens to the remaining ones.
        sizes: number of patches in each remaining token, float ``(B, K)``, by which later attention is proportional
            (``log(sizes)`` is added to the scores of the keys); None for attention as it was trained.
    """

    token_map: TokenMap
    sizes: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Peer(ABC):
    """A token-reduction method with its settings.

    Attributes:
        placement: where a layer's tokens are reduced: ``"between"`` its attention and its MLP, or ``"after"`` its
            block, where the last layer reduces nothing.
        rows: rows of a position-keyed mask for merged tokens: ``"averaged"`` by sizes, or those of the token that they
            are merged into, the ``"destination"``. The same for the factors of a mask that layers share.
        pooling: mean over the patches of the output, ``"weighted"`` by sizes or ``"plain"``.
        is_adaptive: whether the number of tokens depends on the images; GMACs then have to be counted on images, with
            :func:`mean_gmacs`.
    """

    placement: Placement = "between"
    rows: Rows = "averaged"
    pooling: Pooling = "weighted"
    is_adaptive: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, seen: Seen) -> Reduction | None:
        """Returns the reduction of a layer's tokens; None if all tokens are kept."""

    @classmethod
    @abstractmethod
    def settings(cls, model: Any, **options: Any) -> Sequence[Self]:
        """Returns the method with all its settings, in order of increasing GMACs, up to no reduction.

        Args:
            model: timm ``VisionTransformer``.
            **options: further arguments of the constructor, the same for all.
        """


@dataclass(frozen=True)
class Matching:
    """For each token of one set the most similar one of another.

    Attributes:
        sources: tokens of the first set, int64 ``(B, A)``.
        partners: of each the most similar token of the second set, int64 ``(B, A)``.
        similarity: of the two, float ``(B, A)``.
    """

    sources: Tensor
    partners: Tensor
    similarity: Tensor

    def best(self, count: int) -> tuple[Tensor, Tensor]:
        """Returns sources and partners of the most similar pairs, ``(B, count)`` each."""
        closest = self.similarity.argsort(dim=-1, descending=True, stable=True)[:, :count]
        return self.sources.gather(1, closest), self.partners.gather(1, closest)


def match(seen: Seen, first: Tensor, second: Tensor) -> Matching:
    """Matches the tokens of two disjoint sets, int64 ``(B, A)`` and ``(B, C)``, by the cosine similarity of keys."""
    features = seen.features
    with full_precision(features.device):
        similarity, partner = (take(features, first) @ take(features, second).mT).max(dim=-1)
    return Matching(first, second.gather(1, partner), similarity)


def match_alternating(seen: Seen) -> Matching:
    """Matches the patches with even places to those with odd places (ToMe, arXiv 2210.09461, section 3)."""
    patches = torch.arange(seen.num_prefix_tokens, seen.key.shape[2], device=seen.key.device)
    patches = patches.expand(seen.key.shape[0], -1)
    return match(seen, patches[:, ::2], patches[:, 1::2])


def merged(seen: Seen, sources: Tensor, partners: Tensor, dropped: Tensor | None = None) -> Reduction:
    """Merges tokens into others, as the mean weighted by sizes; the remaining ones keep their order.

    Args:
        seen: the layer.
        sources: tokens that merge, int64 ``(B, r)``.
        partners: the tokens that they merge into, int64 ``(B, r)``, none of which is a source.
        dropped: tokens that leave without merging, int64 ``(B, p)``.
    """
    sizes = seen.known_sizes()
    leaving = sources if dropped is None else torch.cat([sources, dropped], dim=1)
    gone = torch.zeros(sizes.shape, dtype=torch.int8, device=sizes.device).scatter(1, leaving, 1)
    kept = gone.argsort(dim=1, stable=True)[:, : sizes.shape[1] - leaving.shape[1]]
    places = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    into = torch.zeros(sizes.shape, dtype=torch.long, device=sizes.device).scatter(1, kept, places)
    into = into.scatter(1, sources, into.gather(1, partners))
    weights = sizes if dropped is None else sizes.scatter(1, dropped, 0.0)
    new_sizes = sizes.new_zeros(kept.shape).scatter_add(1, into, weights)
    return Reduction(TokenMap.averaging(kept, into, weights), new_sizes)


def num_patches(model: Any) -> int:
    """Returns the number of patches of a timm ``VisionTransformer`` at the image size that it was built for."""
    return int(model.patch_embed.num_patches)


def mean_gmacs(model: Any, peer: Peer, images: Tensor, batch_size: int = 100) -> float:
    """Counts the GMACs of an image, matching included, averaged over images ``(B, 3, H, W)`` in batches."""
    with applied(model, peer):
        batches = [lamzoo.profile(model, batch).gmacs for batch in images.split(batch_size)]
    return sum(batches) / len(images)


@contextmanager
def applied(model: Any, peer: Peer) -> Iterator[Any]:
    """Reduces the tokens of a timm ``VisionTransformer`` with a peer inside the context; yields the model.

    Raises:
        UnsupportedHostError: another model, or blocks other than timm's ``Block``.
        ConfigError: the model's tokens are already merged or pruned.
    """
    if not isinstance(model, VisionTransformer):
        raise UnsupportedHostError(
            f"Peers reduce the tokens of timm's VisionTransformer; give one, not a {class_name(model)}."
        )
    if hasattr(model, "token_reduction"):
        raise ConfigError("The model's tokens are merged or pruned; call lamzoo.remove_reduction(model) first.")
    blocks: Any = model.blocks
    for block in blocks:
        if type(block) is not Block:
            raise UnsupportedHostError(
                f"Peers reduce tokens between the attention and the MLP of timm's Block, and this model has a "
                f"{class_name(block)}; take one whose block_fn is Block."
            )
    run = _Run(model, peer)
    with ExitStack() as stack:
        stack.enter_context(_replaced(model, "pool", partial(run.pool, model.pool)))
        for index, block in enumerate(blocks):
            stack.enter_context(_replaced(block, "forward", partial(run.forward, index, block)))
            stack.callback(block.attn.qkv.register_forward_hook(run.note).remove)
            if hasattr(block.attn, "lam"):
                stack.enter_context(
                    _replaced(block.attn.lam, "attention_hook", partial(run.attend, block.attn.lam.config.sign))
                )
        yield model


@contextmanager
def _replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Replaces an attribute of a module."""
    own = vars(module)
    missing = object()
    before = own.get(name, missing)
    own[name] = value
    try:
        yield
    finally:
        own.pop(name) if before is missing else own.update({name: before})


class _Run:
    """What replaces the forward methods of the model's parts, and the state of a forward pass."""

    def __init__(self, model: Any, peer: Peer) -> None:
        self.model = model
        self.peer = peer
        self.shared: SharedState | None = next((m.shared for m in model.modules() if isinstance(m, Lam)), None)
        self.qkv = torch.empty(0)
        self.mask: FactoredMask | None = None
        self.op: Op = "add"
        self.sizes: Tensor | None = None

    def forward(
        self, index: int, block: Any, tokens: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """The forward pass of timm's ``Block``, with a reduction of its tokens."""
        if attn_mask is not None or is_causal:
            raise ConfigError("Peers don't support attn_mask or is_causal; call the model without them.")
        if index == 0:
            self.sizes = self.mask = None
            if self.shared is not None:  # drops the state of an earlier pass that was interrupted
                self.shared.begin(self.shared.current.grid)
        bias = None
        if self.sizes is not None and not hasattr(block.attn, "lam"):
            bias = self.sizes.log()[:, None, None, :].to(tokens.dtype)
        tokens = tokens + block.drop_path1(block.ls1(block.attn(block.norm1(tokens), attn_mask=bias)))
        if self.peer.placement == "between":
            tokens = self.reduce(index, block.attn, tokens)
        tokens = tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))
        if self.peer.placement == "after" and index < len(self.model.blocks) - 1:
            tokens = self.reduce(index, block.attn, tokens)
        return tokens

    def note(self, qkv: nn.Module, args: Any, output: Tensor) -> None:
        """Forward hook of the projection to queries, keys and values."""
        self.qkv = output

    def attend(
        self,
        sign: Sign,
        attention: Callable[..., Tensor],
        begun: StackPass,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: FactoredMask,
        *,
        op: Op,
        **options: Unpack[AttentionOptions],
    ) -> Tensor:
        """Attention hook of layers with masks of a sign: makes attention proportional to the sizes."""
        self.mask, self.op = mask, op
        sized = begun.but(sizes=self.sizes)
        return AttendBySizes(sign)(attention, sized, query, key, value, mask, op=op, **options)

    def reduce(self, index: int, attn: Any, tokens: Tensor) -> Tensor:
        """Reduces the tokens ``(B, N, C)`` of a layer, and with them the masks of the layers that follow."""
        with torch.no_grad():
            query, key, _ = self.qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            seen = Seen(
                index, len(self.model.blocks), attn.q_norm(query), attn.k_norm(key), attn.scale,
                self.model.num_prefix_tokens, self.model.has_class_token, self.sizes, self.mask, self.op,
            )  # fmt: skip
            reduction = self.peer(seen)
        if reduction is None:
            return tokens
        token_map, self.sizes = reduction.token_map, reduction.sizes
        if self.shared is not None and index < len(self.model.blocks) - 1:  # the last attention has ended the pass
            averaged = self.peer.rows == "averaged"
            self.shared.reduce(token_map if averaged else TokenMap(token_map.length, token_map.kept))
        return token_map(tokens)

    def pool(self, pool: Callable[..., Tensor], tokens: Tensor, pool_type: str | None = None) -> Tensor:
        """The model's pooling; means over patches are weighted by sizes."""
        model = self.model
        kind = model.global_pool if pool_type is None else pool_type
        is_mean = model.attn_pool is None and kind == "avg"
        if self.sizes is None or self.peer.pooling == "plain" or not is_mean:
            return pool(tokens, pool_type)
        first = 0 if model.pool_include_prefix else model.num_prefix_tokens
        weights = self.sizes[:, first:, None].to(tokens.dtype)
        return (tokens[:, first:] * weights).sum(dim=1) / weights.sum(dim=1)
