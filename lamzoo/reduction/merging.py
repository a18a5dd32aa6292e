"""Token merging as hooks in a vision transformer, with masks or without.

Modifications to the host:

- A forward pre-hook on each block merges its tokens, and a forward hook on it ends the merge. The pre-hook of the first
  block puts the patches in the order in which they are matched.
- The attention layers of a model without masks are taken over as masks take them over, so that keys and values are made
  of the tokens before a merge, and queries of those after it.
- A block returns as many tokens as it takes, in the host's order, each patch the token that it is part of, so that
  dense features and intermediate outputs have the host's shapes. While the model computes its own output, which hooks
  on it note, tokens are only spread out after the last block.
- That output doesn't depend on all of the last block. Under a class token, only the prefix is computed; under a mean,
  the mean is taken before the last linear layer instead of after it. Neither changes the output.
- Where a host pads its samples, padding has size 0, which hides it in place of the host's attention mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from lamzoo.adapters.hosts import ADAPTERS, Pooling, check_replaceable
from lamzoo.adapters.wrappers import unwrap
from lamzoo.errors import ConfigError, UnsupportedHostError, class_name
from lamzoo.lam import FactoredMask, SharedState
from lamzoo.lam.config import Sign
from lamzoo.lam.layer import AttentionOptions, EagerAttention, lets_attend
from lamzoo.lam.ops import Op
from lamzoo.lam.passes import Merge, StackPass
from lamzoo.lam.token_map import TokenMap, take
from lamzoo.lam.unmasked import Unmasked, count_members, log_sizes
from lamzoo.reduction.config import TokenReduction
from lamzoo.reduction.matching import Part, match, match_padded, merged
from lamzoo.reduction.plan import checkerboard, merges_by_length, merges_per_layer
from lamzoo.reduction.stacks import (
    EndPass,
    ReductionHook,
    Stack,
    check_not_traced,
    check_unsharded,
    find_stack,
    remove_reduction,
    watch_image,
    watch_layers,
    watch_passes,
)


@dataclass(frozen=True)
class AttendBySizes:
    """Attention hook of a masked layer: attends under the mask, where a key counts as often as it has members.

    Attributes:
        sign: of the layer's mask.
    """

    sign: Sign
    fusible: ClassVar[bool] = True

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
    ) -> Tensor:
        if begun.sizes is not None:
            if op == "add" and not isinstance(attention, EagerAttention):  # whose record has mask and sizes apart
                mask = count_members(mask, begun.sizes, self.sign)
            else:
                bias, logs = options.get("bias"), log_sizes(begun.sizes).to(mask.left.dtype).transpose(-2, -1)
                options["bias"] = logs if bias is None else bias + logs
        return attention(query, key, value, mask, op=op, **options)


_DEEP, _MANY = 8, 128  # blocks and patches, from which on tokens merge in every second block


class _MergeTokens(ReductionHook):
    """Forward pre-hook of a block: merges its tokens, and leaves out those that nothing reads."""

    def __init__(self, shared: SharedState, stack: Stack, index: int, config: TokenReduction) -> None:
        super().__init__(shared)
        self.prefix = stack.layout.num_prefix_tokens
        self.pooling = stack.pooling
        self.is_first = index == 0
        layers = merging_layers(stack, config)
        self.place = layers.index(index) if index in layers else None
        self.layers, self.keep = len(layers), config.keep
        self.grid = stack.layout.grid

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        tokens, *others = args
        check_not_traced(tokens)
        others, kwargs = self._checked(block, others, kwargs)
        here = self.shared.current
        if not self.is_first and not here.held:  # a block that runs on its own merges nothing
            return (tokens, *others), kwargs
        padding = None if self.pooling.padding is None else kwargs.get(self.pooling.padding)
        if padding is not None:  # hidden by its size from here on
            kwargs = {**kwargs, str(self.pooling.padding): None}
        if self.is_first:
            tokens = self._begin(block, tokens, padding)
        elif here.token_map is not None and not here.pooled:
            tokens = take(tokens, here.token_map.kept)  # the members of a merged token are all equal
        return (self._merge(block, tokens, padding), *others), kwargs

    def _checked(
        self, block: nn.Module, others: list[Any], kwargs: Mapping[str, Any]
    ) -> tuple[list[Any], Mapping[str, Any]]:
        """Returns the arguments of a block besides its tokens, padding by its name.

        Raises:
            UnsupportedHostError: one of them may change what tokens attend to.
        """
        if self.pooling.padding is not None and others:  # which comes next after the tokens
            kwargs = {**kwargs, self.pooling.padding: others[0]}
            others = others[1:]
        given = [f"argument {place}" for place, value in enumerate(others, 2) if _is_set(value)]
        given += [name for name, value in kwargs.items() if _is_set(value)]
        if unknown := [name for name in given if name not in (*self.pooling.arguments, self.pooling.padding)]:
            raise UnsupportedHostError(
                f"Tokens can't be merged in {class_name(block)} while it is called with {unknown[0]}, such as an "
                "attention mask of all tokens; leave it out, or call lamzoo.remove_reduction(model) first."
            )
        return others, kwargs

    def _begin(self, block: nn.Module, tokens: Tensor, padding: Tensor | None) -> Tensor:
        """Begins the pass, and puts the patches in the order in which they are matched."""
        here = self.shared.current
        self.shared.begin(here.grid, pooled=here.begins_pooled, held=True)
        patches = tokens.shape[1] - self.prefix
        if isinstance(patches, Tensor):  # in torch.jit.trace
            patches = int(patches)
        plan = self._plan(patches)
        self.shared.update(plan=plan)
        if padding is not None:
            present = _present(padding, block, tokens)
            counts = self._plans(int(patches)).to(tokens.device)[present[:, self.prefix :].sum(dim=1)]
            self.shared.update(sizes=present.float(), counts=counts)
        if self.pooling.padding is not None:  # a sample merges alike in any batch, of which the grids are not known
            return tokens
        order = checkerboard(patches, self.prefix, (here.grid, self.grid), tokens) if any(plan) else None
        if order is None:
            return tokens
        places = order.expand(tokens.shape[0], -1)  # both ways, as each pair swaps
        self.shared.reduce(TokenMap(tokens.shape[1], places, places))
        return tokens.index_select(1, order)

    def _merge(self, block: nn.Module, tokens: Tensor, padding: Tensor | None) -> Tensor:
        """Begins the merge of the block, and returns the tokens that are left."""
        here = self.shared.current
        # If only the prefix of the last block's output is read, other tokens need no query.
        layer: Any = block.get_submodule(self.pooling.attn).lam
        if layer.is_last and here.pooled and self.pooling.reads_prefix_only():
            places = torch.arange(self.prefix, device=tokens.device).expand(tokens.shape[0], -1)
            token_map = TokenMap(tokens.shape[1], places)
            self.shared.merge(Merge(self._normed(block, tokens), token_map))
            return token_map(tokens)
        count = here.plan[self.place] if self.place is not None else 0
        if not count and not self._pads(padding, tokens):
            return tokens
        normed = self._normed(block, tokens)
        right = None if isinstance(layer, Unmasked) else layer.key_factor(normed)  # peft may have wrapped a mask
        if padding is None:
            token_map, sizes = match(normed, count, self.prefix, here.sizes, right)
        else:
            assert here.sizes is not None and here.counts is not None and self.place is not None
            patches = Part(self.prefix, tokens.shape[1] - self.prefix, count, here.counts[:, self.place])
            token_map, sizes = match_padded(normed, (patches,), here.sizes, right)
        self.shared.merge(Merge(normed, token_map, sizes, right))
        return merged(tokens, token_map)

    def _pads(self, padding: object, tokens: Tensor) -> bool:
        """Returns whether a sample may merge tokens although the batch doesn't get shorter: it becomes padding."""
        return padding is not None and self.place is not None and tokens.shape[1] > self.prefix + 1 and self.keep < 1

    def _normed(self, block: nn.Module, tokens: Tensor) -> Tensor:
        normed: Tensor = getattr(block, self.pooling.norm)(tokens)
        return normed

    @torch.compiler.assume_constant_result  # a traced share would be a variable as soon as a second one is compiled
    def _plan(self, patches: int) -> tuple[int, ...]:
        return merges_per_layer(patches, self.keep, self.layers)

    @torch.compiler.assume_constant_result
    def _plans(self, longest: int) -> Tensor:
        return merges_by_length(longest, self.keep, self.layers)


def _present(mask: Tensor, block: nn.Module, tokens: Tensor) -> Tensor:
    """Reads which tokens are not padding, bool ``(B, N)``, from an attention mask that hides padding and nothing else.

    Raises:
        UnsupportedHostError: the mask hides something else; not checked in compiled or exported models.
    """
    batch, length, _ = tokens.shape
    allowed = mask if mask.dtype == torch.bool else mask == 0
    if mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[-1] == length:
        seen = allowed.any(dim=2).any(dim=1)
        if torch.compiler.is_compiling():
            return seen.expand(batch, -1)
        keys = seen[:, None, None, :]
        only_padding = [(allowed == keys).all(), (allowed == (keys & keys.transpose(-2, -1))).all()]
        if any(only_padding) and (allowed | ~lets_attend(mask)).all():
            return seen.expand(batch, -1)
    raise UnsupportedHostError(
        f"Tokens can't be merged in {class_name(block)} while its attention mask hides or weights more than padding; "
        "leave the mask out, or call lamzoo.remove_reduction(model) first."
    )


class FinishMerge(ReductionHook):
    """Forward hook of a block: makes the merged tokens those of the next block, or gives every token its own back.

    Args:
        shared: state of the stack.
        attn: path of the attention layer in the block.
    """

    def __init__(self, shared: SharedState, attn: str = "attn") -> None:
        super().__init__(shared)
        self.attn = attn

    def __call__(self, block: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        layer: Any = block.get_submodule(self.attn).lam
        is_last: bool = layer.is_last
        merge = self.shared.current.merge
        if merge is not None:
            self.shared.finish_merge()
        here = self.shared.current
        only_prefix = merge is not None and merge.sizes is None
        if here.token_map is not None and not only_prefix and (is_last or not here.pooled):
            output = here.token_map.spread(output)
        if is_last:
            self.shared.end()
        return output


class _PoolEarly(ReductionHook):
    """Forward pre-hook of the last linear layer of all blocks: takes the mean of its inputs where only that is read."""

    def __init__(self, shared: SharedState, pooling: Pooling) -> None:
        super().__init__(shared)
        self.pooling = pooling

    def __call__(self, linear: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        here = self.shared.current
        if not (here.pooled and self.pooling.reads_mean_only()):
            return None
        tokens = args[0][:, self.pooling.num_unpooled :]
        sizes = here.sizes if here.merge is None else here.merge.sizes
        if sizes is None:
            return (tokens.mean(dim=1, keepdim=True),)
        weights = sizes[:, None, self.pooling.num_unpooled :]
        return ((weights / weights.sum(dim=2, keepdim=True)).to(tokens.dtype) @ tokens,)


class _BeginPooled(ReductionHook):
    """Forward pre-hook of the model: notes that it pools what its blocks return, and returns nothing else of them.

    This holds of the forward pass that its library defines, and not of one that a user has put in its place.
    """

    def __init__(self, shared: SharedState, pooling: Pooling) -> None:
        super().__init__(shared)
        self.pooling = pooling

    def __call__(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        methods = ((name, getattr(root, name, None)) for name in _FORWARD)
        own = all(method is None or _is_library(name, method) for name, method in methods)
        self.shared.begin(pooled=own and not self.pooling.reads_blocks(kwargs))


# The methods of a model that read what its blocks return.
_FORWARD = ("forward", "forward_features", "forward_head", "pool", "_pool")


def _is_library(name: str, method: object) -> bool:
    """Returns whether a method is that of this name in the model's library."""
    home = getattr(method, "__module__", None) or ""
    return getattr(method, "__name__", None) == name and home.partition(".")[0] in ADAPTERS


def _is_set(value: object) -> bool:
    return value is True or isinstance(value, Tensor)


def merge(model: nn.Module, config: TokenReduction) -> None:
    """Registers the hooks in a model, in place of those of an earlier reduction.

    Args:
        model: as for :func:`lamzoo.merge_tokens`.
        config: the merging.

    Raises:
        UnsupportedHostError: the model has another stack of blocks, several, or one that runs a block several times;
            or it has no masks and is sharded by FSDP or has an attention layer that can't be replaced, or masks in some
            blocks alone. An earlier reduction stays.
        ConfigError: ``at`` names a layer that the model doesn't have, or in which merging saves nothing; or frames are
            to merge in a model without frames; likewise.
    """
    model = unwrap(model)
    if config.frames != 1 and not getattr(model, "merges_frames", False):
        raise ConfigError(
            f"frames={config.frames}: {class_name(model)} has no frames that could merge; leave frames out, or give "
            "the CLIP4Clip that the model is part of."
        )
    stack = find_stack(model, masked=False, verb="merged")
    merging_layers(stack, config)
    blocks: Any = model.get_submodule(stack.pooling.blocks)
    if len({block.get_submodule(stack.pooling.attn) for block in blocks}) < len(blocks):
        raise UnsupportedHostError(
            f"Tokens can't be merged in {stack.pooling.blocks}, which runs a block or its attention several times; "
            "give each place a copy of its own."
        )
    lams = stack.lams
    if lams and (len(lams) < len(blocks) or len({id(lam.shared) for lam in lams}) > 1):
        raise UnsupportedHostError(
            f"Tokens can't be merged in {stack.pooling.blocks}: masks were added to some of its blocks, or to each by "
            "itself; call lamzoo.remove_lam, and lamzoo.add_lam on the whole."
        )
    if stack.sites:
        check_unsharded(model)
    remove_reduction(model)
    shared = lams[0].shared if lams else SharedState()
    for lam in lams:
        lam.attention_hook = AttendBySizes(lam.config.sign)
    sites = find_stack(model, masked=False, verb="merged").sites
    for site in sites:
        check_replaceable(site.path, model.get_submodule(site.path))
    for index, (site, adapter) in enumerate(sites.items()):
        adapter.wrap(model, {site: Unmasked(shared, index, is_last=index == len(sites) - 1)})
    for block in stack.blocks.values():
        # Before the hooks by which transformers records what blocks return.
        block.register_forward_hook(FinishMerge(shared, stack.pooling.attn), prepend=True)
    if not any(lam.has_positions for lam in lams):  # whose hooks tell the grid already
        watch_image(stack.layout, shared)
    watch_passes(stack.blocks.values(), shared)
    if stack.pooling.checkpoints_forward:
        watch_layers([block.get_submodule(stack.pooling.attn) for block in stack.blocks.values()], shared)
    for index, block in enumerate(stack.blocks.values()):
        block.register_forward_pre_hook(_MergeTokens(shared, stack, index, config), with_kwargs=True)
    if stack.pooling.last_linear is not None:
        stack.pooling.last_linear.register_forward_pre_hook(_PoolEarly(shared, stack.pooling))
    root = model.get_submodule(stack.pooling.root)
    root.register_forward_pre_hook(_BeginPooled(shared, stack.pooling), with_kwargs=True)
    root.register_forward_hook(EndPass(shared), always_call=True)
    model.token_reduction = config  # type: ignore[assignment]


def merging_layers(stack: Stack, config: TokenReduction) -> list[int]:
    """Returns the layers in which tokens merge.

    Raises:
        ConfigError: ``at`` names others, or tokens are to merge and there is no such layer.
    """
    # Under a class token the last block computes that token alone.
    possible = list(range(len(stack.blocks) - stack.pooling.reads_prefix_only()))
    if not possible and (config.at is not None or config.keep < 1):
        raise ConfigError(
            f"Tokens can't merge in {stack.pooling.blocks}: it has one block, of whose output only the class token is "
            "read, so that merging saves nothing; leave it out, or give keep=1."
        )
    if config.at is None:
        # Half as many merges of twice the size take half the time, and lose no more where tokens are many.
        is_large = len(stack.blocks) >= _DEEP and (stack.num_patches or 0) >= _MANY
        return possible[::2] if is_large else possible
    if config.at[-1] not in possible:
        raise ConfigError(
            f"at={config.at}: tokens can merge in layers 0 to {possible[-1]} of {stack.pooling.blocks}, counted from 0."
        )
    return list(config.at)
