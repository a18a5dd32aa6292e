"""Attention of a layer without a learnable mask, for token merging."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor
from torch.nn import functional as F

from lamzoo.lam.config import Sign
from lamzoo.lam.kernels.sdpa import merged_mask
from lamzoo.lam.layer import AttentionOptions, EagerAttention
from lamzoo.lam.masks import FactoredMask
from lamzoo.lam.passes import Layer, SharedState
from lamzoo.lam.resize import Grid


class Unmasked(Layer):
    """Attention weighted by the sizes of its keys, in the place of a :class:`~lamzoo.lam.Lam`, without parameters.

    The logarithm of a token's size is added to the scores of its key, so that a merged token counts as often as it has
    members (proportional attention; ToMe, arXiv 2210.09461, equation 1).

    Args:
        shared: state of the stack that the layer belongs to.
        place: of the layer in the stack.
        is_last: whether the stack ends here, as in :class:`~lamzoo.lam.Lam`.
    """

    has_positions = False

    def __init__(self, shared: SharedState, place: int, is_last: bool) -> None:
        super().__init__(shared, is_last)
        shared.join(self, place)

    def attend(
        self,
        query_tokens: Tensor,
        key_tokens: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        present: Tensor | None = None,
        grid: Grid | None = None,
        allowed: Tensor | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
        dropout_p: float = 0.0,
        scale: float | None = None,
    ) -> Tensor:
        """Attends; arguments and result as :meth:`lamzoo.lam.Lam.attend`."""
        sizes = self.shared.current.sizes
        if sizes is not None:
            # One number a key, which SDPA broadcasts: faster than a column of the folded mask, as no head grows wider.
            logs = sizes.log()[:, None, None]
            bias = logs if bias is None else bias + logs
        mask = merged_mask(query, key, allowed, bias, is_causal)
        causal = is_causal and mask is None
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, causal, scale=scale)

    def attend_with_weights(
        self,
        query_tokens: Tensor,
        key_tokens: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        present: Tensor | None = None,
        grid: Grid | None = None,
        **options: Unpack[AttentionOptions],
    ) -> tuple[Tensor, Tensor]:
        """Attends and returns the weights; arguments and result as :meth:`lamzoo.lam.Lam.attend_with_weights`."""
        sizes = self.shared.current.sizes
        right = key.new_zeros(key.shape[0], 1, key.shape[2], 1) if sizes is None else log_sizes(sizes).to(key.dtype)
        eager = EagerAttention()
        mask = FactoredMask(right.new_ones(right.shape[0], 1, query.shape[2], 1), right)
        out = eager(query, key, value, mask, op="add", **options)
        return out, eager.calls[0][1]


_HIDDEN = -1000.0  # on a score: the weight is 0 in every dtype, and unlike -inf it has gradients in folded kernels


def log_sizes(sizes: Tensor) -> Tensor:
    """Returns the logarithms ``(B, 1, Nk, 1)`` of the keys' sizes ``(B, Nk)``; that of 0 is finite and hides a key."""
    return sizes.log().clamp_min(_HIDDEN)[:, None, :, None]


def count_members(mask: FactoredMask, sizes: Tensor, sign: Sign) -> FactoredMask:
    """Returns an additive mask plus the logarithms of the keys' sizes.

    It is as wide as before: the last column of a free query factor is 1, and the columns of a positive one sum to 1.

    Args:
        mask: of a :class:`~lamzoo.lam.masks.MaskNetwork`.
        sizes: float ``(B, Nk)``; 0 hides a key.
        sign: of the mask's configuration.
    """
    logs = log_sizes(sizes).to(mask.right.dtype)
    return mask._replace(right=mask.right + (F.pad(logs, (mask.right.shape[-1] - 1, 0)) if sign == "free" else logs))
