"""What masked attention layers of timm's models with stages share: their sites, their layouts, and how they attend."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from torch import Tensor, nn

from lamzoo.adapters.hosts import AttentionSite, HostTakeover, TokenLayout, input_width
from lamzoo.adapters.timm_layers import attend_heads
from lamzoo.lam import Lam


class StagedTakeover(HostTakeover):
    """Base of masked layers in models whose layers differ in width, heads or number of tokens.

    Layers at the same place of consecutive blocks form a stack where their masks have the same shape; with
    ``layers="single"``, the layers of a stack share one mask.

    Attributes:
        place: of a layer: the list of blocks, the number of the block, and the path of the layer in the block.
        no_sharing: the reason why layers of a stack can't share a mask; None if they can.
    """

    place: ClassVar[re.Pattern[str]] = re.compile(r"(?P<stack>.+)\.(?P<index>\d+)(?P<name>(\.[a-z_]\w*)+(\.\d+)?)")
    no_sharing: ClassVar[str | None] = None

    @classmethod
    def widths(cls, attn: Any) -> tuple[int, int]:
        """Returns the widths of the query tokens and of the key tokens."""
        width = input_width(attn.qkv)
        return width, width

    @classmethod
    def num_heads_of(cls, attn: Any) -> int:
        """Returns the number of attention heads."""
        return int(getattr(attn, "num_heads", 1))

    @classmethod
    def reduction(cls, attn: Any) -> object:
        """Returns what the numbers of queries and keys depend on besides the place of the layer."""
        return None

    @classmethod
    def fixed_length(cls, attn: Any, host: Any) -> int | None:
        """Returns the number of keys where it is fixed; ``host`` is the module that holds the list of blocks."""
        return None

    @classmethod
    def site(cls, path: str, attn: nn.Module) -> AttentionSite:
        """Describes a layer of the host's class in a block at a path of the model."""
        block, index, name = cls._parts(path)
        query_dim, key_dim = cls.widths(attn)
        heads = cls.num_heads_of(attn)
        return AttentionSite(
            path=path,
            stack=f"{block}.*{name} {(cls.__name__, query_dim, key_dim, heads, cls.reduction(attn))}",
            query_dim=query_dim,
            key_dim=key_dim,
            num_heads=heads,
            watched=f"{block}.{index}",
        )

    @classmethod
    def layout(cls, model: nn.Module, path: str) -> TokenLayout:
        """Returns the layout of the key tokens of a layer, with a mask or without."""
        host = model.get_submodule(cls._parts(path)[0].rpartition(".")[0])
        length = cls.fixed_length(model.get_submodule(path), host)
        return TokenLayout(
            length=length,
            no_positions="its number of keys changes with the size of the image" if length is None else None,
            no_sharing=cls.no_sharing,
        )

    @classmethod
    def _parts(cls, path: str) -> tuple[str, str, str]:
        match = cls.place.fullmatch(path)
        assert match is not None, path
        return match["stack"], match["index"], match["name"]

    def attend_tokens(
        self,
        query_tokens: Tensor,
        key_tokens: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        bias: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Attends under the mask.

        Args:
            query_tokens: ``(B, Nq, query_dim)``.
            key_tokens: ``(B, Nk, key_dim)``.
            query: ``(B, H, Nq, d)``.
            key: ``(B, H, Nk, d)``.
            value: ``(B, H, Nk, dv)``.
            bias: broadcastable to ``(B, H, Nq, Nk)``, added to the scores after the mask.
            scale: of the scores; that of the host by default.

        Returns:
            ``(B, Nq, H dv)``.
        """
        return attend_heads(self, query_tokens, key_tokens, query, key, value, bias=bias, scale=scale)

    def masked_weights(self, query_tokens: Tensor, key_tokens: Tensor, scores: Tensor) -> Tensor:
        """Returns the softmax of ``scores (B, H, Nq, Nk)`` under the mask, for hosts that change the weights after it.

        No kernel computes these, so that the dense mask is built. Records have no scores.
        """
        lam = self.lam
        assert isinstance(lam, Lam)
        mask = lam(query_tokens, key_tokens)
        weights = lam.config.mask_op.apply(scores, mask.dense().to(scores.dtype)).softmax(dim=-1)
        lam.record(mask, weights, None)
        return weights


def to_tokens(x: Tensor) -> Tensor:
    """Returns the tokens ``(B, N, C)`` of a feature map ``(B, C, rows, columns)``."""
    return x.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """Returns the feature map ``(B, C, rows, columns)`` of tokens ``(B, N, C)``, of the height and width of another."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[-2:])
