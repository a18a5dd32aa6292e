"""Which frames of a video are alike and become one, before a tower encodes each of them."""

from __future__ import annotations

from torch import Tensor

from lamzoo.lam.token_map import TokenMap
from lamzoo.reduction.matching import match


def merge_frames(frames: Tensor, share: float) -> tuple[Tensor, TokenMap | None]:
    """Averages the frames of each video that are most alike.

    Frames merge in rounds of at most a quarter of them, because a round can only halve a run of equal frames. Pairs and
    averages are those of :func:`lamzoo.reduction.matching.match`, with a frame's values as its token.

    Args:
        frames: ``(B, F, ...)``, float.
        share: of the frames that is left, rounded, at least one.

    Returns:
        ``(B, K, ...)``, and the map from the frames to these; None where all are left.
    """
    few, sizes, token_map = frames.flatten(2), None, None
    left = max(1, round(share * frames.shape[1]))
    while few.shape[1] > left:
        count = min(few.shape[1] - left, max(1, few.shape[1] // 4))
        merge, sizes = match(few, count, 0, sizes)
        few = merge(few)
        token_map = merge if token_map is None else token_map.then(merge)
    return few.unflatten(2, frames.shape[2:]), token_map
