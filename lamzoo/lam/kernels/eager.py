"""The reference backend: masked attention written out, with the dense mask and the attention weights in memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lamzoo.errors import ConfigError
from lamzoo.lam.masks import FactoredMask
from lamzoo.lam.ops import OPS, Op


def eager(
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
    """Masked attention through the dense mask; shapes as in :func:`lamzoo.lam.lam_attention`."""
    weights = attention_weights(query, key, mask, op=op, allowed=allowed, bias=bias, is_causal=is_causal, scale=scale)
    return F.dropout(weights, dropout_p) @ value if dropout_p else weights @ value


def attention_weights(
    query: Tensor,
    key: Tensor,
    mask: FactoredMask,
    *,
    op: Op,
    allowed: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """Returns the softmax of the modulated scores, ``(B, H, Nq, Nk)``; rows with nothing allowed are zero."""
    scores = (query * scale) @ key.transpose(-2, -1)
    scores = OPS[op].apply(scores, mask.dense().to(scores.dtype))
    if bias is not None:
        bias = bias.to(scores.dtype)  # first, because float32's lowest numbers, used to forbid, become -inf in half
        scores = scores + bias
    allowed = merge_allowed(scores, allowed, bias, is_causal)
    if allowed is None:
        return scores.softmax(dim=-1)
    # The lowest finite number, because -inf would turn a row with nothing allowed, and its gradient, into NaN.
    weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return weights.masked_fill(~allowed, 0.0)


def merge_allowed(scores: Tensor, allowed: Tensor | None, bias: Tensor | None, is_causal: bool) -> Tensor | None:
    """Combines the three ways of forbidding attention into one boolean tensor; None if nothing is forbidden."""
    parts = [] if allowed is None else [allowed]
    if bias is not None:
        parts.append(bias != -torch.inf)
    if is_causal:
        parts.append(torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril())
    merged = None
    for part in parts:
        merged = part if merged is None else merged & part
    return merged


def is_transformed() -> bool:
    """Returns whether torch.func or forward-mode gradients are active, which don't know lamzoo's own operators."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def lacks(bias: Tensor | None, dropout_p: float) -> str | None:
    """Returns why lamzoo's own operators don't support a call, whatever its shapes, as a clause, or None if they do."""
    if bias is not None:
        return "it takes no bias"
    if dropout_p:
        return "it has no dropout"
    if is_transformed():
        return "torch.func and forward-mode gradients don't know its operator"
    return None


def no_second_gradients(backend: str) -> ConfigError:
    """Returns the error of a backend's operator whose gradients can't be differentiated."""
    return ConfigError(
        f"The {backend} backend has no second gradients, such as those of create_graph=True; compute them under "
        "lamzoo.attention_backend('eager')."
    )


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Returns the dtype in which attention to a tensor is computed: its own, or that of ``torch.autocast``.

    Float64 is kept, as autocast does. lamzoo's own kernels cast to this dtype themselves, because
    ``torch.library.register_autocast`` casts to one dtype that is fixed in advance.
    """
    device = tensor.device.type
    if tensor.dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype
