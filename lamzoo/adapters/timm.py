"""Learnable masks in timm's vision transformers.

Modifications to the host: each ``Attention``, ``AttentionRope``, ``EvaAttention``, ``RelPosAttention`` or BEiT's
``Attention`` is replaced by a layer that takes over its submodules and parameter names and calls
:func:`lamzoo.lam.lam_attention` where the host calls ``F.scaled_dot_product_attention``; with position keys,
``patch_embed`` gets a hook that notes the patch grid. A relative position bias is added to the scores after the mask.

Tables over key positions keep the length they were made with: under ``dynamic_img_size`` and after ``set_input_size``
they are resized in each forward pass, as timm resizes position embeddings under ``dynamic_img_size``.

Served are the hosts of these attentions: VisionTransformer (DeiT, DINOv2, CLIP, SigLIP, ViTamin, ...), its hybrids
behind a convolutional stem, Eva (EVA-02, RoPE-ViT, PE, DINOv3), BEiT, VisionTransformerRelPos, NaFlexVit, PiT,
MobileViT and the DeepSeek and Qwen3 encoders.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from timm.layers import (
    Attention,
    AttentionPool2d,
    AttentionPoolLatent,
    AttentionPoolPrr,
    AttentionRope,
    HybridEmbed,
    RelPosBiasTf,
    RelPosMlp,
    RotaryEmbeddingMixed,
    RotAttentionPool2d,
    apply_rot_embed_cat,
)
from timm.models.beit import Attention as BeitAttention
from timm.models.csatv2 import SpatialTransformerBlock
from timm.models.eva import EvaAttention
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn
from torch.nn import functional as F

from lamzoo.adapters.hosts import HostTakeover, SharedStateHook, Slot, TokenHost, replace_module
from lamzoo.errors import MaskShapeError, UnsupportedHostError
from lamzoo.lam import Lam, SharedState


class LamAttention(HostTakeover):
    """timm's ``Attention`` under a learnable mask."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Masked self-attention of ``x (B, N, C)``; arguments and result as timm's ``Attention``."""
        query, key, value = _split_heads(self, self.qkv(x))
        return _attend(self, x, self.q_norm(query), self.k_norm(key), value, attn_mask, is_causal)


class LamAttentionRope(HostTakeover):
    """timm's ``AttentionRope`` under a learnable mask."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Masked self-attention of ``x (B, N, C)``; arguments and result as timm's ``AttentionRope``."""
        if self.qkv is not None:
            query, key, value = _split_heads(self, self.qkv(x))
        else:
            query, key, value = _separate_projections(self, x)
        query, key = _rotate(self, self.q_norm(query), rope, value), _rotate(self, self.k_norm(key), rope, value)
        if self.num_kv_groups > 1:  # grouped-query attention: head h uses key head h // num_kv_groups
            key = key.repeat_interleave(self.num_kv_groups, dim=1)
            value = value.repeat_interleave(self.num_kv_groups, dim=1)
        return _attend(self, x, query, key, value, attn_mask, is_causal)


class LamEvaAttention(HostTakeover):
    """timm's ``EvaAttention`` under a learnable mask."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Masked self-attention of ``x (B, N, C)``; arguments and result as timm's ``EvaAttention``."""
        if self.qkv is None:
            query, key, value = _separate_projections(self, x)
        else:
            query, key, value = _split_heads(self, _biased_qkv(self, x))
        query, key = _rotate(self, self.q_norm(query), rope, value), _rotate(self, self.k_norm(key), rope, value)
        return _attend(self, x, query, key, value, attn_mask, is_causal)

    def reset_parameters(self) -> None:
        """Sets the biases to zero, as timm's does; called when weights are initialised anew."""
        if self.q_bias is not None:
            nn.init.zeros_(self.q_bias)
            nn.init.zeros_(self.v_bias)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Fills the buffer that checkpoints leave out; timm calls it after materialising a model from ``meta``."""
        if self.k_bias is not None:
            self.k_bias.zero_()


class LamBeitAttention(HostTakeover, BeitAttention):
    """BEiT's ``Attention`` under a learnable mask."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Masked self-attention of ``x (B, N, C)``; arguments and result as BEiT's ``Attention``."""
        query, key, value = _split_heads(self, _biased_qkv(self, x))
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own = self._get_rel_pos_bias()
            bias = own if bias is None else own + bias
        return self.proj_drop(self.proj(_attend_heads(self, x, query, key, value, bias=bias)))


class LamRelPosAttention(HostTakeover):
    """timm's ``RelPosAttention`` under a learnable mask."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """Masked self-attention of ``x (B, N, C)``; arguments and result as timm's ``RelPosAttention``."""
        query, key, value = _split_heads(self, self.qkv(x))
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        out = _attend_heads(self, x, self.q_norm(query), self.k_norm(key), value, bias=bias)
        return self.proj_drop(self.proj(out))


_TAKEOVERS: dict[type[nn.Module], type[HostTakeover]] = {
    Attention: LamAttention,
    AttentionRope: LamAttentionRope,
    EvaAttention: LamEvaAttention,
    BeitAttention: LamBeitAttention,
    RelPosAttention: LamRelPosAttention,
}

# They know of heads and yet attend with no token as query: pooling in front of the classifier, and positions.
_NO_SELF_ATTENTION = (
    AttentionPoolLatent,
    AttentionPoolPrr,
    AttentionPool2d,
    RotAttentionPool2d,
    RotaryEmbeddingMixed,
    RelPosMlp,
    RelPosBiasTf,
)

_WAY_OUT = (
    "it can't carry a learnable mask, only blocks with timm's "
    + ", ".join(cls.__name__ for cls in _TAKEOVERS if cls is not BeitAttention)
    + " or BEiT's Attention can."
)

# Where a block has its attention, and, of two layers a block, ParallelThingsBlock each of them.
_LAYER = re.compile(r"(?P<stack>.+?)\.\d+\.(attn|attns\.\d+\.attn)")


def token_host(model: nn.Module, stack: str) -> TokenHost | None:
    """Returns what is known of the tokens of a stack of timm's, if it is that of a ``VisionTransformer``."""
    host = model.get_submodule(stack.rpartition(".")[0])
    if not isinstance(host, VisionTransformer):
        return None
    return TokenHost(
        num_prefix_tokens=host.num_prefix_tokens,
        has_class_token=host.has_class_token,
        pool="attention" if host.attn_pool is not None else host.global_pool,
        num_unpooled=0 if host.pool_include_prefix else host.num_prefix_tokens,
        last=host.norm,
    )


def slots(model: nn.Module) -> Iterator[Slot]:
    """Yields the timm attention layers of a model, in order of the forward pass.

    Pooling heads, whose queries are learned and no tokens, have no mask.

    Raises:
        UnsupportedHostError: a timm model has an attention that takes no mask, or a block without the attention that
            the other blocks have; names it.
    """
    roots: list[str] = []
    for path, module in model.named_modules():
        if _is_timm(module) and not any(path.startswith(f"{root}.") or not root for root in roots):
            roots.append(path)
            yield from _slots_of(model, path, module)


def _slots_of(model: nn.Module, root_path: str, root: nn.Module) -> list[Slot]:
    found = []
    for path, module in root.named_modules(prefix=root_path):
        if type(module) in _TAKEOVERS:
            match = _LAYER.fullmatch(path)
            if match is None:
                where = path or "The model"
                raise UnsupportedHostError(f"{where} is an attention layer outside of any list of blocks; {_WAY_OUT}")
            found.append(_slot(model, path, match["stack"], module))
        elif _attends(module):
            what = f"{type(module).__name__} of {type(module).__module__}"
            raise UnsupportedHostError(f"{path or 'The model'} is a {what}; {_WAY_OUT}")
    if found:
        _check_complete(root_path, root, found)
    return found


def _is_timm(module: nn.Module) -> bool:
    return any(cls.__module__.startswith("timm.") for cls in type(module).__mro__)


def _attends(module: nn.Module) -> bool:
    if isinstance(module, SpatialTransformerBlock):  # CSATv2's, which has one head and doesn't say so
        return True
    return _is_timm(module) and hasattr(module, "num_heads") and not isinstance(module, _NO_SELF_ATTENTION)


def _check_complete(root_path: str, root: nn.Module, found: list[Slot]) -> None:
    """Makes sure that no block beside those found is left without a mask, but for those of a convolutional stem."""
    layers = [slot.path for slot in found]
    stacks = {slot.stack for slot in found}
    stems = tuple(
        f"{path}." for path, module in root.named_modules(prefix=root_path) if isinstance(module, HybridEmbed)
    )
    for path, module in root.named_modules(prefix=root_path):
        if path.startswith(stems):
            continue
        named_blocks = path.rpartition(".")[2] == "blocks" and isinstance(module, (nn.Sequential, nn.ModuleList))
        if path in stacks or named_blocks:
            for name, block in module.named_children():
                if not any(layer.startswith(f"{path}.{name}.") for layer in layers):
                    attn = getattr(block, "attn", None)
                    what = "without an `attn` of its own" if attn is None else f"with a {type(attn).__name__}"
                    raise UnsupportedHostError(f"{path}.{name} is a {type(block).__name__} {what}; {_WAY_OUT}")


def _slot(model: nn.Module, path: str, stack: str, attn: Any) -> Slot:
    host = model.get_submodule(stack.rpartition(".")[0])
    dim = (attn.qkv if attn.qkv is not None else attn.q_proj).in_features
    takeover = _TAKEOVERS[type(attn)]
    return Slot(
        path=path,
        stack=stack,
        query_dim=dim,
        key_dim=dim,
        num_heads=attn.num_heads,
        like=attn.proj.weight,
        attach=lambda lam: replace_module(model, path, takeover.take_over(attn, lam)),
        **_geometry(host),
    )


def _geometry(host: Any) -> dict[str, Any]:
    if isinstance(host, NaFlexVit):
        return {"no_positions": "each sample of a NaFlexVit has a patch grid of its own"}
    patch_embed: Any = getattr(host, "patch_embed", None)
    if not hasattr(patch_embed, "dynamic_feat_size"):
        return {"no_positions": f"a {type(host).__name__} doesn't tell the patch grid of its tokens"}
    if getattr(getattr(host, "patch_drop", None), "prob", 0.0) > 0:
        return {"no_positions": "patch_drop_rate > 0 removes patches in training, and their positions with them"}
    grid = tuple(patch_embed.grid_size)
    return {
        "grid": grid,
        "num_prefix_tokens": host.num_prefix_tokens,
        "length": host.num_prefix_tokens + grid[0] * grid[1],
        "watch_grid": partial(_watch_grid, patch_embed),
    }


class _NoteGrid(SharedStateHook):
    """Forward pre-hook of ``patch_embed``: begins a pass with the patch grid of the image at hand."""

    def __call__(self, patch_embed: Any, args: tuple[Tensor, ...]) -> None:
        if not isinstance(args[0], Tensor):  # a symbolic trace, whose image has the model's own size
            return
        rows, columns = patch_embed.dynamic_feat_size(args[0].shape[-2:])
        self.shared.begin(grid=(rows, columns))


def _watch_grid(patch_embed: nn.Module, shared: SharedState) -> None:
    patch_embed.register_forward_pre_hook(_NoteGrid(shared))


def _attend(
    attn: Any, x: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool
) -> Tensor:
    if attn_mask is not None and attn_mask.ndim == 3:
        raise MaskShapeError(
            f"attn_mask has shape {tuple(attn_mask.shape)}, which timm reads as one mask a head; "
            "pass (B, 1, N, N) for one a sample or (1, H, N, N) for one a head."
        )
    boolean = attn_mask is not None and attn_mask.dtype == torch.bool
    allowed, bias = (attn_mask, None) if boolean else (None, attn_mask)
    out = attn.norm(_attend_heads(attn, x, query, key, value, allowed=allowed, bias=bias, is_causal=is_causal))
    if attn.gate is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out))


def _attend_heads(
    attn: Any,
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    lam: Lam = attn.lam
    dropout_p = attn.attn_drop.p if attn.training else 0.0
    out = lam.attend(
        x, x, query, key, value,
        allowed=allowed, bias=bias, is_causal=is_causal, dropout_p=dropout_p, scale=attn.scale,
    )  # fmt: skip
    return out.transpose(1, 2).flatten(2)


def _split_heads(attn: Any, qkv: Tensor) -> tuple[Tensor, ...]:
    return qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _biased_qkv(attn: Any, x: Tensor) -> Any:
    if attn.q_bias is None:
        return attn.qkv(x)
    bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    return attn.qkv(x) + bias if attn.qkv_bias_separate else F.linear(x, attn.qkv.weight, bias)


def _separate_projections(attn: Any, x: Tensor) -> list[Tensor]:
    projections = (attn.q_proj, attn.k_proj, attn.v_proj)
    # The head dim is fixed and the number of heads isn't: grouped-query attention has fewer for keys and values.
    return [projection(x).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for projection in projections]


def _rotate(attn: Any, x: Tensor, rope: Tensor | None, like: Tensor) -> Tensor:
    if rope is None:
        return x
    prefix, patches = x[:, :, : attn.num_prefix_tokens], x[:, :, attn.num_prefix_tokens :]
    return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=attn.rotate_half)], dim=2).type_as(like)
