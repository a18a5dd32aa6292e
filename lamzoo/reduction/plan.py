"""How many patches merge in each layer, and the order in which they are matched."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from lamzoo.lam.resize import Grid

_MOST = 0.3  # of a layer's patches: of its alike pairs, more would be less alike


def merges_per_layer(patches: int, keep: float, layers: int, *, capped: bool = True) -> tuple[int, ...]:
    """Spreads merges evenly over layers, up to 30 % of a layer's patches, or the share that it takes, up to one half.

    Args:
        patches: number of patches before the first of the layers.
        keep: share of them that is left after the last one.
        layers: number of layers.
        capped: whether later layers, which have few patches left, merge fewer in favour of earlier ones.

    Returns:
        The number of patches that merge into others in each layer; nothing without layers, as in a model of one block
        under a class token.
    """
    if layers == 0:
        return ()
    gone = patches - max(1, round(keep * patches))
    if not capped:
        return tuple(_even(patches, gone, layers, 0.5))
    # The least share that may be enough, if every layer merged as many; it isn't where shares are rounded down.
    most, total = min(max(_MOST, 1 - (1 - gone / patches) ** (1 / layers)), 0.5), gone
    while True:
        merges = _even(patches, total, layers, most)
        missing = gone - sum(merges)
        if missing <= 0:
            break
        total += missing
        if total > patches * layers:  # every layer merges as many as it may
            if most >= 0.5:
                return tuple(merges)
            most, total = min(most + 0.002, 0.5), gone
    for place in range(-missing):
        merges[place % layers] -= 1
    return tuple(merges)


def merges_of_samples(
    sizes: Tensor, num_prefix_tokens: int, count: int, keep: float, layers: int, layer: int
) -> Tensor:
    """Returns how many patches of each padded sample merge, so that it merges as it does alone.

    Args:
        sizes: number of the stack's input tokens in each token, ``(B, N)``; 0 in padding.
        num_prefix_tokens: class and register tokens at the start.
        count: number of tokens by which the batch gets shorter.
        keep: as for :func:`merges_per_layer`, of which this is the value in one layer, without
            a cap, for the length of each sample.
        layers: likewise.
        layer: place of the layer among them.

    Returns:
        int64 ``(B,)``; at least as many as it takes for the remaining patches to fit into the shorter batch.
    """
    patches = sizes[:, num_prefix_tokens:]
    left, whole = (patches > 0).sum(dim=1), patches.sum(dim=1).long()
    gone = (whole - (keep * whole.double()).round().clamp_min(1).long()).clamp_min(0)
    due = [torch.div(place * gone, layers, rounding_mode="floor") for place in (layer, layer + 1)]
    own = torch.minimum(due[1] - due[0], left // 2)
    return torch.maximum(own, left - (patches.shape[1] - count))


def _even(patches: int, total: int, layers: int, most: float) -> list[int]:
    """Spreads a total over layers, at most a share of a layer's patches in each."""
    left, merges = patches, []
    for before, after in pairwise(layer * total // layers for layer in range(layers + 1)):
        merges.append(min(after - before, int(most * left)))
        left -= merges[-1]
    return merges


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
