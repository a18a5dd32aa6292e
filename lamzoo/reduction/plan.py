"""How many patches merge in each layer, and the order in which they are matched."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamzoo.lam.resize import Grid

_MOST = 0.3  # of a layer's patches: of its alike pairs, more would be less alike
_ROUNDING = 1e-6  # of patches, by which a product falls short of a whole number at most


@lru_cache(maxsize=256)
def merges_per_layer(patches: int, keep: float, layers: int) -> tuple[int, ...]:
    """Spreads merges evenly over layers, up to 30 % of a layer's patches, or the share that it takes, up to one half.

    Where even merges are too many for the last layers, which have few patches left, earlier ones merge more. With the
    share, the number of patches never falls after any layer.

    Args:
        patches: number of patches before the first of the layers.
        keep: share of them that is left after the last one, rounded up, and at least one patch.
        layers: number of layers.

    Returns:
        The number of patches that merge into others in each layer; nothing without layers, as in a model of one block
        under a class token.
    """
    if patches == 0:
        return (0,) * layers
    left, merges = patches, []
    for after in _patches_left(patches, max(1.0, keep * patches), layers):
        merges.append(min(left - math.ceil(after - _ROUNDING), left // 2))
        left -= merges[-1]
    return tuple(merges)


def _patches_left(patches: int, last: float, layers: int) -> list[float]:
    """Returns the number of patches after each layer, before rounding: first as many less each, then a share less."""
    if layers == 0:
        return []
    share = min(max(_MOST, 1 - (last / patches) ** (1 / layers)), 0.5)
    for even in range(layers, 0, -1):  # layers that merge as many; the others reach the share
        each = (patches - last / (1 - share) ** (layers - even)) / even
        if each <= share * (patches - (even - 1) * each):
            break
    left = [patches - layer * each for layer in range(1, even + 1)]
    return left + [left[-1] * (1 - share) ** layer for layer in range(1, layers - even + 1)]


def merges_by_length(longest: int, keep: float, layers: int) -> Tensor:
    """Returns :func:`merges_per_layer` for any number of patches up to the longest, int64 ``(longest + 1, layers)``."""
    return torch.from_numpy(_merges_by_length(longest, keep, layers).copy())


@lru_cache(maxsize=16)
def _merges_by_length(longest: int, keep: float, layers: int) -> NDArray[np.int64]:
    # No tensor: one that is made while a model is traced, or on the meta device, would stay so.
    rows = [merges_per_layer(patches, keep, layers) for patches in range(longest + 1)]
    return np.array(rows, dtype=np.int64).reshape(longest + 1, layers)


def checkerboard(patches: int, num_prefix_tokens: int, grids: tuple[Grid | None, ...], like: Tensor) -> Tensor | None:
    """Returns an order of patches in which even and odd places are the two colours of a checkerboard.

    Row by row, the places of a grid of even width alternate within a row only: tokens that match even to odd places
    could never merge with the patches above and below them.

    Args:
        patches: number of patches.
        num_prefix_tokens: class and register tokens at the start, which stay there.
        grids: patch grids that may be that of the patches, the likeliest first; a square is tried at the end.
        like: a tensor on the device of the result.

    Returns:
        int64 ``(num_prefix_tokens + patches,)``, its own inverse; None where the places alternate already, or the grid
        is unknown.
    """
    side = math.isqrt(patches)
    for grid in (*grids, (side, side)):
        if grid is not None and grid[0] * grid[1] == patches:
            if grid[0] == 1 or grid[1] % 2 == 1:
                return None
            places = torch.arange(patches, device=like.device)
            order = places ^ (places // grid[1] % 2)
            return torch.cat([torch.arange(num_prefix_tokens, device=like.device), order + num_prefix_tokens])
    return None
