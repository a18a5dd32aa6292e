"""States of CLIP's towers before their projection: the pooled one first, then those of patches or words."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer, text_global_pool
from torch import Tensor, nn
from torch.nn import functional as F

from lamzoo.errors import ConfigError, class_name

_TEXT = (HFTextEncoder, TextTransformer)


def prefixes_of(clip: Any, tower: str) -> tuple[str, ...]:
    """Returns how the names of a tower's parameters begin in a model of open_clip, without its fresh projection.

    The projection of an open_clip tower is part of it; that of a model of timm or transformers is not.

    Args:
        clip: the model.
        tower: ``"vision"`` or ``"text"``.
    """
    if tower == "vision":
        return ("visual.trunk.",) if _is_timms(clip.visual) else ("visual.",)
    if isinstance(clip, CLIP):
        return ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
    return ("text.transformer.",) if isinstance(clip.text, HFTextEncoder) else ("text.",)


def check_freezable(clip: Any, tower: str) -> None:
    """Raises a :class:`ConfigError` if a tower pools by layers that are initialised with the head."""
    if tower == "vision" and isinstance(clip.visual, TimmModel) and not _is_timms(clip.visual):
        raise ConfigError(
            "The vision tower pools with new layers of open_clip (timm_pool), which have to be trained; use "
            "timm_pool='avg' or 'token', or don't freeze it."
        )


def check_vision(visual: nn.Module, grid: int) -> None:
    """Raises a :class:`ConfigError` if a vision tower gives no states of patches."""
    attends = getattr(visual, "attn_pool", None) is not None
    if not (isinstance(visual, VisionTransformer) or _is_timms(visual)) or attends:
        raise ConfigError(
            f"patch_grid is {grid}, and the vision tower ({class_name(visual)}) gives no states of patches; use a "
            "vision transformer of timm or open_clip, or patch_grid=0."
        )


def vision_width(visual: Any) -> int:
    """Returns the width of the states of a vision tower."""
    if isinstance(visual, TimmModel):
        return int(visual.trunk.num_features)
    return int(visual.transformer.width)


def vision_states(visual: Any, images: Tensor, grid: int) -> Tensor:
    """Returns the states of images before the projection of their tower.

    Args:
        visual: the vision tower of a model of open_clip; without patches, any.
        images: ``(B, 3, H, W)``, float.
        grid: the patches are averaged over ``grid`` by ``grid`` equal areas; 0 for none.

    Returns:
        ``(B, 1 + grid ** 2, C)``: the pooled state, then those of the patches, row by row. A tower of another kind
        than timm's models and open_clip's vision transformers is taken with its projection.

    Raises:
        ConfigError: the tower has merged or pruned the patches, so that they form no grid.
    """
    if _is_timms(visual) and not grid:
        return visual.trunk(images)[:, None]  # by its own forward pass, in which merged tokens are pooled
    if _is_timms(visual):
        tokens = visual.trunk.forward_features(images)
        pooled = visual.trunk.forward_head(tokens)
        patches: Tensor | None = _timm_patches(visual.trunk, tokens)
    elif isinstance(visual, VisionTransformer):
        pooled, tokens = visual._pool(visual.transformer(visual._embeds(images)))
        patches = _as_grid(tokens, *visual.grid_size) if grid else None
    else:
        return visual(images)[:, None]
    if patches is None:
        return pooled[:, None]
    pooled_patches = F.adaptive_avg_pool2d(patches, grid).flatten(2).transpose(1, 2)
    return torch.cat([pooled[:, None], pooled_patches.to(pooled.dtype)], dim=1)


def embed_vision(visual: Any, pooled: Tensor) -> Tensor:
    """Projects the pooled states ``(..., C)`` of :func:`vision_states` to the embeddings ``(..., D)`` of the tower."""
    if _is_timms(visual):
        return visual.head(pooled)
    if isinstance(visual, VisionTransformer) and visual.proj is not None:
        return pooled @ visual.proj
    return pooled


def gives_words(clip: Any) -> bool:
    """Returns whether the text tower of a model of open_clip gives states of words."""
    return isinstance(clip, CLIP) or isinstance(clip.text, _TEXT)


def check_text(clip: Any) -> None:
    """Raises a :class:`ConfigError` if the text tower of a model gives no states of words."""
    if not gives_words(clip):
        raise ConfigError(
            f"The text tower ({class_name(clip.text)}) gives no states of words; use one of transformers or open_clip, "
            "or words=False."
        )


def text_width(clip: Any) -> int:
    """Returns the width of the states of a text tower."""
    if not isinstance(clip, CLIP) and isinstance(clip.text, HFTextEncoder):
        return int(clip.text.config.hidden_size)
    tower = clip if isinstance(clip, CLIP) else clip.text
    return int(tower.transformer.width)


def text_states(clip: Any, text: Tensor, words: bool) -> Tensor:
    """Returns the states of texts before the projection of their tower.

    Args:
        clip: a model of open_clip; its text tower is one of transformers or open_clip.
        text: token ids ``(B, L)``, int64.
        words: with the states of the words.

    Returns:
        ``(B, 1 + L, C)``, or ``(B, 1, C)`` without words: the pooled state, then those of the words, with zeros for
        padding.
    """
    tower = clip if isinstance(clip, CLIP) else clip.text
    if isinstance(tower, HFTextEncoder):
        seen = text != tower.config.pad_token_id
        outputs = tower.transformer(input_ids=text, attention_mask=seen.long())
        pooled, states = tower.pooler(outputs, seen.long()), outputs.last_hidden_state
    elif isinstance(tower, (CLIP, TextTransformer)):
        kind, end, pad = _pooling(tower)
        if isinstance(tower, CLIP):
            dtype = tower.transformer.get_cast_dtype()
            states = tower.token_embedding(text).to(dtype) + tower.positional_embedding.to(dtype)
            states = tower.ln_final(tower.transformer(states, attn_mask=tower.attn_mask))
            pooled = text_global_pool(states, text, kind, eos_token_id=end)
        else:
            states, mask = tower._embeds(text)
            states = tower.transformer(states, attn_mask=mask)
            if tower.cls_emb is not None:
                pooled, states = tower.ln_final(states[:, -1]), states[:, :-1]
            else:
                states = tower.ln_final(states)
                pooled = text_global_pool(states, text, kind, eos_token_id=end)
        seen = text != pad
        if kind == "argmax":
            seen = torch.arange(text.shape[1], device=text.device) <= text.argmax(dim=-1, keepdim=True)
    else:
        return tower(text)[:, None]
    if not words:
        return pooled[:, None]
    return torch.cat([pooled[:, None], states.masked_fill(~seen[..., None], 0.0)], dim=1)


def embed_text(clip: Any, pooled: Tensor) -> Tensor:
    """Projects the pooled states ``(..., C)`` of :func:`text_states` to the embeddings ``(..., D)`` of the tower."""
    tower = clip if isinstance(clip, CLIP) else clip.text
    if isinstance(tower, HFTextEncoder):
        return tower.proj(pooled)
    projection = getattr(tower, "text_projection", None) if isinstance(tower, (CLIP, TextTransformer)) else None
    if projection is None:
        return pooled
    return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection


def _is_timms(visual: nn.Module) -> bool:
    """Returns whether a tower is a model of timm that pools its tokens itself."""
    return isinstance(visual, TimmModel) and "pool" not in dict(visual.head.named_children())


def _pooling(tower: Any) -> tuple[str, int | None, int]:
    """Returns the pooling of a text tower of open_clip, its end token and its padding token."""
    if isinstance(tower, CLIP):
        return tower.text_pool_type, getattr(tower, "text_eos_id", None), 0
    return tower.pool_type, getattr(tower, "eos_id", None), tower.pad_id


def _timm_patches(trunk: Any, tokens: Tensor) -> Tensor:
    """Returns the last features of a model of timm as ``(B, C, H, W)``."""
    if tokens.ndim == 4:
        return tokens.permute(0, 3, 1, 2) if getattr(trunk, "output_fmt", "NCHW") == "NHWC" else tokens
    rows, columns = trunk.patch_embed.grid_size
    return _as_grid(tokens[:, getattr(trunk, "num_prefix_tokens", 0) :], rows, columns)


def _as_grid(patches: Tensor, rows: int, columns: int) -> Tensor:
    if patches.shape[1] != rows * columns:
        raise ConfigError(
            f"The vision tower gives {patches.shape[1]} patches, which form no grid of {rows} x {columns}; call "
            "lamzoo.remove_reduction(model), or build the model with patch_grid=0."
        )
    return patches.transpose(1, 2).unflatten(2, (rows, columns))
