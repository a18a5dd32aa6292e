"""Merging and pruning of tokens, to a share of them or to a budget of GMACs."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pkgutil import resolve_name
from typing import TypeVar

from torch import nn

from lamzoo.adapters.wrappers import unwrap
from lamzoo.errors import ConfigError
from lamzoo.reduction import merging, pruning, streams
from lamzoo.reduction.config import PruneConfig, Rest, Score, TokenReduction, Training, layers_of
from lamzoo.reduction.plan import merges_per_layer
from lamzoo.reduction.stacks import find_stack, remove_reduction

Model = TypeVar("Model", bound=nn.Module)

_logger = logging.getLogger(__name__)

_FOR_SHARE = ", or give the share of patches to keep as keep={:g}"
_PROFILE = "lamzoo.profiling:profile"  # a name, because profiling is built on this package


def prune_tokens(
    model: Model,
    keep: float | None = None,
    at: Sequence[int] | None = None,
    *,
    target_gmacs: float | None = None,
    score: Score = "mask",
    rest: Rest = "drop",
    training: Training = "straight-through",
    count_gmacs: Callable[[nn.Module], float] | None = None,
) -> Model:
    """Prunes tokens of a masked vision transformer, in place.

    Class and register tokens are kept. Of the other tokens each sample keeps the same number, so that shapes are static
    and batching, ``torch.compile`` and export work as before. ``forward_features`` returns the remaining tokens, and
    ``forward_intermediates`` needs ``output_fmt="NLC"``. In a CLIP model the image tower is pruned and the text tower
    is not.

    Args:
        model: has masks, and is or contains one timm ``VisionTransformer`` or ``Eva``, or image tower of open_clip; may
            be wrapped by ``torch.compile`` or data parallelism.
        keep: share of a layer's tokens to keep at each layer of ``at``; 0.7 by default.
        at: layers, counted from 0, after whose block tokens are pruned; by default three, at a quarter, half and three
            quarters of the depth.
        target_gmacs: instead of ``keep``, an upper limit on the GMACs of one input of the model's own size; the largest
            share within it is taken. A limit that the model with all tokens is below is logged as a warning.
        score: how tokens are scored, as in :class:`lamzoo.PruneConfig`.
        rest: what to do with pruned tokens: ``"drop"`` them, ``"merge"`` them into one token, or average each into the
            ``"nearest"`` kept one.
        training: ``"straight-through"`` hides pruned tokens in training mode by decisions that the scores learn from
            (add :func:`lamzoo.pruning_loss` to the loss); ``"top-k"`` prunes as in evaluation.
        count_gmacs: counts the GMACs of one input for ``target_gmacs``; :func:`lamzoo.profile` by default.

    Returns:
        The same model, with the attribute ``prune_config``. Pruning a model again replaces the earlier pruning.

    Raises:
        UnsupportedHostError: the model has no masks, or has them in another host, or in several; in a forward pass,
            that straight-through training doesn't support the model's pooling.
        ConfigError: an invalid value, a layer that the model doesn't have, both ``keep`` and ``target_gmacs``, or a
            target below the cost of a single token.
    """
    where = at if at is not None else _quarters(model)
    if target_gmacs is not None and keep is not None:
        raise ConfigError(f"keep={keep} beside target_gmacs={target_gmacs}: give one of them.")
    config = PruneConfig(0.7 if keep is None else keep, where, score, rest, training)
    if target_gmacs is not None:
        config = PruneConfig.of(_largest(model, config, target_gmacs, count_gmacs or _profiled_gmacs))
    pruning.prune(model, config)
    return model


def merge_tokens(
    model: Model,
    *,
    target_gmacs: float | None = None,
    keep: float | None = None,
    r: int | None = None,
    at: Sequence[int] | None = None,
    frames: float = 1.0,
    count_gmacs: Callable[[nn.Module], float] | None = None,
) -> Model:
    """Merges alike tokens of a vision transformer with masks or without, in place and without training.

    A few patches merge in a layer, into others that are like them; class and register tokens never merge. In a
    layer, keys and values are made of the tokens before its merge, and queries of those after it. The pairs are those
    of least cost by a bipartite matching of the two colours of a checkerboard of the patches, in later layers of every
    second one of those that are left: the squared distance of the layer's inputs, plus half of that of the mask's key
    factors, each over its mean, weighted as Ward weighs the sizes of clusters. A layer merges at most 30 % of its
    patches, or up to one half where the share can't be reached otherwise. A merged token is the mean of its patches
    with the mean of their norms; in attention and in the pooling it counts as often as it has patches, and its row in a
    mask's position table is the mean of theirs.

    Outputs keep their shapes: ``forward_features`` and ``forward_intermediates`` give every patch the token that it is
    part of. While the model computes its own output, the last block computes only what that output needs: under a class
    token, that token alone; under a mean, the last linear layer after the mean. This changes nothing, and ``keep=1``
    does this and no more.

    In a describer the tokens of the joint encoder merge, each with others of its own modality, and padding with none; a
    clip is merged as if it were alone. The decoder reads every token of the encoder as before, each the one that it is
    part of.

    Args:
        model: is or contains one ``VisionTransformer`` (ViT, DeiT, DINOv2, SigLIP, ...), ``Eva`` (EVA, EVA-02,
            RoPE-ViT, DINOv3, PE), ``NaFlexVit``, ``Qwen3VitEncoder`` or ``DeepseekVitEncoder`` of timm with pre-norm
            blocks, or one image tower of open_clip, or one ViT, DeiT, ViT-MSN, I-JEPA, DINOv2, DINOv3, VideoMAE, ViViT
            or image tower of CLIP, SigLIP or SigLIP 2 of Hugging Face transformers, or a describer; may be wrapped by
            ``torch.compile`` or data parallelism. In a CLIP model the image tower is reduced and the text tower isn't;
            in CLIP4Clip it is that of each frame. Hidden states that transformers records have every token. With rotary
            positions, a merged token has the rotation of the token whose place it takes. In padded batches of
            ``NaFlexVit`` and SigLIP 2, each sample keeps the share of its own patches and is merged as if it were
            alone; the batch gets shorter as its longest sample does. In these models every second patch is matched to
            the others, row by row.
        target_gmacs: upper limit on the GMACs of one input of the model's own size, matching included; as few patches
            as needed merge. Inputs of another size keep the same share of their patches. This is not a share: for one
            of the patches give ``keep``, and for one of the GMACs ``share * lamzoo.profile(model).gmacs``. A limit that
            the model with all tokens is below is logged as a warning, and nothing merges.
        keep: instead, the share of the patches that is left after the last layer, rounded up; in a describer, of a
            clip's tokens of each modality, and not below 1 / (layers + 1). 1 if ``frames`` alone are given.
        r: instead, the number of patches that merge in each of the layers ``at``, at the model's own input size. Where
            this is over 30 % of the patches of a later layer, earlier ones merge more in its stead.
        at: layers in which tokens merge, counted from 0; by default all of them, or every second one in a vision
            transformer of at least 8 blocks and 128 patches, which loses no more there. A merge has a fixed cost of
            some fifty small operators. Where a layer costs little more itself, as with one image of 64 patches on a
            CPU, a merged model is slower than an unmerged one; fewer layers with more merges each, such as
            ``at=(0, 4, 8)``, reduce this cost, and merging slightly (to 90 % of the GMACs) doesn't pay.
        frames: for CLIP4Clip, the share of a video's frames that is left: before the tower encodes them, those that are
            alike become their mean, by the same matching, and each frame gets the embedding of the one that it is part
            of. Where little moves, as in the lips of a talker, this loses less than merging as many patches.
        count_gmacs: counts the GMACs of one input for ``target_gmacs``; :func:`lamzoo.profile` by default.

    Returns:
        The same model, with the attribute ``token_reduction``. An earlier reduction is replaced.

    Raises:
        UnsupportedHostError: the model has another stack of blocks, or several; in a forward pass, that a block is
            called with an attention mask of all tokens.
        ConfigError: not exactly one of ``target_gmacs``, ``keep`` and ``r`` (or ``frames`` alone), an invalid value, a
            layer that the model doesn't have, a model without a layer in which merging saves anything, or a target
            below the cost of a single patch after the last layer.
    """
    if frames != 1 and target_gmacs is None and keep is None and r is None:
        keep = 1.0
    given = {"target_gmacs": target_gmacs, "keep": keep, "r": r}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        named = ", ".join(f"{name}={value}" for name, value in given.items()) or "none of them"
        raise ConfigError(f"merge_tokens takes one of target_gmacs, keep and r, and got {named}.")
    config = TokenReduction(1.0 if keep is None else keep, at=None if at is None else layers_of(at), frames=frames)
    if r is not None:
        config = replace(config, keep=_share(model, config, r))
    if target_gmacs is not None:
        config = _largest(model, config, target_gmacs, count_gmacs or _profiled_gmacs, _FOR_SHARE)
    reduce_tokens(model, config)
    return model


def merge_to_share(model: Model, share: float) -> Model:
    """Merges tokens to a share of the GMACs that the model has with all tokens; as :func:`merge_tokens`."""
    with _put_back(model):
        whole = _profiled_gmacs(remove_reduction(model))
    try:
        config = _largest(model, TokenReduction(1.0), share * whole, _profiled_gmacs)
    except ConfigError as error:
        raise ConfigError(f"Tokens can't be merged to {100 * share:g} % of {whole:.4g} GMACs: {error}") from error
    reduce_tokens(model, config)
    return model


def _quarters(model: nn.Module) -> tuple[int, ...]:
    """Returns the layers at a quarter, half and three quarters of the depth, without the last one."""
    layers = len(find_stack(model, masked=True, verb="pruned").blocks)
    quarters = sorted({layers * i // 4 for i in (1, 2, 3)} - {layers - 1})
    if not quarters:
        raise ConfigError("The model has one block, after which pruning saves nothing; use it as it is.")
    return tuple(quarters)


def _share(model: nn.Module, config: TokenReduction, r: int) -> float:
    """Returns the share of patches that is left when ``r`` merge in each layer in which tokens merge."""
    if isinstance(r, bool) or not isinstance(r, int) or r < 0:
        raise ConfigError(f"r={r!r}: the number of patches that merge in each layer must be a whole number from 0.")
    stack = None if streams.find_encoder(model) is not None else find_stack(model, masked=False, verb="merged")
    if stack is None or stack.num_patches is None:
        raise ConfigError(f"r={r}: the number of patches of this model is not known; give keep.")
    patches, layers = stack.num_patches, len(merging.merging_layers(stack, config))
    gone = r * max(1, layers)  # without such layers, the share is refused with the model
    keep = max(1, patches - gone) / patches
    if sum(merges_per_layer(patches, keep, layers)) < r * layers:
        raise ConfigError(f"r={r}: {patches} patches are too few for so many merges in each layer; take fewer.")
    return keep


def _profiled_gmacs(model: nn.Module) -> float:
    gmacs: float = resolve_name(_PROFILE)(model).gmacs
    return gmacs


def _largest(
    model: nn.Module,
    config: TokenReduction,
    target: float,
    count_gmacs: Callable[[nn.Module], float],
    for_share: str = "",
) -> TokenReduction:
    """Returns the reduction with the largest share, in steps of a thousandth, that costs at most ``target`` GMACs.

    Args:
        model: the model; its own reduction stays.
        config: the reduction, whose share is replaced.
        target: the limit.
        count_gmacs: counts the GMACs of one input.
        for_share: ends the messages for a target of at most 1 that can't be met, or that the model with all tokens is
            below, because it may have been meant as a share; formatted with the target.
    """
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not target > 0:
        raise ConfigError(f"target_gmacs={target!r}: the limit must be a number of GMACs above 0.")
    for_share = for_share.format(target) if target <= 1 else ""
    config = TokenReduction(**vars(config))

    def gmacs(thousandths: int) -> float:
        reduce_tokens(model, replace(config, keep=thousandths / 1000))
        return count_gmacs(model)

    with _put_back(model):
        if gmacs(1000) <= target:
            whole = count_gmacs(remove_reduction(model))
            if whole < target:
                _logger.warning(
                    "target_gmacs=%g is above the %.4g GMACs of the model with all tokens, which are all kept; take a "
                    "lower target%s.", target, whole, for_share,
                )  # fmt: skip
            return replace(config, keep=1.0)
        largest = bisect_right(range(1, 1000), target, key=gmacs)
        if largest == 0:
            in_all = config.at is None and config.method == "merge"
            where = "" if config.at is None else f" at layers {config.at}"
            earlier = "" if in_all else ", or reduce tokens in earlier layers"
            raise ConfigError(
                f"target_gmacs={target:g}: with as few tokens as possible{where}, the model still costs "
                f"{gmacs(1):.4g} GMACs; take a higher target{earlier}{for_share}."
            )
        return replace(config, keep=largest / 1000)


@contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Puts the reduction that a model has back at the end, in place of any other."""
    before: TokenReduction | None = getattr(unwrap(model), "token_reduction", None)
    try:
        yield
    finally:
        remove_reduction(model)
        if before is not None:
            reduce_tokens(model, before)


def reduce_tokens(model: nn.Module, config: TokenReduction) -> None:
    """Merges or prunes tokens as a configuration says, in place; raises as the two.

    Args:
        model: as for :func:`merge_tokens` and :func:`prune_tokens`.
        config: the reduction.
    """
    if config.method == "merge":
        encoder = streams.find_encoder(model)
        if encoder is None:
            merging.merge(model, config)
        else:
            streams.merge(model, encoder, config)
    else:
        config = config if config.at is not None else replace(config, at=_quarters(model))
        pruning.prune(model, PruneConfig.of(config))
