"""Token reductions to a budget of GMACs: this project's methods and their peers, behind one interface."""

from __future__ import annotations

import dataclasses
import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lamzoo
from benchmarks.peers import Peer, applied, mean_gmacs
from benchmarks.peers.atm import ATM
from benchmarks.peers.diffrate import DiffRate
from benchmarks.peers.pitome import PiToMe
from benchmarks.peers.selection import EViT, Random, Stride
from benchmarks.peers.tome import ToMe
from lamzoo.adapters.state import has_masks
from lamzoo.errors import ConfigError
from lamzoo.lam import Lam
from lamzoo.profiling.inputs import as_arguments, default_input


@dataclass(frozen=True)
class Setting:
    """The largest setting of a method within a budget, and the GMACs of one image at it."""

    text: str
    gmacs: float


@dataclass(frozen=True)
class Samples:
    """Preprocessed images ``(images, C, H, W)`` for methods that need some to find their setting.

    Attributes:
        scored: of the split that is scored, for methods whose number of tokens depends on the images: their GMACs are
            the mean of these.
        training: of the training split, for methods that search on it.
    """

    scored: Tensor
    training: Tensor


#: Reduces a model's tokens inside the context to a budget in GMACs; a method that reduces at some layers only does so
#: after the given ones. Gives the setting; None if no setting meets the budget, or the method lacks samples.
Reduce = Callable[[Any, float, tuple[int, ...], Samples | None], AbstractContextManager[Setting | None]]
#: The variants of a method that a model allows, by name; none if it doesn't allow the method.
Variants = Callable[[Any], Mapping[str | None, Reduce]]


@contextmanager
def _last_layer_whole(model: Any) -> Iterator[None]:
    """Lets merging compute all of the last layer, as its peers do, and not only what the output needs of it."""
    model.pool = partial(model.pool)  # pooling that is not the library's may read everything
    try:
        yield
    finally:
        del model.pool


def _by_library(
    reduce_tokens: Callable[..., object],
    *,
    masked: bool,
    within: Callable[[Any], AbstractContextManager[None]] = nullcontext,
    **options: Any,
) -> Variants:
    """Returns the reduction by a function of the library, in a context of the model."""

    @contextmanager
    def reduce(model: Any, budget: float, at: tuple[int, ...], samples: Samples | None) -> Iterator[Setting | None]:
        where = {"at": at} if masked else {}
        with within(model):
            try:
                reduce_tokens(model, target_gmacs=budget, **where, **options)
            except ConfigError:  # even a single token costs more
                setting = None
            else:
                found = {"keep": model.token_reduction.keep} | where
                setting = Setting(_text(found), lamzoo.profile(model).gmacs)
            try:
                yield setting
            finally:
                lamzoo.remove_reduction(model)

    return lambda model: {None: reduce} if has_masks(model) or not masked else {}


def _by_peer(settings: Callable[..., Sequence[Peer]], *, has_layers: bool = False, **options: Any) -> Reduce:
    """Returns the reduction by a peer, whose settings are in order of increasing GMACs."""

    @contextmanager
    def reduce(model: Any, budget: float, at: tuple[int, ...], samples: Samples | None) -> Iterator[Setting | None]:
        peers = settings(model, **({"at": at} if has_layers else {}), **options)
        if peers[0].is_adaptive and samples is None:
            yield None
            return
        found = largest(model, peers, budget, samples.scored if samples is not None and peers[0].is_adaptive else None)
        if found is None:
            yield None
            return
        peer, setting = found
        with applied(model, peer):
            yield setting

    return reduce


def largest(
    model: Any, peers: Sequence[Peer], budget: float, images: Tensor | None = None
) -> tuple[Peer, Setting] | None:
    """Returns the largest setting of a peer within a budget in GMACs; None if none meets it.

    Args:
        model: the model whose tokens are reduced.
        peers: its settings, in order of increasing GMACs.
        budget: GMACs of one image.
        images: ``(images, C, H, W)`` whose GMACs are averaged, for a peer whose number of tokens depends on them.
    """
    counted = as_arguments(default_input(model))[0] if images is None else images
    fitting = bisect_right(peers, budget, key=lambda peer: mean_gmacs(model, peer, counted))
    if not fitting:
        return None
    peer = peers[fitting - 1]
    return peer, Setting(_text(dataclasses.asdict(peer)), mean_gmacs(model, peer, counted))


def _text(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items() if not isinstance(value, torch.Generator))


def _has_mask_rows(model: nn.Module) -> bool:
    """Whether a mask has rows of its own for tokens, rather than made of them: in a table, or shared by the layers."""
    configs = [module.config for module in model.modules() if isinstance(module, Lam)]
    return any(config.keys == "position" or config.layers == "single" for config in configs)


ALL, MERGED = "all tokens", "merged"
ALIKE = "merged, last layer whole"  # without an exact saving that has nothing to do with merging, for comparison
OURS: dict[str, Variants] = {
    MERGED: _by_library(lamzoo.merge_tokens, masked=False),
    ALIKE: _by_library(lamzoo.merge_tokens, masked=False, within=_last_layer_whole),
} | {
    f"{score}, {rest}": _by_library(lamzoo.prune_tokens, masked=True, score=score, rest=rest)
    for score, rest in (
        ("mask", "drop"),
        ("mask", "merge"),
        ("mask", "nearest"),
        ("attention", "drop"),
        ("attention", "merge"),
        ("redundancy", "nearest"),
    )
}


def _tome(model: Any) -> dict[str | None, Reduce]:
    """Returns ToMe in the variants that differ on a model, the official one first."""
    choices = itertools.product(
        ("between", "after"),
        ("averaged", "destination") if _has_mask_rows(model) else ("averaged",),
        ("weighted", "plain") if model.global_pool == "avg" else ("weighted",),
    )
    return {
        f"{placement}, {rows} rows, {pooling} pooling": _by_peer(
            ToMe.settings, placement=placement, rows=rows, pooling=pooling
        )
        for placement, rows, pooling in choices
    }


@contextmanager
def _diffrate(model: Any, budget: float, at: tuple[int, ...], samples: Samples | None) -> Iterator[Setting | None]:
    try:
        peer = None if samples is None else DiffRate.searched(model, samples.training, budget)
    except ConfigError:  # half of the patches in each layer cost more
        peer = None
    if peer is None:
        yield None
        return
    with applied(model, peer):
        yield Setting(_text(dataclasses.asdict(peer)), lamzoo.profile(model).gmacs)


_PITOME, _ATM = (_by_peer(peer.settings) for peer in (PiToMe, ATM))
_EVIT, _RANDOM, _STRIDE = (_by_peer(peer.settings, has_layers=True) for peer in (EViT, Random, Stride))
PEERS: dict[str, Variants] = {
    "ToMe": _tome,
    "PiToMe": lambda model: {None: _PITOME},
    "DiffRate": lambda model: {None: _diffrate},
    "ATM": lambda model: {None: _ATM},
    "EViT": lambda model: {None: _EVIT} if model.num_prefix_tokens else {},
    "random": lambda model: {None: _RANDOM},
    "stride": lambda model: {None: _STRIDE},
}


@contextmanager
def _all_tokens(model: Any, budget: float, at: tuple[int, ...], samples: Samples | None) -> Iterator[Setting]:
    yield Setting("none", lamzoo.profile(model).gmacs)


METHODS: dict[str, Variants] = {ALL: lambda model: {None: _all_tokens}, **OURS, **PEERS}
