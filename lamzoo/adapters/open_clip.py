"""Learnable masks in open_clip's image and text towers; needs open_clip, and is imported for its models alone.

Modifications to the host: in each ``ResidualAttentionBlock`` the ``nn.MultiheadAttention``, and in each
``CustomResidualAttentionBlock`` the ``Attention``, is replaced by a subclass that takes over its parameters.
A timm trunk (``visual.trunk``) is served by the timm adapter.

Left as they are, without a mask: the cross-attention blocks of CoCa's decoder (its self-attention has masks), the
pooling heads, whose queries are learned and no tokens, and the convolutional ResNets.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP
from open_clip.transformer import (
    Attention,
    CustomResidualAttentionBlock,
    MultimodalTransformer,
    ResidualAttentionBlock,
    TextTransformer,
    VisionTransformer,
)
from torch import Tensor, nn
from torch.nn import functional as F

from lamzoo.adapters.hosts import HostTakeover, Slot, TokenHost, replace_module
from lamzoo.adapters.mha import host_slot, present_keys, read_attn_mask
from lamzoo.errors import UnsupportedHostError

_BLOCKS = (ResidualAttentionBlock, CustomResidualAttentionBlock)


class LamClipAttention(HostTakeover, Attention):
    """open_clip's ``Attention`` (of its custom blocks) under a learnable mask."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Masked self-attention of ``x (B, N, C)``.

        Args:
            x: ``(B, N, C)``, float.
            attn_mask: ``(N, N)``, ``(B * heads, N, N)`` or ``(B, heads, N, N)``; bool with True = *not* allowed, or
                float, added to the scores.

        Returns:
            ``(B, N, C)``.

        Raises:
            MaskShapeError: ``attn_mask`` has another shape or is an integer tensor.
        """
        host: Any = self
        qkv = F.linear(x, host.in_proj_weight, host.in_proj_bias).unflatten(-1, (3, host.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if host.logit_scale is None:
            query, key, scale = host.ln_q(query), host.ln_k(key), host.scale
        else:
            temperature = host.logit_scale.clamp(max=host.logit_scale_max).exp()
            query, key, scale = F.normalize(query, dim=-1) * temperature, F.normalize(key, dim=-1), 1.0
        allowed, bias, flat = None, None, None
        if attn_mask is not None:
            flat = attn_mask.flatten(0, 1) if attn_mask.ndim == 4 else attn_mask
            allowed, bias = read_attn_mask(flat, query, key)
        dropout_p = host.attn_drop.p if host.training else 0.0
        out = self.lam.attend(
            x, x, query, key, value, allowed=allowed, bias=bias, dropout_p=dropout_p, scale=scale,
            present=present_keys(self.lam, key, flat),
        )  # fmt: skip
        if host.head_scale is not None:
            out = out * host.head_scale
        out = host.ln_inner(out.transpose(1, 2).flatten(2))
        return host.out_drop(host.out_proj(out))


def token_host(model: nn.Module, stack: str) -> TokenHost | None:
    """Returns what is known of the tokens of a stack of open_clip's, if it is that of an image tower."""
    transformer = stack.rpartition(".")[0]
    tower = model.get_submodule(transformer.rpartition(".")[0]) if transformer else None
    if not isinstance(tower, VisionTransformer):
        return None
    pool = "attention" if tower.attn_pool is not None else {"tok": "token", "none": ""}.get(tower.pool_type, "avg")
    last = tower.transformer if tower.final_ln_after_pool or tower.attn_pool is not None else tower.ln_post
    return TokenHost(num_prefix_tokens=1, has_class_token=True, pool=pool, num_unpooled=1, last=last)


def slots(model: nn.Module) -> Iterator[Slot]:
    """Yields the self-attention layers of a model's open_clip blocks, in the order in which they are registered.

    Raises:
        UnsupportedHostError: a tower of Hugging Face ``transformers``, an unknown block, or one with an unknown
            attention; names it.
    """
    for path, module in model.named_modules():
        if isinstance(module, HFTextEncoder):
            raise UnsupportedHostError(
                f"{path or 'The model'} is an HFTextEncoder, whose attention lamzoo can't mask; "
                "give add_lam the image tower alone, model.visual."
            )
        if type(module).__module__.startswith("open_clip."):
            _check_blocks(path, module)
        if isinstance(module, _BLOCKS) and not hasattr(module, "ln_1_kv"):  # which cross-attention has
            yield _slot(model, f"{path}.attn" if path else "attn", module.attn)


def _check_blocks(path: str, host: nn.Module) -> None:
    for index, block in enumerate(getattr(host, "resblocks", ())):
        if not isinstance(block, _BLOCKS):
            served = ", ".join(cls.__name__ for cls in _BLOCKS)
            raise UnsupportedHostError(
                f"{path}.resblocks.{index} is a {type(block).__name__}, which can't carry a learnable mask; "
                f"open_clip's {served} can."
            )


def _slot(model: nn.Module, path: str, attn: Any) -> Slot:
    stack, _, _ = path.removesuffix(".attn").rpartition(".")  # such as visual.transformer.resblocks
    geometry = _geometry(model, stack.rpartition(".")[0])
    if type(attn) is nn.MultiheadAttention:
        return replace(host_slot(model, attn, [path], stack), **geometry)
    # open_clip's development branch has an Attention of more arguments, whose boolean masks mean the opposite.
    known = ["self", "x", "attn_mask"]
    if type(attn) is not Attention or list(inspect.signature(Attention.forward).parameters) != known:
        raise UnsupportedHostError(
            f"{path} is a {type(attn).__name__} of a kind that can't carry a learnable mask; "
            "nn.MultiheadAttention and the Attention of open_clip 3.3 can."
        )
    width = attn.in_proj_weight.shape[1]
    return Slot(
        path=path,
        stack=stack,
        query_dim=width,
        key_dim=width,
        num_heads=attn.num_heads,
        like=attn.in_proj_weight,
        attach=lambda lam: replace_module(model, path, LamClipAttention.take_over(attn, lam)),
        **geometry,
    )


def _geometry(model: nn.Module, transformer: str) -> dict[str, Any]:
    host = model.get_submodule(transformer)
    tower = model.get_submodule(transformer.rpartition(".")[0])
    if isinstance(host, MultimodalTransformer):
        return {"length": host.context_length}
    if isinstance(tower, VisionTransformer):
        if getattr(tower.patch_dropout, "prob", 0.0) > 0:  # nn.Identity without
            return {"no_positions": "patch_dropout > 0 removes patches in training, and their positions with them"}
        rows, columns = tower.grid_size
        return {"length": 1 + rows * columns, "num_prefix_tokens": 1, "grid": (rows, columns)}
    if isinstance(tower, TextTransformer):
        return {"length": tower.num_pos}  # CoCa's class token, at the end, included
    if isinstance(tower, CLIP):
        return {"length": tower.context_length}
    return {}
