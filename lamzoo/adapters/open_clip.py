"""Learnable masks in open_clip's image and text towers.

Modifications to the host: in each ``ResidualAttentionBlock`` the ``nn.MultiheadAttention``, and in each
``CustomResidualAttentionBlock`` the ``Attention``, is replaced by a subclass that takes over its parameters.
The timm adapter masks a timm trunk (``visual.trunk``).

Not masked: the cross-attention blocks of CoCa's decoder (its self-attention is), the pooling heads, whose queries are
learned parameters and not tokens, and the convolutional ResNets.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar, TypeGuard

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

from lamzoo.adapters.hosts import AttentionSite, HostTakeover, Pooling, TakeoverAdapter, TokenLayout
from lamzoo.adapters.mha import LamMultiheadAttention, mha_site, present_keys, project_apart, read_attn_mask
from lamzoo.errors import UnsupportedHostError, class_name
from lamzoo.lam.fused import Projection
from lamzoo.layers.attention import split_heads

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
        if attn_mask is None and (heads := self.attend_fused(x, self._normalised)) is not None:
            return self._output(split_heads(heads, host.num_heads))
        keys = self.lam.key_tokens(x)
        if keys is x:
            projected = F.linear(x, host.in_proj_weight, host.in_proj_bias).chunk(3, dim=-1)
        else:
            projected = project_apart(x, keys, host.in_proj_weight, host.in_proj_bias)
        query, key, value = (split_heads(each, host.num_heads) for each in projected)
        query, key = self._normalised(query, key)
        allowed, bias, flat = None, None, None
        if attn_mask is not None:
            flat = attn_mask.flatten(0, 1) if attn_mask.ndim == 4 else attn_mask
            allowed, bias = read_attn_mask(flat, query, key)
        dropout_p = host.attn_drop.p if host.training else 0.0
        out = self.lam.attend(
            x, keys, query, key, value, allowed=allowed, bias=bias, dropout_p=dropout_p, scale=self._scale,
            present=present_keys(self.lam, key, flat),
        )  # fmt: skip
        return self._output(out)

    def _output(self, heads: Tensor) -> Tensor:
        """Returns the output of the layer of its heads, ``(B, H, N, d)``."""
        host: Any = self
        out = heads if host.head_scale is None else heads * host.head_scale
        out = host.ln_inner(out.transpose(1, 2).flatten(2))
        return host.out_drop(host.out_proj(out))

    def projection(self) -> Projection:
        host: Any = self
        return Projection(host.in_proj_weight, host.in_proj_bias, host.num_heads, self._scale, (self,))

    @property
    def _scale(self) -> float:
        host: Any = self
        return host.scale if host.logit_scale is None else 1.0

    def _normalised(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        host: Any = self
        if host.logit_scale is None:
            return host.ln_q(query), host.ln_k(key)
        temperature = host.logit_scale.clamp(max=host.logit_scale_max).exp()
        return F.normalize(query, dim=-1) * temperature, F.normalize(key, dim=-1)


class OpenClipAdapter(TakeoverAdapter):
    """Masks the self-attention of open_clip's residual attention blocks."""

    owns_multihead_attention = True
    takeovers: ClassVar[Mapping[type[nn.Module], type[HostTakeover]]] = {
        nn.MultiheadAttention: LamMultiheadAttention,
        Attention: LamClipAttention,
    }

    def sites(self, model: nn.Module) -> Iterator[AttentionSite]:
        """Yields the self-attention layers of open_clip's blocks, in the order in which they are registered.

        Blocks of a module with ``reads_blocks``, which uses their parameters without calling them, get no mask.

        Raises:
            UnsupportedHostError: the model has an unknown block, or a block with an unknown attention layer; names it.
        """
        read: tuple[str, ...] = ()
        for path, module in model.named_modules():
            if type(module).__module__.startswith("open_clip."):
                _check_blocks(path, module)
            if getattr(module, "reads_blocks", False):
                read += (f"{path}.",) if path else ("",)
            if _is_self_attending(module) and not path.startswith(read):
                yield _site(f"{path}.attn" if path else "attn", module.attn)

    def token_layout(self, model: nn.Module, path: str) -> TokenLayout | None:
        """Returns the layout of class token and patches in an image tower, and of tokens in a text tower."""
        block, _, name = path.rpartition(".")
        if name != "attn" or not _is_self_attending(model.get_submodule(block)):
            return None
        blocks = block.rpartition(".")[0]  # such as visual.transformer.resblocks
        transformer = blocks.rpartition(".")[0]
        host = model.get_submodule(transformer)
        tower = model.get_submodule(transformer.rpartition(".")[0])
        if isinstance(host, MultimodalTransformer):
            return TokenLayout(length=host.context_length)
        if isinstance(tower, VisionTransformer):
            return _image_layout(tower, blocks)
        if isinstance(tower, TextTransformer):
            return TokenLayout(length=tower.num_pos)  # with CoCa's class token, at the end
        if isinstance(tower, CLIP):
            return TokenLayout(length=tower.context_length)
        return TokenLayout()

    def stacks(self, model: nn.Module) -> Iterator[TokenLayout]:
        """Yields the layout of the blocks of each image tower."""
        for path, tower in model.named_modules():
            if isinstance(tower, VisionTransformer):
                yield _image_layout(tower, f"{path}.transformer.resblocks" if path else "transformer.resblocks")


def _is_self_attending(block: nn.Module) -> TypeGuard[ResidualAttentionBlock | CustomResidualAttentionBlock]:
    return isinstance(block, _BLOCKS) and not hasattr(block, "ln_1_kv")  # of cross-attention


def _check_blocks(path: str, host: nn.Module) -> None:
    for index, block in enumerate(getattr(host, "resblocks", ())):
        if not isinstance(block, _BLOCKS):
            raise UnsupportedHostError(
                f"{path}.resblocks.{index} ({class_name(block)}) can't carry a learnable mask; in open_clip's models, "
                f"add_lam supports {' and '.join(map(class_name, _BLOCKS))}."
            )


def _site(path: str, attn: Any) -> AttentionSite:
    stack = path.removesuffix(".attn").rpartition(".")[0]
    if type(attn) is nn.MultiheadAttention:
        return mha_site(attn, [path], stack)
    # open_clip's development branch has an Attention with more arguments, whose boolean masks mean the opposite.
    known = ["self", "x", "attn_mask"]
    if type(attn) is not Attention or list(inspect.signature(Attention.forward).parameters) != known:
        raise UnsupportedHostError(
            f"{path} ({class_name(attn)}) can't carry a learnable mask; nn.MultiheadAttention and the Attention of "
            "open_clip 3.3 can."
        )
    width = attn.in_proj_weight.shape[1]
    return AttentionSite(path=path, stack=stack, query_dim=width, key_dim=width, num_heads=attn.num_heads)


def _reads_prefix_only(tower: VisionTransformer) -> bool:
    """Returns whether a tower returns its class token alone."""
    return tower.pool_type == "tok" and tower.attn_pool is None and not tower.output_tokens


def _image_layout(tower: VisionTransformer, blocks: str) -> TokenLayout:
    rows, columns = tower.grid_size
    drops = getattr(tower.patch_dropout, "prob", 0.0) > 0  # nn.Identity without
    pools = tower.attn_pool is not None
    batch_first = tower.transformer.batch_first
    reason = None if batch_first else "takes tokens as (N, B, C); build its transformer with batch_first=True"
    pooling = Pooling(
        blocks=blocks,
        root=blocks.rpartition(".")[0].rpartition(".")[0],
        norm="ln_1",
        reads_prefix_only=partial(_reads_prefix_only, tower),
        no_merging=reason,
        no_pruning=reason,
        kind="attention" if pools else {"tok": "token", "none": ""}.get(tower.pool_type, "avg"),
        has_class_token=True,
        num_unpooled=1,
        last=tower.transformer if tower.final_ln_after_pool or pools else tower.ln_post,
    )
    return TokenLayout(
        length=1 + rows * columns,
        num_prefix_tokens=1,
        grid=(rows, columns),
        grid_at=lambda size: (rows, columns),
        no_positions="patch_dropout > 0 removes patches in training, and their positions with them" if drops else None,
        pooling=pooling,
    )
