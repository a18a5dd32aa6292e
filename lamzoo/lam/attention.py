"""Attention under a factored mask, by one of several backends."""

from __future__ import annotations

import torch
from torch import Tensor

from lamzoo.errors import ConfigError, MaskShapeError
from lamzoo.lam.kernels import choose
from lamzoo.lam.kernels.eager import compute_dtype
from lamzoo.lam.masks import FactoredMask
from lamzoo.lam.ops import OPS, Op


def lam_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: FactoredMask,
    *,
    op: Op,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Scaled dot-product attention whose scores are modulated by a learnable mask.

    Computes ``softmax((query @ key.T * scale) * M) @ value`` with ``M = mask.left @ mask.right.T``
    (arXiv 2406.02761, section 3.2) without building ``M`` where the backend can avoid it.

    Args:
        query: ``(B, H, Nq, d)``, float.
        key: ``(B, H, Nk, d)``, the dtype of ``query``; inside ``torch.autocast`` the dtypes may differ.
        value: ``(B, H, Nk, dv)``, likewise.
        mask: factors ``(B, 1|H, Nq, R)`` and ``(1|B, 1|H, Nk, R)``.
        op: ``"mul"`` scales the scores, ``"add"`` shifts them; that of the mask's :class:`LamConfig`.
        allowed: bool, broadcastable to ``(B, H, Nq, Nk)``; True where attention may go. Applied last; a row
            in which nothing is allowed returns zeros.
        bias: float, broadcastable to ``(B, H, Nq, Nk)``, added after the mask, such as a host's relative position
            bias. ``-inf`` forbids attention.
        is_causal: query ``i`` may attend to keys ``0..i`` only, as in ``F.scaled_dot_product_attention``.
        dropout_p: probability with which attention weights are dropped; pass 0 in evaluation.
        scale: of the scores before the mask, positive; ``d ** -0.5`` by default.
        backend: one of :func:`available_backends`; ``"auto"`` takes the one pinned by :func:`attention_backend`, or
            picks by device, op, rank and length.

    Returns:
        ``(B, H, Nq, dv)``, the dtype of ``query``.

    Raises:
        MaskShapeError: the factors don't fit the queries or keys, or are boolean; ``query``, ``key`` and ``value``
            differ in dtype outside of ``torch.autocast``; ``allowed`` or ``bias`` has the wrong dtype or a shape that
            doesn't broadcast. Names the shapes or dtypes.
        ConfigError: an unknown ``op`` or ``backend``, a backend that doesn't support these inputs, or a scale that
            isn't positive.
    """
    check_inputs(query, key, value, mask, op, allowed, bias, scale)
    kernel = choose(backend, query, key, value, mask, op=op, bias=bias, dropout_p=dropout_p)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out = kernel(
        query, key, value, mask,
        op=op, allowed=allowed, bias=bias, is_causal=is_causal, dropout_p=dropout_p, scale=scale,
    )  # fmt: skip
    return out.to(query.dtype)


def check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: FactoredMask,
    op: Op,
    allowed: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
) -> None:
    """Checks the inputs of every backend; raises as :func:`lam_attention`."""
    if op not in OPS:
        raise ConfigError(f"Unknown mask op {op!r}; it must be {' or '.join(map(repr, OPS))}.")
    if scale is not None and scale <= 0:  # torch's own fused attention returns NaN for causal attention and scale < 0
        raise ConfigError(f"The attention scale is {scale}; it must be positive.")
    if isinstance(mask, Tensor):
        raise MaskShapeError(
            f"A {mask.dtype} tensor was passed where a FactoredMask belongs; "
            "padding and causal masks go into `allowed` (bool, True = may attend)."
        )
    mask.check(query, key)
    is_mixed = not query.dtype == key.dtype == value.dtype
    if is_mixed and len({compute_dtype(x) for x in (query, key, value)}) > 1:
        raise MaskShapeError(
            f"query, key and value have the dtypes {query.dtype}, {key.dtype} and {value.dtype}; outside of "
            "torch.autocast they must have the same one."
        )
    if allowed is None and bias is None:
        return
    if allowed is not None and allowed.dtype != torch.bool:
        raise MaskShapeError(f"`allowed` is {allowed.dtype}; it must be torch.bool, True = may attend.")
    if bias is not None and not bias.is_floating_point():
        raise MaskShapeError(f"`bias` is {bias.dtype}; it must be floating, pass a boolean mask as `allowed`.")
    scores = (*query.shape[:3], key.shape[2])
    for name, tensor in (("allowed", allowed), ("bias", bias)):
        if tensor is not None and not _broadcasts(tuple(tensor.shape), scores):
            raise MaskShapeError(
                f"`{name}` has shape {tuple(tensor.shape)}, which doesn't broadcast to the scores' (B, H, Nq, Nk) = "
                f"{scores}; pass key padding (B, Nk) as (B, 1, 1, Nk)."
            )


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) <= len(to) and all(
        size in (1, wanted) for size, wanted in zip(shape[::-1], to[::-1], strict=False)
    )
