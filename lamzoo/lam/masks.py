"""Masks as two thin factors, and the networks that compute them from tokens."""

from __future__ import annotations

import logging
import math
from collections.abc import MutableMapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamzoo.errors import ConfigError, MaskShapeError
from lamzoo.lam.config import LamConfig
from lamzoo.lam.resize import Grid, resize_table, rows_of_present
from lamzoo.lam.token_map import TokenMap

_logger = logging.getLogger(__name__)

_SOFTPLUS_ONE = math.log(math.e - 1)  # softplus of this is 1


class FactoredMask(NamedTuple):
    """A mask ``M = left @ right.T`` over queries and keys, kept as its factors.

    Attributes:
        left: ``(B, Hm, Nq, R)``, float; ``Hm`` is 1 (shared by the heads) or the number of heads.
        right: ``(B | 1, Hm, Nk, R)``, the dtype of ``left``.
    """

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """Returns the dense mask ``M``, ``(B, Hm, Nq, Nk)``."""
        return self.left @ self.right.transpose(-2, -1)

    def detach(self) -> FactoredMask:
        """Returns the mask with detached factors."""
        return FactoredMask(self.left.detach(), self.right.detach())

    def precise(self) -> FactoredMask:
        """Returns the mask with factors in float32, or as they are in float64."""
        return FactoredMask(*(factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in self))

    def importance(self, queries: Tensor | None = None) -> Tensor:
        """Computes each key's mean mask value over the queries in O(N R), without building ``M``.

        Args:
            queries: bool ``(B, Nq)``, True for the queries to average over; all of them by default.

        Returns:
            ``(B, Hm, Nk)``; zero for a sample without such queries.
        """
        if queries is None:
            mean = self.left.mean(dim=2, keepdim=True)
        else:
            # A matmul with weights that sum to one: a plain sum over many queries could overflow in half precision.
            weights = queries / queries.sum(dim=1, keepdim=True).clamp(min=1)
            mean = weights[:, None, None, :].to(self.left.dtype) @ self.left
        return (mean @ self.right.transpose(-2, -1)).squeeze(2)

    def check(self, query: Tensor, key: Tensor) -> None:
        """Checks that the factors fit ``query (B, H, Nq, d)`` and ``key (B, H, Nk, d)``.

        Raises:
            MaskShapeError: the factors are boolean or integer, differ in dtype, or don't fit; names both shapes.
        """
        for name, factor in zip(self._fields, self, strict=True):
            if not factor.is_floating_point():
                raise MaskShapeError(
                    f"The {name} factor of a learnable mask is {factor.dtype}; it must be floating point, pass boolean "
                    "masks as `allowed` (True = may attend)."
                )
            if factor.ndim != 4:
                raise MaskShapeError(
                    f"The {name} factor of a learnable mask has shape {tuple(factor.shape)}; it must have 4 dimensions."
                )
        if self.left.dtype != self.right.dtype:
            raise MaskShapeError(
                f"Mask factors left {self.left.dtype} and right {self.right.dtype} must have the same dtype."
            )
        batch, heads, num_queries, _ = query.shape
        (lb, lh, lq, lr), (rb, rh, rk, rr) = self.left.shape, self.right.shape
        fits = lb in (1, batch) and rb in (1, batch) and lh in (1, heads) and rh in (1, heads) and lr == rr
        if not (fits and lq == num_queries and rk == key.shape[2]):
            raise MaskShapeError(
                f"Mask factors left {tuple(self.left.shape)} and right {tuple(self.right.shape)} do not fit "
                f"queries {tuple(query.shape)} and keys {tuple(key.shape)}; "
                "they need (B, 1|H, Nq, R) and (1|B, 1|H, Nk, R)."
            )


class PositionTable(nn.Module):
    """Resizable table over key positions: the paper's last Linear, ``rank`` inputs and one output per key position.

    Args:
        heads: number of masks, 1 or one per attention head.
        length: key positions, prefix tokens included.
        rank: inputs of the Linear.
        num_prefix_tokens: class and register tokens at the start, never interpolated.
        grid: ``(rows, columns)`` of the patches after the prefix; ``None`` for a sequence.
    """

    def __init__(
        self, heads: int, length: int, rank: int, num_prefix_tokens: int = 0, grid: Grid | None = None
    ) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.grid = grid
        # Both are exempt from weight decay (adapters/decay.py): position embeddings usually are, and decay would pull
        # the identity of a multiplicative mask, the bias 1, towards 0.
        self.weight = nn.Parameter(torch.empty(heads, length, rank))
        self.bias = nn.Parameter(torch.empty(heads, length))

    def forward(self, length: int, grid: Grid | None = None, present: Tensor | None = None) -> Tensor:
        """Returns the weight with the bias as last column, ``(B | 1, heads, length, rank + 1)``.

        Args:
            length: number of key positions.
            grid: ``(rows, columns)`` of their patches.
            present: bool ``(B, length)``, False for padding, which has no position; not read by tables with a grid,
                whose patches are never padded.
        """
        table = torch.cat([self.weight, self.bias.unsqueeze(-1)], dim=-1)
        if present is not None and self.grid is None:
            return rows_of_present(table, present, self.num_prefix_tokens)
        table = resize_table(table, length, num_prefix_tokens=self.num_prefix_tokens, old_grid=self.grid, new_grid=grid)
        return table.unsqueeze(0)

    def adapt(self, weight: Tensor, bias: Tensor, grid: Grid | None = None) -> tuple[Tensor, Tensor]:
        """Resizes the parameters of another table to the length of this one.

        Args:
            weight: ``(H, N, R)``.
            bias: ``(H, N)``.
            grid: ``(rows, columns)`` of their patches; a square by default. Not read by tables without a grid.

        Returns:
            Weight ``(H, length, R)`` and bias ``(H, length)``.

        Raises:
            MaskShapeError: the grid doesn't make up ``N`` positions, or the patches are not a square.
        """
        length, patches = weight.shape[1], weight.shape[1] - self.num_prefix_tokens
        if self.grid is None:
            grid = None
        elif grid is None:
            side = math.isqrt(max(patches, 0))
            if side == 0 or side * side != patches:
                raise MaskShapeError(
                    f"A mask table of {length} rows isn't {self.num_prefix_tokens} prefix tokens and a square grid of "
                    "patches."
                )
            grid = (side, side)
        return self.resized(weight, bias, grid, self.weight.shape[1], self.grid)

    def resized(
        self, weight: Tensor, bias: Tensor, old_grid: Grid | None, length: int, new_grid: Grid | None
    ) -> tuple[Tensor, Tensor]:
        """Resizes the parameters of a table with the same prefix tokens, whose grid is known, to a length and grid."""
        table = torch.cat([weight, bias.unsqueeze(-1)], dim=-1)
        table = resize_table(
            table, length, num_prefix_tokens=self.num_prefix_tokens, old_grid=old_grid, new_grid=new_grid
        )
        return table[..., :-1].contiguous(), table[..., -1].contiguous()

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, num_prefix_tokens={self.num_prefix_tokens}, grid={self.grid}"


class ModalityBias(nn.Module):
    """A learned number for each pair of a query's and a key's modality, as factors.

    Args:
        heads: number of masks, 1 or one per attention head.
        lengths: numbers of tokens of all modalities but the last, in their order; the last one has the rest.
    """

    def __init__(self, heads: int, lengths: Sequence[int]) -> None:
        super().__init__()
        self.starts = tuple(accumulate(lengths))
        self.bias = nn.Parameter(torch.zeros(heads, len(lengths) + 1, len(lengths) + 1))

    def left(self, length: int) -> Tensor:
        """Returns the numbers of the queries' modalities, ``(1, heads, length, modalities)``."""
        return self.bias[None, :, self._of(length)]

    def right(self, length: int) -> Tensor:
        """Returns which modality each key has, ones and zeros ``(1, heads, length, modalities)``."""
        known = F.one_hot(self._of(length), self.bias.shape[1]).to(self.bias.dtype)
        return known.expand(1, self.bias.shape[0], -1, -1)

    def _of(self, length: int) -> Tensor:
        places = torch.arange(length, device=self.bias.device)
        return torch.bucketize(places, places.new_tensor(self.starts), right=True)

    def extra_repr(self) -> str:
        return f"{tuple(self.bias.shape)}, starts={self.starts}"


class MaskNetwork(nn.Module):
    """Computes the factors of a mask from tokens (arXiv 2406.02761, section 3).

    ``left`` is the last hidden layer of a Linear + ReLU stack on the query tokens, with a constant 1 appended. With
    ``keys="position"``, ``right`` is the weight and bias of the paper's last Linear, so that ``left @ right.T`` is
    exactly the paper's dense mask; with ``keys="content"``, it is the output of a second stack on the key tokens. The
    last Linear of that stack has no bias in additive masks, where it would shift all scores of a query by the same
    amount, which the softmax ignores.

    ``sign="positive"`` applies softplus to ``right`` and divides ``left``, which is non-negative already, by its sum:
    every mask value is then a convex combination of the key side's values, and the constant column keeps the identity
    for any hidden activations.

    Args:
        config: of the mask.
        query_dim: width of the query tokens.
        key_dim: width of the key tokens.
        num_heads: attention heads.
        length: key positions of a ``"position"`` table; ``config.max_length`` takes precedence.
        num_prefix_tokens: class and register tokens among them, at the start.
        grid: ``(rows, columns)`` of the patches after them; ``None`` for a sequence.
        modality_lengths: numbers of tokens of all modalities but the last, in their order.

    Raises:
        ConfigError: ``keys="position"`` with neither ``length`` nor ``config.max_length``, or another number of
            modalities.
    """

    def __init__(
        self,
        config: LamConfig,
        query_dim: int,
        key_dim: int,
        num_heads: int,
        *,
        length: int | None = None,
        num_prefix_tokens: int = 0,
        grid: Grid | None = None,
        modality_lengths: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.config = config
        known = len(modality_lengths) + 1
        if config.modalities not in (0, known):
            raise ConfigError(
                f"modalities={config.modalities}, and the tokens of this model have "
                + (f"{known} modalities; set it to {known}, or leave it out." if known > 1 else "one; leave it out.")
            )
        self.heads = num_heads if config.heads == "per-head" else 1
        self.query = _linear_relu(query_dim, *config.hidden, self.heads * config.rank)
        if config.has_positions:
            if config.max_length is not None:
                length, grid = config.max_length, (grid if length == config.max_length else None)
            if length is None:
                raise ConfigError(
                    "keys='position' needs a length, and this model has no fixed one; set LamConfig.max_length."
                )
            self.table = PositionTable(self.heads, length, config.rank, num_prefix_tokens, grid)
        else:
            key = _linear_relu(key_dim, *config.hidden)
            width = config.hidden[-1] if config.hidden else key_dim
            key.append(nn.Linear(width, self.heads * (config.rank + 1), bias=config.mask_op.sees_constants))
            self.key = key
        self.modality = ModalityBias(self.heads, modality_lengths) if config.modalities else None
        self.register_load_state_dict_pre_hook(_drop_dead_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises by ``config.init``: as the identity mask, or with torch's defaults, modalities by zeros."""
        if self.modality is not None:
            nn.init.zeros_(self.modality.bias)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        positions = self.config.has_positions
        last: Any = self.table if positions else self.key[-1]
        with torch.no_grad():
            if self.config.init == "identity":
                last.weight.zero_()
                if last.bias is not None:
                    last.bias.zero_()
                    # The column that is multiplied by the constant 1 in `left`.
                    bias = last.bias if positions else last.bias.unflatten(0, (self.heads, -1))[:, -1]
                    if self.config.sign == "free":  # a positive mask is 1 at zero, by the shift inside its softplus
                        bias.fill_(self.config.mask_op.identity)
            elif positions:  # nn.Linear's own default
                bound = self.config.rank**-0.5
                last.weight.uniform_(-bound, bound)
                last.bias.uniform_(-bound, bound)

    def forward(
        self, query_tokens: Tensor, key_tokens: Tensor, grid: Grid | None = None, present: Tensor | None = None
    ) -> FactoredMask:
        """Computes the factors of the mask.

        Args:
            query_tokens: ``(B, Nq, query_dim)``.
            key_tokens: ``(B, Nk, key_dim)``; the same tensor in self-attention.
            grid: as in :meth:`right`, like ``present``.
            present: likewise.

        Returns:
            Factors ``(B, Hm, Nq, R)`` and ``(B | 1, Hm, Nk, R)`` with ``R = config.columns``.
        """
        left = self.left(query_tokens)
        return FactoredMask(left, self.right(key_tokens, grid, present=present).to(left.dtype))

    def left(self, query_tokens: Tensor) -> Tensor:
        """Computes the query side of the mask, ``(B, Hm, Nq, columns)``, of tokens ``(B, Nq, query_dim)``."""
        left = F.pad(self._split_heads(self.query(query_tokens)), (0, 1), value=1.0)
        if self.modality is not None:
            return torch.cat([left, self.modality.left(left.shape[2]).to(left.dtype).expand(len(left), -1, -1, -1)], -1)
        return left / left.sum(dim=-1, keepdim=True) if self.config.sign == "positive" else left

    def right(
        self,
        key_tokens: Tensor,
        grid: Grid | None = None,
        token_map: TokenMap | None = None,
        present: Tensor | None = None,
    ) -> Tensor:
        """Computes the key side of the mask.

        Args:
            key_tokens: ``(B, Nk, key_dim)``.
            grid: patch grid of the key tokens before any reduction, where it may differ from the table's.
            token_map: the reduction of the key tokens so far; averaged tokens have the average of their rows in a table
                over positions.
            present: bool ``(B, Nk)``, False for padding; None without padding. Read by position keys only; not
                supported together with ``token_map``.

        Returns:
            ``(B | 1, Hm, Nk, columns)``.

        Raises:
            ConfigError: tokens are reduced and the mask knows modalities.
        """
        if self.config.has_positions:
            if token_map is None:
                right = self.table(key_tokens.shape[1], grid, present)
            else:
                right = token_map.factor(self.table(token_map.length, grid))
        else:
            right = self._split_heads(self.key(key_tokens))
        if self.config.sign == "positive":
            # softplus(x) = -logsigmoid(-x): torch 2.15 compiles the gradient of F.softplus with wrong strides, and
            # F.logsigmoid of what isn't contiguous as well.
            right = -F.logsigmoid(-(right.contiguous() + _SOFTPLUS_ONE))
        if self.modality is not None:
            if token_map is not None:
                raise ConfigError("The modality of reduced tokens is unknown; use masks with modalities=0.")
            known = self.modality.right(right.shape[2]).to(right.dtype).expand(len(right), -1, -1, -1)
            right = torch.cat([right, known], dim=-1)
        return right

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def drop_dead_biases(module: nn.Module, state_dict: MutableMapping[str, Tensor], prefix: str = "") -> list[str]:
    """Removes the biases that additive content masks had up to version 0.1.0 from a state dict, in place.

    They do not change the attention: see :class:`MaskNetwork`.

    Args:
        module: model or submodule that the weights are for.
        state_dict: parameter name to tensor.
        prefix: of the module's parameters in ``state_dict``, with the dot.

    Returns:
        The removed keys.
    """
    networks = (
        (f"{prefix}{path}." if path else prefix, part)
        for path, part in module.named_modules(remove_duplicate=False)
        if isinstance(part, MaskNetwork)
    )
    dead = [key for place, network in networks if (key := _dead_bias(network, place)) in state_dict]
    for key in dead:
        del state_dict[key]
    return dead


def _dead_bias(network: MaskNetwork, prefix: str) -> str:
    """Returns the key of the removed bias of the key side's last Linear; ``""`` for other masks."""
    if network.config.has_positions or network.key[-1].bias is not None:
        return ""
    return f"{prefix}key.{len(network.key) - 1}.bias"


def _drop_dead_bias(network: nn.Module, state_dict: MutableMapping[str, Tensor], prefix: str, *_: Any) -> None:
    assert isinstance(network, MaskNetwork)
    key = _dead_bias(network, prefix)
    if key in state_dict:
        del state_dict[key]
        _logger.info("%s left out: a bias that all keys of an additive mask share changes nothing", key)


def _linear_relu(*widths: int) -> nn.Sequential:
    stack = nn.Sequential()
    for inputs, outputs in pairwise(widths):
        stack.append(nn.Linear(inputs, outputs)).append(nn.ReLU())
    return stack
