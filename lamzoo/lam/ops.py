"""The ways in which a mask acts on attention scores, ``LamConfig.op``: one record each, the only place to add one."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # configurations are read without torch
    from torch import Tensor

Op = Literal["mul", "add"]


@dataclass(frozen=True)
class MaskOp:
    """How a mask acts on attention scores.

    Attributes:
        identity: mask value that leaves the scores unchanged.
        effect: what the mask does to the scores, for captions: ``"M {effect} the scores"``.
        flips: whether a negative mask value changes the sign of a score.
        sees_constants: whether a constant added to all mask values of a query changes its attention.
        apply: returns the modulated scores of scores and mask, ``(..., Nq, Nk)`` each.
        apply_: likewise, in place of the scores.
        gradients: returns the gradients of scores and mask, of the gradient of the modulated scores, which may be
            overwritten, and functions that compute the scores and the mask, which may be overwritten too.
        fold: returns a wider query and key whose scaled product is the modulated score, of query ``(B, H, Nq, d)``, key
            ``(B, H, Nk, d)``, mask factors ``(1|B, 1|H, Nq|Nk, R)`` and the scale of the scores; None where there are
            none.
        fold_in_halves: whether to fold long sequences half of the heads at a time, which bounds the memory.
    """

    identity: float
    effect: str
    flips: bool
    sees_constants: bool
    apply: Callable[[Tensor, Tensor], Tensor]
    apply_: Callable[[Tensor, Tensor], Tensor]
    gradients: Callable[[Tensor, Callable[[], Tensor], Callable[[], Tensor]], tuple[Tensor, Tensor]]
    fold: Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] | None = None
    fold_in_halves: bool = False


def _mul_gradients(grad: Tensor, scores: Callable[[], Tensor], mask: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    of_mask = scores().mul_(grad)
    return grad.mul_(mask()), of_mask


def _mul_fold(query: Tensor, key: Tensor, left: Tensor, right: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``(q . k) (l . r) = sum_i (l_i q) . (r_i k)``: the head dim grows to ``d R``."""
    return (
        (query.unsqueeze(-2) * left.unsqueeze(-1)).flatten(-2),
        (key.unsqueeze(-2) * right.unsqueeze(-1)).flatten(-2),
    )


def _add_gradients(grad: Tensor, scores: Callable[[], Tensor], mask: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    return grad, grad


def _add_fold(query: Tensor, key: Tensor, left: Tensor, right: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``scale (q . k) + l . r = scale [q, l] . [k, r / scale]``: the head dim grows to ``d + R``."""
    import torch

    left = left.expand(*query.shape[:-1], -1)
    right = (right / scale).expand(*key.shape[:-1], -1)  # which a batch shares, unless it is made of tokens
    return torch.cat([query, left], dim=-1), torch.cat([key, right], dim=-1)


OPS: dict[str, MaskOp] = {
    "mul": MaskOp(
        identity=1.0,
        effect="multiplies",
        flips=True,
        sees_constants=True,
        apply=operator.mul,
        apply_=operator.imul,
        gradients=_mul_gradients,
        fold=_mul_fold,
    ),
    "add": MaskOp(
        identity=0.0,
        effect="is added to",
        flips=False,
        sees_constants=False,  # the softmax ignores them
        apply=operator.add,
        apply_=operator.iadd,
        gradients=_add_gradients,
        fold=_add_fold,
        fold_in_halves=True,
    ),
}
