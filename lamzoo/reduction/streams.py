"""Token merging in a joint encoder of several streams: within each stream, and never of padding.

Modifications to the host: as in :mod:`lamzoo.reduction.merging`, in the encoder and its layers. Tokens are spread out
again after the last layer, so that readers of the encoder's output work as before: a reader's attention to all members
of a merged token is its attention to that token, counted as often as it has members.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from lamzoo.adapters.hosts import check_replaceable
from lamzoo.adapters.mha import MultiheadAttentionAdapter
from lamzoo.adapters.wrappers import unwrap
from lamzoo.errors import ConfigError, UnsupportedHostError
from lamzoo.lam import Lam, SharedState
from lamzoo.lam.passes import Merge
from lamzoo.lam.unmasked import Unmasked
from lamzoo.reduction.config import TokenReduction
from lamzoo.reduction.matching import Part, match_padded, merged
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
        share: of a stream's input tokens that leaves in each layer in which tokens merge; 0 in other layers.
    """

    def __init__(self, shared: SharedState, share: float) -> None:
        super().__init__(shared)
        self.billionths = math.ceil(share * 10**9)  # exact, on every device

    def __call__(self, layer: Any, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        tokens, mask = args
        check_not_traced(tokens)
        here = self.shared.current
        present = mask if here.sizes is None else here.sizes > 0
        if not (self.billionths and here.spans):  # a layer that runs on its own merges nothing
            return tokens, present
        after = here.merged_layers + 1
        parts, start = [], here.spans[0][0]
        for first, end in here.spans:  # side by side, after the class token
            length = self._left(end - first, here.merged_layers)
            left = self._left(end - first, after)
            if length > 1 and left < end - first:  # else no sample merges any of its tokens
                count = present[:, start : start + length].sum(dim=1)
                due = count - self._left(mask[:, first:end].sum(dim=1), after)
                parts.append(Part(start, length, length - left, due))
            start += length
        self.shared.update(merged_layers=after)
        if parts:
            lam = layer.attn.lam
            right = None if isinstance(lam, Unmasked) else lam.key_factor(tokens)
            sizes = mask.float() if here.sizes is None else here.sizes
            token_map, few = match_padded(tokens, parts, sizes, right)
            self.shared.merge(Merge(tokens, token_map, few, right))
            tokens = merged(tokens, token_map)
        return tokens, present

    def _left(self, length: Length, layers: int) -> Length:
        """Returns how many of a stream's tokens are left after as many layers: of a part of it, at most as many."""
        return length - length * layers * self.billionths // 10**9


def find_encoder(model: nn.Module) -> str | None:
    """Returns the path of the first joint encoder of streams in a model; None if it has none."""
    return next((path for path, module in unwrap(model).named_modules() if hasattr(type(module), "stream_spans")), None)


def merge(model: nn.Module, path: str, config: TokenReduction) -> None:
    """Registers the hooks in a model, in place of those of an earlier reduction.

    Of the ``L`` tokens that a sample has in a stream, ``floor(k * b * L)`` have merged into others after the ``k``-th
    of the layers, in any batch. The share ``b`` is ``(1 - keep) / layers``, at most ``1 / (layers + 1)``, rounded up to
    billionths, so that at most ``ceil(L * max(keep, 1 / (layers + 1)))`` are left after the last one, and at least one.

    Args:
        model: contains a joint encoder of streams.
        path: of the encoder.
        config: the merging.

    Raises:
        UnsupportedHostError: the encoder's masks have positions; or it has no masks and is sharded by FSDP, or has an
            attention layer that can't be replaced.
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
        for site in sites:
            check_replaceable(site.path, encoder.get_submodule(site.path))
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
