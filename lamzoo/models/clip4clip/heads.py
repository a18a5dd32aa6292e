"""CLIP4Clip's three heads, which compare a text with the frames of a video (arXiv 2104.08860, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock, Transformer
from torch import Tensor, nn
from torch.nn import functional as F

from lamzoo.lam.masks import ModalityBias
from lamzoo.reduction.matching import full_precision

_HEAD_WIDTH = 64  # of an attention head, as in CLIP's towers


class MeanHead(nn.Module):
    """The mean of the normalised frame embeddings ("parameter-free", section 3.3.1)."""

    length = None

    def forward(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """Returns the video embeddings ``(B, D)`` of frames ``(B, F, D)`` and their mask ``(B, F)``, bool."""
        return mean_of_frames(frames, frame_mask)


class SequentialHead(nn.Module):
    """A transformer over the frames with positions and a residual, then the mean ("sequential type", section 3.3.2).

    Args:
        width: width of the embeddings.
        max_frames: number of positions.
        layers: layers of the transformer.
        mlp_ratio: hidden width of its MLPs, relative to ``width``.
        activation: activation of its MLPs.
    """

    def __init__(self, width: int, max_frames: int, layers: int, mlp_ratio: float, activation: type[nn.Module]) -> None:
        super().__init__()
        self.length = max_frames
        self.embedding = nn.Parameter(torch.empty(max_frames, width))
        self.transformer = _transformer(width, layers, mlp_ratio, activation)
        _initialise(self.transformer, self.embedding)

    def forward(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """Returns video embeddings ``(B, D)`` for up to ``max_frames`` frames ``(B, F, D)`` and a mask ``(B, F)``."""
        tokens = frames + self.embedding[: frames.shape[1]].to(frames.dtype)
        tokens = self.transformer(tokens, attn_mask=_padding_bias(frame_mask, self.transformer, tokens.dtype))
        return mean_of_frames(frames + tokens, frame_mask)


class TightHead(nn.Module):
    """A transformer over the text's embedding and the frames together ("tight type", section 3.3.3).

    Beyond the paper, the words of the text may follow its embedding, and the patches of a frame that frame's. All
    tokens are then normalised first, as in CLIP's vision tower, because their lengths differ with their origin.

    Args:
        width: as for :class:`SequentialHead`, like the next four.
        max_frames: maximum number of frames.
        layers: layers of the transformer.
        mlp_ratio: hidden width of its MLPs.
        activation: activation of its MLPs.
        words: number of words, padding included, and the width of their states; zeros for none.
        patches: number of patches of a frame, and the width of their states; zeros for none.
        modality_bias: add a learned number to the scores of each layer and head for each pair of modalities, text and
            video: the control for masks.

    Attributes:
        modality_lengths: number of tokens of a text; those of the video follow.
        max_pairs: text-video pairs that are compared at a time without gradients; bounds memory.
    """

    def __init__(
        self,
        width: int,
        max_frames: int,
        layers: int,
        mlp_ratio: float,
        activation: type[nn.Module],
        words: tuple[int, int] = (0, 0),
        patches: tuple[int, int] = (0, 0),
        modality_bias: bool = False,
    ) -> None:
        super().__init__()
        self.length = 1 + words[0] + max_frames * (1 + patches[0])
        self.modality_lengths = (1 + words[0],)
        self.max_pairs = 4096
        if words[0]:
            self.word_projection = nn.Linear(words[1], width)
        if patches[0]:
            self.patch_projection = nn.Linear(patches[1], width)
        if words[0] or patches[0]:
            self.max_pairs = max(1, 4096 * 13 // self.length)  # as many tokens as with 12 frames
        self.norm_pre = nn.LayerNorm(width) if words[0] or patches[0] else nn.Identity()
        self.embedding = nn.Parameter(torch.empty(self.length, width))
        self.embedding_type = nn.Parameter(torch.empty(2, width))  # of the text, of frames
        self.transformer = _transformer(width, layers, mlp_ratio, activation)
        self.transformer.resblocks[-1].__class__ = FirstTokenBlock  # a new block would draw other initial weights
        if modality_bias:
            for block in self.transformer.resblocks:
                block.modality = ModalityBias(block.attn.num_heads, self.modality_lengths)
                block.register_forward_pre_hook(_add_modality_bias, with_kwargs=True)
        self.norm = nn.LayerNorm(width)
        self.pooler = nn.Linear(width, width)
        self.activation = activation()
        self.score = nn.Linear(width, 1)
        _initialise(self.transformer, self.embedding, self.embedding_type)

    def forward(self, text: Tensor, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """Returns the logits of every text with every video.

        Args:
            text: ``(T, D)``, or with words ``(T, 1 + W, D)``, zeros for padding.
            frames: ``(V, F, D)``, or with patches ``(V, F, 1 + P, D)``.
            frame_mask: ``(V, F)``, bool.

        Returns:
            ``(T, V)``, float32.
        """
        if torch.is_grad_enabled():
            return self._compare(text, frames, frame_mask)
        rows = []
        for some in text.split(max(1, self.max_pairs // len(frames))):
            blocks = zip(frames.split(self.max_pairs), frame_mask.split(self.max_pairs), strict=True)
            rows.append(torch.cat([self._compare(some, *block) for block in blocks], dim=1))
        return torch.cat(rows)

    def match(self, text: Tensor, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """Returns the logits ``(P,)`` of pairs of a text and a video, of the shapes of :meth:`forward`."""
        if torch.is_grad_enabled() or len(text) <= self.max_pairs:
            return self._match(text, frames, frame_mask)
        parts = (each.split(self.max_pairs) for each in (text, frames, frame_mask))
        return torch.cat([self._match(*part) for part in zip(*parts, strict=True)])

    def _compare(self, text: Tensor, frames: Tensor, frame_mask: Tensor) -> Tensor:
        pairs = len(text), len(frames)
        every = (
            text[:, None].expand(*pairs, *text.shape[1:]),
            frames.expand(len(text), *frames.shape),
            frame_mask.expand(len(text), *frame_mask.shape),
        )
        return self._match(*(each.flatten(0, 1) for each in every)).view(pairs)

    def _match(self, text: Tensor, frames: Tensor, frame_mask: Tensor) -> Tensor:
        if text.ndim == 2:
            text = text[:, None]
        if frames.ndim == 4:
            frame_mask = frame_mask.repeat_interleave(frames.shape[2], dim=1)
            frames = frames.flatten(1, 2)
        tokens = torch.cat([text + self.embedding_type[0], frames + self.embedding_type[1]], dim=1)
        tokens = self.norm_pre(tokens + self.embedding[: tokens.shape[1]])
        words = F.pad(text[:, 1:].any(dim=-1), (1, 0), value=True)
        seen = torch.cat([words, frame_mask], dim=1)
        tokens = self.transformer(tokens, attn_mask=_padding_bias(seen, self.transformer, tokens.dtype))
        pooled = self.activation(self.pooler(self.norm(tokens[:, 0])))
        with full_precision(pooled.device):
            scores = F.linear(pooled.float(), self.score.weight.float(), self.score.bias.float())
        return scores[:, 0]


class FirstTokenBlock(ResidualAttentionBlock):
    """open_clip's residual attention block, which computes only the first token.

    The others are computed as well for a mask that all layers share, and for a recorder of masks.
    """

    def forward(
        self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """Self-attention and MLP of ``q_x (B, N, C)``.

        Args:
            q_x: the tokens.
            k_x: not read, as in a block without cross-attention; nor is ``v_x``.
            v_x: likewise.
            attn_mask: ``(B * heads, N, N)`` or ``(N, N)``, float, added to the scores.

        Returns:
            The first token ``(B, 1, C)``, or all of them.
        """
        records = getattr(getattr(self.attn, "lam", None), "recorder", None) is not None
        if attn_mask is None or self.shares_mask or records:
            return super().forward(q_x, attn_mask=attn_mask)
        tokens = self.ln_1(q_x)
        first = q_x[:, :1] + self.ls_1(self.attention(tokens[:, :1], tokens, tokens, attn_mask[..., :1, :]))
        return first + self.ls_2(self.mlp(self.ln_2(first)))

    @property
    def shares_mask(self) -> bool:
        """Whether the block attends under the mask of an earlier one."""
        lam = getattr(self.attn, "lam", None)
        return lam is not None and lam.network is None


def _add_modality_bias(
    block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Adds the bias to the scores' bias ``(B * heads, N, N)``, an argument of open_clip's blocks."""
    given = dict(zip(("q_x", "k_x", "v_x", "attn_mask"), args, strict=False)) | kwargs  # by position when checkpointed
    length, scores = given["q_x"].shape[1], given["attn_mask"]
    bias = (block.modality.left(length) @ block.modality.right(length).transpose(-2, -1)).to(scores.dtype)
    given["attn_mask"] = scores + bias[0].repeat(len(scores) // bias.shape[1], 1, 1)
    return (), given


def _transformer(width: int, layers: int, mlp_ratio: float, activation: type[nn.Module]) -> Transformer:
    return Transformer(width, layers, max(1, width // _HEAD_WIDTH), mlp_ratio, act_layer=activation)


def _initialise(transformer: Transformer, *embeddings: nn.Parameter) -> None:
    """Initialises the weights as CLIP's text tower: the more layers, the smaller the outputs of residual branches."""
    for embedding in embeddings:
        nn.init.normal_(embedding, std=0.01)
    width, layers = transformer.width, transformer.layers
    for block in transformer.resblocks:
        nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
        nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)


def mean_of_frames(frames: Tensor, frame_mask: Tensor) -> Tensor:
    """Returns the means ``(B, D)`` of the normalised frames of ``(B, F, D)`` that a mask ``(B, F)``, bool, allows."""
    weights = frame_mask[..., None].to(frames.dtype)
    # masked_fill, since 0 * nan of a missing frame is nan
    units = F.normalize(frames, dim=-1).masked_fill(~frame_mask[..., None], 0.0)
    return units.sum(dim=1) / weights.sum(dim=1)


def _padding_bias(allowed: Tensor, transformer: Transformer, dtype: torch.dtype) -> Tensor:
    """Converts a mask ``(B, N)``, bool, to the bias of the scores in open_clip's blocks, ``(B * heads, N, N)``."""
    # open_clip 3.3 casts a boolean mask to ones and zeros and adds them.
    heads, tokens = transformer.resblocks[0].attn.num_heads, allowed.shape[1]
    bias = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, float("-inf"))
    return bias[:, None, None].expand(-1, heads, tokens, -1).flatten(0, 1)


def initial_state(head: Any, clip: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the initial state of a head for pretrained towers: the text tower's first layers and positions, if any.

    Args:
        head: one of the three.
        clip: weights of the towers.
    """
    if head.length is None:
        return {}
    state = {key: value.clone() for key, value in head.state_dict().items() if ".lam." not in key}
    shared = {key: value for key, value in state.items() if ".modality." not in key}  # CLIP has no such bias
    return state | _text_layers(shared, clip, head.length)


def _text_layers(own: Mapping[str, Tensor], clip: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """Returns the weights of CLIP's text tower that fit a head: all layers, or nothing if the widths differ."""
    prefix = "text." if any(key.startswith("text.") for key in clip) else ""
    wanted = {key: f"{prefix}{key}" for key in own if key.startswith("transformer.")}
    if any(theirs not in clip or clip[theirs].shape != own[key].shape for key, theirs in wanted.items()):
        return {}
    taken = {key: clip[theirs] for key, theirs in wanted.items()}
    positions = clip.get(f"{prefix}positional_embedding")
    if positions is not None and len(positions) >= length and positions.shape[1:] == own["embedding"].shape[1:]:
        taken["embedding"] = positions[:length]
    return taken
