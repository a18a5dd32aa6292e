"""Which tokens matter, and how a stack goes on with those alone: tensors in and out, knows no model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lamzoo.errors import ConfigError
from lamzoo.lam.config import Op, from_fields
from lamzoo.lam.kernels.eager import attention_weights
from lamzoo.lam.masks import FactoredMask

Score = Literal["mask", "attention", "attention-value", "redundancy"]
Rest = Literal["drop", "merge", "nearest"]
Training = Literal["straight-through", "top-k"]


@dataclass(frozen=True)
class PruneConfig:
    """Where tokens leave, how many, and what becomes of them.

    Attributes:
        keep: the share of a layer's tokens, class and register tokens apart, that stays at each of ``at``, rounded up.
        at: layers, counted from 0, whose attention scores the tokens; those that leave do so behind the layer's block.
        score: what decides. ``"mask"``: the mean mask value of a key over the queries, from the factors alone, in
            O(N R); ``"attention"``: what the class token (the mean query, where there is none) attends to under the
            mask, in O(N (d + R)); ``"attention-value"``: that, times the norm of the value; ``"redundancy"``:
            every second token stays, and of the others those whose values are least like any of these, with a say of
            the mask, in O(N^2 d); it goes with ``rest="nearest"``.
        rest: ``"drop"`` the others, ``"merge"`` them into one token, weighted by the softmax of their scores, or let
            each be averaged into the ``"nearest"`` token that stays, by the cosine between them.
        training: what happens in training mode. ``"straight-through"``: all tokens remain in place, and those that
            would leave are hidden from the layers behind and from the pooling, by decisions whose gradient reaches the
            scores (the principle of DynamicViT, arXiv 2106.02034), at the whole model's cost and a second attention
            in each layer behind; add :func:`lamzoo.pruning_loss` to the loss. ``"top-k"``: as in evaluation, at the
            pruned cost; no gradient tells the scores which tokens would have been the better ones.

    Raises:
        ConfigError: a value that means nothing.
    """

    keep: float
    at: tuple[int, ...]
    score: Score = "mask"
    rest: Rest = "drop"
    training: Training = "straight-through"

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ConfigError(f"keep={self.keep}: the share of tokens that stay must be above 0 and at most 1.")
        layers = tuple(self.at)
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0:
            raise ConfigError(f"at={layers}: name at least one layer, in ascending order, counted from 0.")
        object.__setattr__(self, "at", layers)
        for name, of in (("score", Score), ("rest", Rest), ("training", Training)):
            value, choices = getattr(self, name), get_args(of)
            if value not in choices:
                raise ConfigError(f"{name}={value!r}: it must be one of {', '.join(map(repr, choices))}.")

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain TOML and JSON values."""
        return dataclasses.asdict(self) | {"at": list(self.at)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> PruneConfig:
        """Builds a configuration from what :meth:`to_dict` returned; raises as :meth:`LamConfig.from_dict`."""
        return from_fields(cls, fields)


@dataclass(frozen=True)
class Reduction:
    """How the tokens of one layer became fewer; applies to whatever there is one of for each token.

    Attributes:
        length: number of tokens before.
        kept: int64 ``(B, K)``, the tokens that stay, ascending.
        merged: float ``(B, length)``, rows that sum to one: the weights of the tokens that the last one is made of;
            None where there is no such token.
        shares: float ``(B, K, length)``, rows that sum to one: the weights of the tokens that each is made of; None
            where they stay as they are.
    """

    length: int
    kept: Tensor
    merged: Tensor | None = None
    shares: Tensor | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        """Reduces ``(B, length, C)`` to ``(B, K, C)``, or ``(B, K + 1, C)`` with a merged token behind them."""
        if self.shares is not None:
            return self.shares.to(tokens.dtype) @ tokens
        return self._chosen(tokens)

    def factor(self, factor: Tensor) -> Tensor:
        """Reduces a mask's factor, ``(1 | B, Hm, length, R)``, to ``(B, Hm, K | K + 1, R)``.

        What others were averaged into keeps its own row, since that may say where it stands.
        """
        heads = factor.shape[1]
        rows = factor.transpose(1, 2).flatten(2).expand(self.kept.shape[0], -1, -1)
        return self._chosen(rows).unflatten(-1, (heads, -1)).transpose(1, 2)

    def _chosen(self, tokens: Tensor) -> Tensor:
        few = tokens.gather(1, self.kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        if self.merged is None:
            return few
        return torch.cat([few, self.merged.unsqueeze(1).to(tokens.dtype) @ tokens], dim=1)


@dataclass(frozen=True)
class Attended:
    """What the attention of one layer works on.

    Attributes:
        query: ``(B, H, N, d)``.
        key: ``(B, H, N, d)``.
        value: ``(B, H, N, dv)``.
        mask: the layer's.
        op: how it acts.
        scale: of the attention scores.
        present: bool ``(B, N)``, where tokens that have left remain in place: those that have not.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: FactoredMask
    op: Op
    scale: float
    present: Tensor | None = None


class Scorer(Protocol):
    """Scores the tokens that a layer attends to.

    Args:
        layer: what its attention works on. Tokens that have left have no say, and their own scores mean nothing.
        has_class_token: whether token 0 stands for all.

    Returns:
        ``(B, N)``, float; the higher, the more important.
    """

    def __call__(self, layer: Attended, *, has_class_token: bool) -> Tensor: ...


def mask_importance(layer: Attended, *, has_class_token: bool) -> Tensor:
    """The mean mask value of each key over queries and heads; a :class:`Scorer`."""
    return layer.mask.importance(layer.present).mean(dim=1).expand(layer.query.shape[0], -1)


def summary_attention(layer: Attended, *, has_class_token: bool) -> Tensor:
    """Logarithm of what the class token, or the mean query, attends to, averaged over the heads; a :class:`Scorer`."""
    return _summary_weights(layer, has_class_token).mean(dim=1).log()


def summary_contribution(layer: Attended, *, has_class_token: bool) -> Tensor:
    """As :func:`summary_attention`, each head's weights times the norms of its values; a :class:`Scorer`."""
    return (_summary_weights(layer, has_class_token) * layer.value.norm(dim=-1)).mean(dim=1).log()


def redundancy(layer: Attended, *, has_class_token: bool) -> Tensor:
    """How little each token's value is like that of any token that stays for certain; a :class:`Scorer`.

    Every second token stays for certain, as in ToMe's matching (arXiv 2210.09461, section 3), which compares keys. Of
    the others, the unlikeness and the mean mask value of :func:`mask_importance` are added up, each standardised over
    the sample, the mask's at half its weight. Where fewer than half are to stay, the mask decides among the rest.
    """
    values = F.normalize(layer.value.transpose(1, 2).flatten(2).float(), dim=-1)
    there = values.new_ones(values.shape[:2]) if layer.present is None else layer.present.float()
    places = there.cumsum(dim=1) - 1 - int(has_class_token)  # of tokens that are there; below 0: the class token
    others = there * (places.remainder(2) == 1) * (places > 0)
    certain = there * (places.remainder(2) == 0) * (places >= 0)
    alike = (values @ values.transpose(-2, -1)).masked_fill(certain.unsqueeze(1) == 0, -1.0).amax(dim=-1)
    important = mask_importance(layer, has_class_token=has_class_token).float()
    scores = _standardised(-alike, others) + _standardised(important, others) / 2
    return torch.where(others > 0, scores, _CERTAIN + _standardised(important, certain))


_CERTAIN = 1e3  # standard deviations


def _standardised(scores: Tensor, among: Tensor, least: float = 1e-3) -> Tensor:
    """Returns scores ``(B, N)`` less the mean of some, divided by their standard deviation; ``among`` is 1 there.

    ``least`` is the smallest deviation that counts: what is equal but for rounding stays so, with a gradient.
    """
    count = among.sum(dim=1, keepdim=True).clamp_min(1)
    centred = scores - (scores * among).sum(dim=1, keepdim=True) / count
    variance = (centred.square() * among).sum(dim=1, keepdim=True) / count
    return (centred / (variance + least**2).sqrt()).clamp(-_CERTAIN / 10, _CERTAIN / 10)


SCORERS: dict[Score, Scorer] = {
    "mask": mask_importance,
    "attention": summary_attention,
    "attention-value": summary_contribution,
    "redundancy": redundancy,
}


def select(scores: Tensor, keep: float, rest: Rest, num_prefix_tokens: int, tokens: Tensor | None = None) -> Reduction:
    """Chooses the tokens that stay.

    Args:
        scores: ``(B, N)``, of all tokens.
        keep: share of those behind the prefix that stays, rounded up; at least one does.
        rest: what becomes of the others.
        num_prefix_tokens: tokens at the start that always stay.
        tokens: ``(B, N, C)``, by which the nearest are found; read for ``rest="nearest"`` alone.

    Returns:
        The reduction, of the same size for each sample.
    """
    length = scores.shape[1]
    scores = scores[:, num_prefix_tokens:]
    size = num_kept(scores.shape[1], keep)
    order = scores.argsort(dim=1, descending=True, stable=True) + num_prefix_tokens
    prefix = torch.arange(num_prefix_tokens, device=order.device).expand(order.shape[0], -1)
    kept = torch.cat([prefix, order[:, :size].sort(dim=1).values], dim=1)
    if rest == "drop" or size == scores.shape[1]:
        return Reduction(length, kept)
    if rest == "nearest":
        assert tokens is not None
        return Reduction(length, kept, shares=_shares(tokens.detach(), kept, num_prefix_tokens))
    inside = torch.zeros_like(scores, dtype=torch.bool).scatter(1, order[:, :size] - num_prefix_tokens, True)
    weights = scores.float().masked_fill(inside, -torch.inf).softmax(dim=1)
    return Reduction(length, kept, F.pad(weights, (num_prefix_tokens, 0)))


def _shares(tokens: Tensor, kept: Tensor, num_prefix_tokens: int) -> Tensor:
    """Returns the weights of averaging each token into the nearest one that stays, ``(B, K, N)``; see `Reduction`."""
    unit = F.normalize(tokens.float(), dim=-1)
    alike = unit @ unit.gather(1, kept.unsqueeze(-1).expand(-1, -1, unit.shape[-1])).transpose(-2, -1)  # (B, N, K)
    places = torch.arange(kept.shape[1], device=kept.device)
    alike = alike.masked_fill(places < num_prefix_tokens, -2.0)  # what stands for all takes nothing in
    alike = alike.scatter(1, kept.unsqueeze(1), 2.0)  # and what stays goes to itself
    members = (alike.argmax(dim=2).unsqueeze(1) == places.unsqueeze(1)).float()
    return members / members.sum(dim=2, keepdim=True)


def decide(scores: Tensor, keep: float, num_prefix_tokens: int, before: Tensor | None = None) -> Tensor:
    """Decides, in place of :func:`select`, which tokens stay, so that the scores learn from it.

    A token stays whose score, standardised among the sample's tokens that are still there, is among the batch's best
    ``keep``: samples in which more stand out keep more, and how high a sample's scores are as a whole, which decides
    nothing in evaluation, decides nothing here. The gradient is that of a sigmoid around this threshold, one standard
    deviation wide.

    Args:
        scores: ``(B, N)``, of all tokens.
        keep: share of those behind the prefix that stays, over the batch and rounded up.
        num_prefix_tokens: tokens at the start that always stay.
        before: ``(B, N)``, what was decided before; None at first.

    Returns:
        ``(B, N)``, float32: 1 for tokens that stay, 0 for those that leave or have left.
    """
    patches = scores[:, num_prefix_tokens:].float()
    before = None if before is None else before[:, num_prefix_tokens:]
    there = torch.ones_like(patches, dtype=torch.bool) if before is None else before.detach() > 0
    known = _standardised(patches, there, least=1e-2)  # of mask values: masks begin with equal ones
    last = (keep * there.sum() - 1e-6).ceil().clamp_min(1).long() - 1
    ordered = known.detach().masked_fill(~there, -torch.inf).flatten().sort(descending=True).values
    threshold = ordered.take(last)  # not by an index, which would be a number that compiled graphs can't hold
    soft = (known - threshold).sigmoid()
    hard = (known.detach() >= threshold).float()
    decisions = hard + (soft - soft.detach())
    decisions = decisions if before is None else decisions * before
    return F.pad(decisions, (num_prefix_tokens, 0), value=1.0)


def among_kept(kept: Tensor, allowed: Tensor | None) -> Tensor:
    """Returns where attention may look, bool ``(B, 1, 1 | Nq, N)``, tokens that decisions ``(B, N)`` hide left out."""
    there = kept.detach()[:, None, None, :] > 0
    return there if allowed is None else there & allowed


def with_decisions(value: Tensor, kept: Tensor) -> Tensor:
    """Weights values by decisions and puts the decisions beside them, for :func:`learn_decisions`.

    Args:
        value: ``(B, H, N, dv)``.
        kept: ``(B, N)``.

    Returns:
        ``(B, H, N, dv + 1)``.
    """
    decisions = kept[:, None, :, None].to(value.dtype).expand(*value.shape[:3], 1)
    return torch.cat([value.detach() * decisions, decisions], dim=-1)


def learn_decisions(out: Tensor, attended: Tensor) -> Tensor:
    """Leaves what attention among the tokens that stay gave out as it is, and lets the decisions learn from it.

    With weights ``w`` over all tokens, query ``i`` tells the decision on token ``j`` that more of it would change its
    output by ``w_ij (v_j - out_i)``. The quotient's own gradient has this divided by the weights of the tokens that
    stay, which may be next to nothing: it was tens of thousands of times as large as that of all else.

    Args:
        out: ``(B, H, Nq, dv)``.
        attended: ``(B, H, Nq, dv + 1)``: attention over all tokens, with the values of :func:`with_decisions`.

    Returns:
        ``out``.
    """
    gain = attended[..., :-1] - out.detach() * attended[..., -1:]
    return out + (gain - gain.detach())


def num_kept(tokens: int, keep: float) -> int:
    """Returns how many of so many tokens stay: the share rounded up, at least one."""
    return max(1, math.ceil(round(keep * tokens, 6)))  # 0.7 * 10 is 7.000000000000001


def _summary_weights(layer: Attended, has_class_token: bool) -> Tensor:
    """Returns the attention weights of one query that stands for all, ``(B, H, N)``."""
    query, left = (
        x[:, :, :1] if has_class_token else _mean_token(x, layer.present) for x in (layer.query, layer.mask.left)
    )
    allowed = None if layer.present is None else layer.present[:, None, None, :]
    weights = attention_weights(
        query, layer.key, FactoredMask(left, layer.mask.right),
        op=layer.op, allowed=allowed, bias=None, is_causal=False, scale=layer.scale,
    )  # fmt: skip
    return weights.squeeze(2).clamp_min(torch.finfo(weights.dtype).tiny)  # its logarithm is asked for


def _mean_token(tokens: Tensor, present: Tensor | None) -> Tensor:
    """Returns the mean over the tokens that are there, ``(B, H, 1, C)`` of ``(B, H, N, C)``."""
    if present is None:
        return tokens.mean(dim=2, keepdim=True)
    weights = present / present.sum(dim=1, keepdim=True)
    return weights.to(tokens.dtype)[:, None, None, :] @ tokens
