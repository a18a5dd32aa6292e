"""The learnable mask of one attention layer, and masked attention with it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol, TypedDict, Unpack

import torch
from torch import Tensor

from lamzoo.errors import ConfigError
from lamzoo.lam.attention import check_inputs, lam_attention
from lamzoo.lam.config import LamConfig
from lamzoo.lam.kernels.eager import attention_weights, merge_allowed
from lamzoo.lam.masks import FactoredMask, MaskNetwork
from lamzoo.lam.ops import Op
from lamzoo.lam.passes import Layer, SharedState, StackPass
from lamzoo.lam.resize import Grid

_HIDDEN = -1e4  # a bias up to it hides a key: BERT's own, -1e9 and the least number of every dtype do


def lets_attend(mask: Tensor) -> Tensor:
    """Returns where a mask lets attention go, bool of its shape; the mask is bool itself or added to the scores."""
    return mask if mask.dtype == torch.bool else mask > _HIDDEN


@dataclass(frozen=True)
class Scores:
    """The attention scores of a layer before its mask, as their factors: ``query @ key.T * scale + bias``.

    Attributes:
        query: ``(B, H, Nq, d)``, detached, as are the other tensors.
        key: ``(B, H, Nk, d)``.
        scale: of the products.
        bias: float, broadcastable to ``(B, H, Nq, Nk)``, added after the mask; None without one. In a model with merged
            tokens it includes the logarithm of the sizes of the keys.
        allowed: bool, likewise, True where attention may go, causality included; None where it may go everywhere.
    """

    query: Tensor
    key: Tensor
    scale: float
    bias: Tensor | None = None
    allowed: Tensor | None = None

    def attention(self) -> Tensor:
        """Computes the attention weights without the mask, ``(B, H, Nq, Nk)``."""
        zero = self.query.new_zeros(1, 1, 1, 1)
        mask = FactoredMask(zero.expand(1, 1, self.query.shape[2], 1), zero.expand(1, 1, self.key.shape[2], 1))
        return attention_weights(
            self.query, self.key, mask, op="add", allowed=self.allowed, bias=self.bias, is_causal=False,
            scale=self.scale,
        )  # fmt: skip

    def seen_keys(self) -> Tensor | None:
        """Returns which keys some query may attend to, bool ``(B, Nk)``; None for all. Padding is hidden from all."""
        seen = self.allowed
        if self.bias is not None:
            shown = lets_attend(self.bias)
            seen = shown if seen is None else seen & shown
        return None if seen is None else seen.expand(*self.query.shape[:3], self.key.shape[2]).any(dim=2).any(dim=1)


@dataclass
class MaskRecord:
    """What one attention layer computed in one forward pass.

    Attributes:
        mask: the factors of M, detached.
        attention: softmax weights under the mask, ``(B, H, Nq, Nk)``, detached.
        importance: mean mask value of each key, ``(B, Hm, Nk)``, detached; in self-attention over the queries that
            aren't padding.
        key_places: of each token of the stack's input, the key that it is part of, int64 ``(B, N)``, where earlier
            layers have merged or pruned tokens; -1 for pruned ones. None where the keys are all tokens.
        query_places: likewise for the queries, of which there are fewer where tokens merge in this layer; in the last
            layer under a class token, that token may be the only one.
        op: how the mask acts on the scores.
        scores: what the mask modulated; None where a layer attends to its tokens part by part, as some of transformers.
    """

    mask: FactoredMask
    attention: Tensor
    importance: Tensor
    key_places: Tensor | None = None
    query_places: Tensor | None = None
    op: Op = "add"
    scores: Scores | None = None

    @property
    def num_tokens(self) -> tuple[int, int]:
        """Numbers of the stack's input tokens that the queries and the keys are made of."""
        queries, keys = (
            factor.shape[2] if places is None else places.shape[1]
            for factor, places in zip(self.mask, (self.query_places, self.key_places), strict=True)
        )
        return queries, keys


class AttentionOptions(TypedDict, total=False):
    """Options of masked attention that a host may set; see :func:`lamzoo.lam.lam_attention`."""

    allowed: Tensor | None
    bias: Tensor | None
    is_causal: bool
    dropout_p: float
    scale: float | None


class AttentionHook(Protocol):
    """Replaces the attention of a layer and may call the original, as token reduction does.

    A hook whose attribute ``fusible`` is true does no more than to count keys by their sizes, which the fused form does
    as well; with another hook, a layer doesn't take that form.

    Args:
        attention: the layer's attention, called as :func:`lamzoo.lam.lam_attention`.
        begun: state of the forward pass before the layer computed its mask.
        query: ``(B, H, Nq, d)``.
        key: ``(B, H, Nk, d)``.
        value: ``(B, H, Nk, dv)``.
        mask: of the layer.
        op: how the mask acts.
        **options: those of the host.

    Returns:
        ``(B, H, Nq, dv)``.
    """

    def __call__(
        self,
        attention: Callable[..., Tensor],
        begun: StackPass,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: FactoredMask,
        *,
        op: Op,
        **options: Unpack[AttentionOptions],
    ) -> Tensor: ...


class Lam(Layer):
    """The learnable attention mask of one layer.

    Args:
        config: of the mask.
        network: this layer's mask network; ``None`` for a layer that uses the first layer's mask
            (``layers="single"``).
        shared: state of the stack that the layer belongs to.
        is_last: whether the stack ends here. A layer also becomes the last one when all layers after it that joined
            ``shared`` are removed from the model (``prune_intermediate_layers``).

    Attributes:
        is_fresh: whether the mask was initialised and no state dict has been loaded into it since.
        backend: of the attention; see :func:`lamzoo.lam.lam_attention`.
        recorder: called with a :class:`MaskRecord` in each forward pass, if set.
        attention_hook: replaces the attention, if set.
    """

    def __init__(
        self, config: LamConfig, network: MaskNetwork | None, shared: SharedState, is_last: bool = False
    ) -> None:
        super().__init__(shared, is_last)
        self.config = config
        self.network = network
        self.is_fresh = True
        self.backend = "auto"
        self.recorder: Callable[[MaskRecord], None] | None = None
        self.attention_hook: AttentionHook | None = None

    def forward(
        self, query_tokens: Tensor, key_tokens: Tensor, present: Tensor | None = None, grid: Grid | None = None
    ) -> FactoredMask:
        """Computes the mask of these tokens.

        Args:
            query_tokens: ``(B, Nq, C)``.
            key_tokens: ``(B, Nk, C)``; the same tensor in self-attention.
            present: bool ``(B, Nk)``, False for padding, which has no position; None without padding.
            grid: ``(rows, columns)`` of the keys, for hosts whose layers know them, such as those that attend within
                windows; by default that of the forward pass of the stack.

        Returns:
            Factors ``(B, Hm, Nq, R)`` and ``(B | 1, Hm, Nk, R)`` with ``R = config.columns``.

        Raises:
            ConfigError: the layer shares the first layer's mask, and the first layer has not run.
        """
        here = self.shared.current
        if self.network is None:
            mask = self.shared_mask()
        else:
            right = None if here.merge is None else here.merge.right
            if right is None:
                right = self.network.right(key_tokens, grid or here.grid, here.token_map, present)
            left = self.network.left(query_tokens)
            mask = FactoredMask(left, right.to(left.dtype))
            if self.gives_mask:
                self.shared.update(mask=mask)
        if self.is_last and not here.held:
            self.shared.end()
        return mask

    def shared_mask(self) -> FactoredMask:
        """Returns the mask of the first layer, with ``layers="single"``.

        Raises:
            ConfigError: the first layer has not run.
        """
        mask = self.shared.current.mask
        if mask is None:
            raise ConfigError(
                "A layer with layers='single' has no mask to share, because the stack did not run from its first "
                "masked layer on; run it from there, or use layers='multi'."
            )
        return mask

    @property
    def gives_mask(self) -> bool:
        """Whether the layers that follow share this layer's mask, with ``layers="single"``."""
        return self.config.layers == "single" and self.network is not None and not self.is_last

    def key_factor(self, key_tokens: Tensor) -> Tensor:
        """Computes the key side of the mask of these tokens ``(B, N, C)`` alone, ``(1 | B, Hm, N, columns)``."""
        here = self.shared.current
        if here.mask is not None:
            return here.mask.right
        assert self.network is not None
        return self.network.right(key_tokens, here.grid, here.token_map)

    @property
    def has_positions(self) -> bool:
        """Whether the mask has a table over key positions."""
        return self.config.has_positions

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
        **options: Unpack[AttentionOptions],
    ) -> Tensor:
        """Attention under this layer's mask: ``softmax(scores * M) @ value``, or ``scores + M`` with ``op="add"``.

        While a recorder is set (see :func:`lamzoo.capture_masks`) the eager backend is used, because fused attention
        returns no weights.

        Args:
            query_tokens: as in :meth:`forward`, like ``key_tokens``, ``present`` and ``grid``.
            key_tokens: likewise.
            query: as in :func:`lamzoo.lam.lam_attention`, like ``key``, ``value`` and the options.
            key: likewise.
            value: likewise.
            present: likewise.
            grid: likewise.
            **options: likewise.

        Returns:
            ``(B, H, Nq, dv)``, the dtype of ``query``.
        """
        if self.recorder is not None:
            return self.attend_with_weights(
                query_tokens, key_tokens, query, key, value, present=present, grid=grid, **options
            )[0]  # fmt: skip
        attention = self._hooked(partial(lam_attention, backend=self.backend))
        mask = self(query_tokens, key_tokens, present, grid)
        return attention(query, key, value, mask, op=self.config.op, **options)

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
        """As :meth:`attend`, by the eager backend, with the attention weights.

        Returns:
            The output ``(B, H, Nq, dv)``, in the dtype of ``query``, and the weights ``(B, H, Nq, Nk)`` that made it,
            after dropout.
        """
        eager = EagerAttention()
        attention, begun = self._hooked(eager), self.shared.current
        mask = self(query_tokens, key_tokens, present, grid)
        out = attention(query, key, value, mask, op=self.config.op, **options)
        weights, dropped = eager.calls[0]
        self.record(mask, weights, eager.scores, begun, to_itself=query_tokens is key_tokens)
        return out, dropped

    def record(
        self,
        mask: FactoredMask,
        weights: Tensor,
        scores: Scores | None,
        begun: StackPass | None = None,
        *,
        to_itself: bool = False,
    ) -> None:
        """Calls the recorder, if one is set.

        Args:
            mask: of the layer.
            weights: attention weights before dropout, ``(B, H, Nq, Nk)``.
            scores: as in :class:`MaskRecord`.
            begun: state of the forward pass before the layer computed its mask; None where no tokens are reduced.
            to_itself: whether queries and keys are of the same tokens, so that hidden keys are no queries either.
        """
        if self.recorder is None:
            return
        begun = StackPass() if begun is None else begun
        detached = mask.detach()
        keys, queries = (None if each is None else each.places() for each in (begun.token_map, begun.query_map))
        alike = to_itself and mask.left.shape[2] == mask.right.shape[2]  # with a cache there are more keys than queries
        importance = detached.importance(scores.seen_keys() if scores is not None and alike else None)
        self.recorder(MaskRecord(detached, weights.detach(), importance, keys, queries, self.config.op, scores))

    def _hooked(self, attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Puts the hook around an attention; called before the mask is computed, which may end the pass."""
        if self.attention_hook is None:
            return attention
        return partial(self.attention_hook, attention, self.shared.current)

    def __deepcopy__(self, memo: dict[int, Any]) -> Lam:
        if not memo:  # a copy of the mask alone, such as peft makes, takes the mask's place in the same stack
            memo[id(self.shared)] = self.shared
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(vars(self), memo))
        return copied

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):  # where torch keeps the versions of modules
            destination._metadata[prefix[:-1]][_CONFIG] = self.config.to_dict()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        loads = any(key.startswith(prefix) for key in state_dict)
        if loads and _CONFIG in local_metadata:
            saved = LamConfig.from_dict(local_metadata[_CONFIG])
            if self.config.differences(saved):
                error_msgs.append(f"{prefix[:-1]} was saved with {saved} and the model has {self.config}.")
                for key in [key for key in state_dict if key.startswith(prefix)]:
                    del state_dict[key]  # torch's own copy, which the network would be loaded from next
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.is_fresh = self.is_fresh and not loads

    def extra_repr(self) -> str:
        return "" if self.network is not None else "shares the first layer's mask"


_CONFIG, _GRID = "lam_config", "lam_grid"


def carried_configs(state_dict: Mapping[str, Any]) -> dict[str, LamConfig]:
    """Returns the mask configurations by path that a masked model's state dict carries as metadata."""
    metadata: Mapping[str, Mapping[str, Any]] = getattr(state_dict, "_metadata", {})
    return {path: LamConfig.from_dict(entry[_CONFIG]) for path, entry in metadata.items() if _CONFIG in entry}


def carried_grids(state_dict: Mapping[str, Any]) -> dict[str, Grid]:
    """Returns the patch grids of position tables, by the path of their mask, that a state dict carries as metadata."""
    metadata: Mapping[str, Mapping[str, Any]] = getattr(state_dict, "_metadata", {})
    return {path: entry[_GRID] for path, entry in metadata.items() if _GRID in entry}


def carry_configs(
    state_dict: Mapping[str, Tensor], configs: Mapping[str, LamConfig], grids: Mapping[str, Grid] = MappingProxyType({})
) -> OrderedDict[str, Tensor]:
    """Returns a state dict that carries mask configurations, and grids of position tables, by path."""
    carrier = OrderedDict(state_dict)
    metadata: dict[str, dict[str, Any]] = {
        path: {"version": Lam._version, _CONFIG: config.to_dict()} for path, config in configs.items()
    }
    for path, grid in grids.items():
        metadata[path][_GRID] = grid
    vars(carrier)["_metadata"] = OrderedDict(metadata)
    return carrier


class EagerAttention:
    """Eager attention that keeps the weights of each call, before and after dropout, and the scores of the first."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.scores: Scores | None = None

    def __call__(
        self,
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
    ) -> Tensor:
        check_inputs(query, key, value, mask, op, allowed, bias, scale)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        weights = attention_weights(
            query, key, mask, op=op, allowed=allowed, bias=bias, is_causal=is_causal, scale=scale
        )
        dropped = torch.dropout(weights, dropout_p, dropout_p > 0)
        self.calls.append((weights, dropped))
        if self.scores is None:
            allowed = merge_allowed(weights, allowed, bias, is_causal)
            self.scores = Scores(query.detach(), key.detach(), scale, None if bias is None else bias.detach(), allowed)
        return (dropped @ value).to(query.dtype)
