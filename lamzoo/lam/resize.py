"""Resizing of tables over token positions, as timm resizes position embeddings; pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lamzoo.errors import MaskShapeError

Grid = tuple[int, int]


def resize_table(
    table: Tensor,
    length: int,
    *,
    num_prefix_tokens: int = 0,
    old_grid: Grid | None = None,
    new_grid: Grid | None = None,
) -> Tensor:
    """Resizes a table over token positions to another number of positions.

    The first ``num_prefix_tokens`` rows (class and register tokens) are kept as they are. The others are a patch grid,
    which is resampled bicubically with antialiasing, or, without a grid, a sequence: for fewer positions the first rows
    are taken, for more the rows are interpolated linearly.

    Args:
        table: ``(H, N, R)``, any floating dtype; interpolated in float32 at least.
        length: new number of positions, prefix tokens included.
        num_prefix_tokens: rows at the start that are not positions.
        old_grid: ``(rows, columns)`` of the table's patches; ``None`` for a sequence.
        new_grid: new ``(rows, columns)``; required if ``old_grid`` is given and ``length`` differs.

    Returns:
        ``(H, length, R)``, the dtype of ``table``.

    Raises:
        MaskShapeError: the grids don't make up the lengths, or the new grid is required and missing.
    """
    size = table.shape[1]
    if old_grid is None:
        if length <= size:
            return table[:, :length]
        prefix, positions = table[:, :num_prefix_tokens], table[:, num_prefix_tokens:]
        _check_positions(positions.shape[1], size, length)
        resized = F.interpolate(_wide(positions).transpose(-2, -1), size=length - num_prefix_tokens, mode="linear")
        return torch.cat([prefix, resized.transpose(-2, -1).to(table.dtype)], dim=1)
    if size != num_prefix_tokens + old_grid[0] * old_grid[1]:
        raise MaskShapeError(
            f"A mask table of {size} rows isn't {num_prefix_tokens} prefix tokens and a {old_grid} grid."
        )
    if length == size and new_grid in (None, old_grid):
        return table
    if new_grid is None or length != num_prefix_tokens + new_grid[0] * new_grid[1]:
        raise MaskShapeError(
            f"A mask over key positions made for {size} tokens ({num_prefix_tokens} prefix, grid {old_grid}) got "
            f"{length} tokens, grid {new_grid}; use keys='content' where tokens are dropped or the grid is unknown."
        )
    prefix, patches = table[:, :num_prefix_tokens], table[:, num_prefix_tokens:]
    # (H, R, rows, columns) in channels-last order, as in timm: in the other order torch's antialiasing on the CPU
    # repeats the first row of a grid with a single column (R, the rank and the bias, is at least 2).
    image = _wide(patches).unflatten(1, old_grid).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=new_grid, mode="bicubic", antialias=True)
    return torch.cat([prefix, image.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], dim=1)


def rows_of_present(table: Tensor, present: Tensor, num_prefix_tokens: int = 0) -> Tensor:
    """Looks up a table over a sequence for a padded batch, each sample by its own positions.

    A sample's tokens are numbered without its padding, and its table is that of :func:`resize_table` for their number,
    so that a sample gets the same rows alone and in any batch.

    Args:
        table: ``(H, N, R)``, any floating dtype; interpolated in float32 at least.
        present: bool ``(B, L)``, False for padding, which may be anywhere.
        num_prefix_tokens: rows at the start that are not positions.

    Returns:
        ``(B, H, L, R)``, the dtype of ``table``; rows of padding are undefined.

    Raises:
        MaskShapeError: more tokens than rows, and all rows are prefix tokens.
    """
    heads, size, _ = table.shape
    numbers = present.cumsum(dim=1)
    places = (numbers - 1).clamp_min(0)
    rows = table.transpose(0, 1).flatten(1)  # (N, H R), an embedding
    if present.shape[1] <= size:
        found = F.embedding(places, rows)
    else:
        positions = size - num_prefix_tokens
        _check_positions(positions, size, present.shape[1])
        count = numbers[:, -1:]
        stretch = positions / (count - num_prefix_tokens).clamp_min(1)
        stretched = ((places - num_prefix_tokens + 0.5) * stretch - 0.5).clamp(0, positions - 1) + num_prefix_tokens
        stretched = torch.where((count > size) & (places >= num_prefix_tokens), stretched, places.to(stretched.dtype))
        low = stretched.long()
        share = (stretched - low).unsqueeze(-1).to(_wide(rows).dtype)
        below, above = (F.embedding(at, _wide(rows)) for at in (low, (low + 1).clamp_max(size - 1)))
        found = torch.lerp(below, above, share).to(table.dtype)
    return found.unflatten(-1, (heads, -1)).transpose(1, 2)


def _check_positions(positions: int, size: int, length: int) -> None:
    if positions == 0:
        raise MaskShapeError(
            f"A mask table of {size} prefix tokens alone cannot be resized to {length} tokens; build the model for "
            "longer inputs, or use keys='content'."
        )


def _wide(table: Tensor) -> Tensor:
    return table if table.dtype == torch.float64 else table.float()
