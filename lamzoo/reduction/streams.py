"""Token merging in a joint encoder of several streams: within each stream, and never of padding.

Modifications to the host: as in :mod:`lamzoo.reduction.merging`, in the encoder and its layers. Tokens are spread out
again after the last layer, so that readers of the encoder's output work as before: a reader's attention to all members
of a merged token is its attention to that token, counted as often as it has members.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lamzoo.adapters.mha import MultiheadAttentionAdapter
from lamzoo.adapters.wrappers import unwrap
from lamzoo.errors import ConfigError, UnsupportedHostError
from lamzoo.lam import Lam, SharedState
from lamzoo.lam.passes import Merge
from lamzoo.lam.token_map import TokenMap
from lamzoo.lam.unmasked import Unmasked
from lamzoo.reduction.config import TokenReduction
from lamzoo.reduction.matching import full_precision, least_costs, merged, without
from lamzoo.reduction.merging import AttendBySizes, FinishMerge
from lamzoo.reduction.stacks import (
    EndPass,
    ReductionHook,
    check_not_traced,
    check_unsharded,
    remove_reduction,
    watch_passes,
)

Length = TypeVar("Length", int, Tensor)


class StreamEncoder(Protocol):
    """An encoder of a joint sequence in which tokens can merge.

    Its first argument is the streams. Each of its layers is called with tokens ``(B, N, C)`` and a mask, bool
    ``(B, N)``, True where there is a token, and attends with an ``nn.MultiheadAttention`` named ``attn`` to the tokens
    as they are.
    """

    layers: nn.ModuleList

    def stream_spans(self, streams: Any) -> Mapping[str, tuple[int, int]]:
        """Returns the half-open range of each stream in the joint sequence."""
        ...


class Part(NamedTuple):
    """The tokens of one stream, some of which merge with each other.

    Attributes:
        start: place of the first.
        length: number of tokens, padding included.
        gone: number of tokens that leave.
        due: number of content tokens that merge into others in each sample, int64 ``(B,)``; the other tokens that leave
            are padding.
    """

    start: int
    length: int
    gone: int
    due: Tensor


class _BeginStreams(ReductionHook):
    """Forward pre-hook of the encoder: begins a pass, and notes where the streams are."""

    def __init__(self, shared: SharedState, encoder: StreamEncoder) -> None:
        super().__init__(shared)
        self.spans = encoder.stream_spans

    def __call__(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        streams = args[0] if args else kwargs["streams"]
        self.shared.begin(pooled=True, held=True)
        self.shared.update(spans=tuple(self.spans(streams).values()))


class _MergeStreams(ReductionHook):
    """Forward pre-hook of a layer: merges its tokens within their streams.

    Args:
        shared: state of the stack.
        share: of a stream's tokens that leaves in this layer, as in each in which tokens merge.
    """

    def __init__(self, shared: SharedState, share: float) -> None:
        super().__init__(shared)
        self.billionths = math.ceil(share * 10**9)  # exact, on every device

    def __call__(self, layer: Any, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        tokens, mask = args
        check_not_traced(tokens)
        here = self.shared.current
        present = mask if here.token_map is None else mask.gather(1, here.token_map.kept)
        each = [self._leaving(end - first) for first, end in here.spans]
        before = (mask.shape[1] - tokens.shape[1]) // max(1, sum(each))  # layers in which tokens have merged
        parts, start = [], 0
        for (first, end), gone in zip(here.spans, each, strict=True):
            start = start or first  # streams lie side by side, after the class token
            length = end - first - before * gone
            if gone:
                parts.append(Part(start, length, gone, self._leaving(mask[:, first:end].sum(dim=1))))
            start += length
        if parts:
            lam = layer.attn.lam
            right = None if isinstance(lam, Unmasked) else lam.key_factor(tokens)
            token_map, sizes = match_within(tokens, parts, present, here.sizes, right)
            self.shared.merge(Merge(tokens, token_map, sizes, right))
            tokens = merged(tokens, token_map)
        return tokens, present

    def _leaving(self, length: Length) -> Length:
        """Returns how many of a stream's tokens leave in each layer: of a part of it, at most as many."""
        return length * self.billionths // 10**9


def find_encoder(model: nn.Module) -> str | None:
    """Returns the path of the first joint encoder of streams in a model; None if it has none."""
    return next((path for path, module in unwrap(model).named_modules() if hasattr(type(module), "stream_spans")), None)


def merge(model: nn.Module, path: str, config: TokenReduction) -> None:
    """Registers the hooks in a model, in place of those of an earlier reduction.

    Args:
        model: contains a joint encoder of streams.
        path: of the encoder.
        config: the merging.

    Raises:
        UnsupportedHostError: the encoder's masks have positions; or it has no masks and is sharded by FSDP.
        ConfigError: ``at`` names a layer that the encoder doesn't have, or frames are to merge.
    """
    model = unwrap(model)
    encoder: Any = model.get_submodule(path)
    layers = list(range(len(encoder.layers))) if config.at is None else list(config.at)
    where = f"{path}.layers" if path else "layers"
    if layers[-1] >= len(encoder.layers):
        raise ConfigError(
            f"at={config.at}: tokens can merge in layers 0 to {len(encoder.layers) - 1} of {where}, counted from 0."
        )
    if config.frames != 1:
        raise ConfigError(
            f"frames={config.frames}: the frames of this model are the tokens of a stream; leave frames out, and give "
            "keep or target_gmacs."
        )
    lams = [module for module in encoder.layers.modules() if isinstance(module, Lam)]
    if any(lam.has_positions for lam in lams):
        raise UnsupportedHostError(
            f"Tokens can't be merged in {where}: its masks have keys='position', and the positions of padded streams "
            "can't be averaged; use keys='content'."
        )
    if not lams:
        check_unsharded(model)
    remove_reduction(model)
    shared = lams[0].shared if lams else SharedState()
    for lam in lams:
        lam.attention_hook = AttendBySizes(lam.config.sign)
    if not lams:
        adapter = MultiheadAttentionAdapter()
        sites = list(adapter.sites(encoder))
        places = {site: Unmasked(shared, index, is_last=index == len(sites) - 1) for index, site in enumerate(sites)}
        adapter.wrap(encoder, places)
    # At most half of a stream's tokens can leave in the last of the layers.
    share = min(1 - config.keep, len(layers) / (len(layers) + 1)) / len(layers)
    for layer in encoder.layers:
        layer.register_forward_hook(FinishMerge(shared))
    watch_passes(encoder.layers, shared)
    for index, layer in enumerate(encoder.layers):
        layer.register_forward_pre_hook(_MergeStreams(shared, share if index in layers else 0.0))
    encoder.register_forward_pre_hook(_BeginStreams(shared, encoder), with_kwargs=True)
    encoder.register_forward_hook(EndPass(shared), always_call=True)
    model.token_reduction = config  # type: ignore[assignment]


def match_within(
    tokens: Tensor, parts: Sequence[Part], present: Tensor, sizes: Tensor | None = None, right: Tensor | None = None
) -> tuple[TokenMap, Tensor]:
    """Finds the pairs of tokens whose merge loses least, as :func:`lamzoo.reduction.matching.match` in each part.

    Where a sample has padding, fewer of its content tokens are due to merge, and padding leaves from the end of the
    part in their stead, so that a sample is merged as if it were alone.

    Args:
        tokens: ``(B, N, C)``, inputs of the layer's attention.
        parts: the streams; tokens outside of them never merge, and the first of these is content.
        present: bool ``(B, N)``, False for padding.
        sizes: number of the encoder's input tokens in each token, ``(B, N)``, 1 for padding; None where all are one.
        right: key factor of the layer's mask, ``(1 | B, Hm, N, R)``; None without a mask.

    Returns:
        The map, which averages by sizes, and the sizes of the remaining tokens, float32, 1 for padding.
    """
    with full_precision(tokens):
        batch, length, _ = tokens.shape
        weights = present.float() if sizes is None else sizes * present
        rows = None if right is None else right.transpose(1, 2).flatten(2)
        leaves, targets = [], []
        for part in parts:
            here = slice(part.start, part.start + part.length)
            ours = None if rows is None else rows[:, here]
            least, partner = least_costs(tokens[:, here], weights[:, here], ours, present[:, here])
            # Content that is due leaves first, then padding from the end; other content where that doesn't suffice.
            order = least.argsort(dim=1).argsort(dim=1).float()
            turn = torch.full((batch, part.length), torch.inf, device=tokens.device)
            late = order + 2 + part.length
            turn[:, ::2] = torch.where(order < part.due.unsqueeze(1), 0.0, late).masked_fill(least.isinf(), torch.inf)
            from_end = torch.arange(part.length, 0, -1, device=tokens.device, dtype=turn.dtype)
            turn = torch.where(present[:, here], turn, from_end)
            target = torch.zeros(batch, part.length, dtype=torch.int64, device=tokens.device)
            target[:, ::2] = part.start + 1 + 2 * partner
            target = target.masked_fill(~present[:, here], 0)  # padding weighs nothing, wherever it goes
            gone = turn.topk(part.gone, dim=1, largest=False, sorted=False).indices
            leaves.append(part.start + gone)
            targets.append(target.gather(1, gone))
        gone, target = torch.cat(leaves, dim=1), torch.cat(targets, dim=1)
        kept, into = without(gone, target, length)
        few = torch.zeros(kept.shape, device=tokens.device).scatter_add(1, into, weights)
        return TokenMap.averaging(kept, into, weights), few.clamp_min(1)
