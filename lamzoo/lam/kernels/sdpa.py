"""The SDPA backend: the mask is folded exactly into queries and keys, and torch's fused attention does the rest."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lamzoo.lam.masks import FactoredMask
from lamzoo.lam.ops import OPS, Op

_LONG = 2**22  # elements of a sample's queries and keys: those of a ViT-B at 2,731 tokens


def unsupported(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: FactoredMask,
    *,
    op: Op,
    bias: Tensor | None,
    dropout_p: float,
) -> str | None:
    """Returns why the backend doesn't support these inputs, as a clause, or None if it does."""
    return None if OPS[op].fold is not None else f"op={op!r} can't be folded into queries and keys"


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: FactoredMask,
    *,
    op: Op,
    allowed: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    scale: float,
) -> Tensor:
    """Masked attention through ``F.scaled_dot_product_attention``; shapes as in :func:`lamzoo.lam.lam_attention`."""
    attn_mask = merged_mask(query, key, allowed, bias, is_causal)
    fold = OPS[op].fold
    assert fold is not None  # see unsupported

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: FactoredMask, attn_mask: Tensor | None) -> Tensor:
        wide_query, wide_key = fold(query, key, mask.left.to(query.dtype), mask.right.to(key.dtype), scale)
        # On the CPU a value of another width than the query silently disables the fused kernel.
        width = max(wide_query.shape[-1], value.shape[-1])
        if query.device.type == "cuda":  # as does, on CUDA, a width that isn't a multiple of 8
            width = -(-width // 8) * 8
        out = F.scaled_dot_product_attention(
            _widen(wide_query, width),
            _widen(wide_key, width),
            _widen(value, width),
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal and attn_mask is None,
            scale=scale,
        )
        return out[..., : value.shape[-1]]

    if not (OPS[op].fold_in_halves and _is_long(query, key)):
        return attend(query, key, value, mask, attn_mask)
    # Half of the heads at a time, so that half of the folded queries and keys are in memory at once.
    heads = query.shape[1]
    out = value.new_empty(query.shape[0], query.shape[2], heads, value.shape[-1]).transpose(1, 2)
    for part in (slice(heads // 2), slice(heads // 2, None)):
        factors = FactoredMask(*(factor if factor.shape[1] == 1 else factor[:, part] for factor in mask))
        of_heads = attn_mask
        if attn_mask is not None and attn_mask.ndim > 2 and attn_mask.shape[-3] > 1:
            of_heads = attn_mask[..., part, :, :]
        out[:, part] = attend(query[:, part], key[:, part], value[:, part], factors, of_heads)
    return out


def _is_long(query: Tensor, key: Tensor) -> bool:
    """Returns whether folding these, without gradients, takes a relevant amount of memory."""
    if query.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return query.shape[1] > 1 and query.shape[1:].numel() + key.shape[1:].numel() >= _LONG


def _widen(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))  # F.pad by nothing would copy


def merged_mask(
    query: Tensor, key: Tensor, allowed: Tensor | None, bias: Tensor | None, is_causal: bool
) -> Tensor | None:
    """Combines what ``F.scaled_dot_product_attention`` takes as one mask; None where its own flags are enough."""
    if is_causal and (allowed is not None or bias is not None):  # SDPA takes either the flag or a mask
        causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        allowed = causal if allowed is None else allowed & causal
    if bias is None:
        return None if allowed is None else torch.atleast_2d(allowed)  # SDPA takes no vectors
    bias = torch.atleast_2d(bias.to(query.dtype))
    return bias if allowed is None else bias.masked_fill(~allowed, -torch.inf)
