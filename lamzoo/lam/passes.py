"""Forward passes of a stack of layers: what its layers share during a pass, and which pass a block belongs to."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import Node
from torch.utils.weak import WeakTensorKeyDictionary

from lamzoo.errors import ConfigError
from lamzoo.lam.masks import FactoredMask
from lamzoo.lam.resize import Grid
from lamzoo.lam.token_map import TokenMap

Rerun = tuple[int, object]
Key = tuple[int, int | None]

_TOKEN = "lamzoo"


class Layer(nn.Module):
    """A layer with a place in a stack, once it has joined the state of the stack.

    Args:
        shared: state of the stack that the layer belongs to.
        is_last: whether the stack ends here.
    """

    def __init__(self, shared: SharedState, is_last: bool) -> None:
        super().__init__()
        self.shared = shared
        self.is_last = is_last
        self.place: int | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.place is not None:
            self.shared.join(self, self.place)

    def key_tokens(self, tokens: Tensor) -> Tensor:
        """Returns the tokens that the keys are made of: ``(B, Nq, C)`` as given, unless tokens merge in this layer."""
        return self.shared.key_tokens(tokens)


@dataclass(frozen=True)
class Merge:
    """Tokens that merge inside a layer: its keys are all of them, its queries the fewer ones.

    Attributes:
        tokens: inputs of the layer's attention before the merge, ``(B, N, C)``.
        token_map: from these to the fewer ones.
        sizes: number of the stack's input tokens in each of the fewer ones, float ``(B, K)``; None where the map only
            selects.
        right: key factor of the layer's mask for ``tokens``, ``(1 | B, Hm, N, R)``, if it has been computed.
    """

    tokens: Tensor
    token_map: TokenMap
    sizes: Tensor | None = None
    right: Tensor | None = None


@dataclass(frozen=True, eq=False)
class StackPass:
    """State of one forward pass of a stack: patch grid, shared mask, token reductions so far.

    Attributes:
        grid: ``(rows, columns)`` of the input's patches, for hosts that have them.
        mask: the first layer's, with ``layers="single"``, reduced with the tokens.
        token_map: from the tokens of the stack's input to the keys of the current layer; None where these are the same.
        sizes: number of the stack's input tokens in each key of the current layer, float ``(B, N)``, 0 in padding;
            None where nothing has merged and nothing is padded.
        merge: of tokens inside the current layer.
        plan: how many tokens merge in each layer that merges; of padded samples, by how many the batch gets shorter.
        counts: how many tokens of each padded sample are due to merge in these layers, int64 ``(B, layers)``; None
            where nothing is padded.
        kept: straight-through decisions, ``(B, N)``: 1 for kept tokens, 0 for pruned ones that training leaves in
            place; None without such decisions.
        scores: of the current layer's tokens, ``(B, N)``, if tokens are reduced after it.
        pooled: whether the model itself reads the output of the last layer, and nothing else of the stack.
        held: whether a hook after the last layer reads this state, and ends the pass.
        spans: half-open ranges of the stack's input tokens within which they may merge, for hosts of several streams.
        merged_layers: number of layers in which tokens have merged, for these hosts.
        rerun: number of the backward pass that reruns this pass, and a token of the autograd node in it that does;
            None in a forward pass.
    """

    grid: Grid | None = None
    mask: FactoredMask | None = None
    token_map: TokenMap | None = None
    sizes: Tensor | None = None
    merge: Merge | None = None
    plan: tuple[int, ...] = ()
    counts: Tensor | None = None
    kept: Tensor | None = None
    scores: Tensor | None = None
    pooled: bool = False
    held: bool = False
    spans: tuple[tuple[int, int], ...] = ()
    merged_layers: int = 0
    rerun: Rerun | None = None

    def but(self, **changes: Any) -> StackPass:
        """Returns a copy with some fields changed: ``dataclasses.replace``, in a tenth of its time."""
        if torch.compiler.is_compiling():  # which can't trace what follows
            return replace(self, **changes)
        changed = object.__new__(StackPass)
        vars(changed).update(vars(self), **changes)
        return changed

    @property
    def begins_pooled(self) -> bool:
        """Whether the model has begun this pass and its blocks have not."""
        return self.pooled and not self.held

    def takes(self, tokens: Tensor, inside: bool = False) -> bool:
        """Returns whether the input of a block ``(B, N, C)`` may continue this pass, which may have been left halfway.

        A KeyboardInterrupt leaves it so, as torch calls no hook then, and a caller that runs only the first blocks.

        Args:
            tokens: the input.
            inside: whether it is that of the attention layer in the block, whose tokens may just have merged.
        """
        if inside:
            last = self.token_map if self.merge is None else self.merge.token_map
            return last is None or tokens.shape[1] == last.kept.shape[1]
        if self.merge is not None or self.token_map is None:
            return self.merge is None
        is_spread = self.held and not self.pooled
        return tokens.shape[1] == (self.token_map.length if is_spread else self.token_map.kept.shape[1])

    @property
    def has_reduced(self) -> bool:
        """Whether the tokens of the current layer differ from the stack's input: fewer of them, or another order."""
        return self.token_map is not None or self.merge is not None

    @property
    def query_map(self) -> TokenMap | None:
        """As ``token_map``, to the queries of the current layer."""
        return self.token_map if self.merge is None else _then(self.token_map, self.merge.token_map)


class SharedState:
    """State shared by the layers of one stack: its forward passes.

    Each thread has its own current pass, because ``nn.DataParallel`` runs replicas in threads over one such object, and
    one more for each backward pass that it executes, because the thread of a device executes those of all callers. A
    block's output is noted with its pass, so that passes may alternate: a block whose input is noted continues that
    pass, any other block continues the current one if its tokens are as many. Gradient checkpointing reruns blocks
    during the backward pass, on inputs that a wrapper such as FSDP may have copied into new tensors. The pass is then
    found in the autograd graph: it is noted at the node that made the block's input, which is reachable from the node
    that triggers the rerun.

    Notes live in the graph or, for tensors without one, beside the tensor, and no longer than these. Copies and pickles
    start empty.
    """

    def __init__(self) -> None:
        self._passes: dict[Key, StackPass] = {}
        self._notes = WeakTensorKeyDictionary()
        self._layers: dict[int, weakref.ref[Any]] = {}  # by their places in the stack

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    @property
    def current(self) -> StackPass:
        """The current pass of this thread; an empty one if none has begun."""
        return self._begun(_rerun()) or StackPass()

    def begin(self, grid: Grid | None = None, *, pooled: bool = False, held: bool = False) -> None:
        """Begins a pass, in place of the current one; the arguments are fields of :class:`StackPass`."""
        rerun = _rerun()
        self._put(rerun, StackPass(grid=grid, pooled=pooled, held=held, rerun=rerun))

    def update(self, **changes: Any) -> None:
        """Changes fields of the current pass; begins one if there is none."""
        rerun = _rerun()
        self._put(rerun, self.current.but(**changes, rerun=rerun))

    def reduce(self, token_map: TokenMap) -> None:
        """Notes a reduction of the tokens, applies it to the shared mask, and clears the scores."""
        here = self.current
        mask = here.mask and FactoredMask(*map(token_map.factor, here.mask))
        self.update(mask=mask, token_map=_then(here.token_map, token_map), scores=None)

    def merge(self, merge: Merge) -> None:
        """Notes a merge inside the current layer, and applies it to the queries of the shared mask."""
        mask = self.current.mask
        if mask is not None:
            mask = FactoredMask(merge.token_map.factor(mask.left), mask.right)
        self.update(merge=merge, mask=mask)

    def key_tokens(self, tokens: Tensor) -> Tensor:
        """Returns the tokens that a layer's keys are made of: its input ``(B, N, C)``, or those that merge in it."""
        merge = self.current.merge
        return tokens if merge is None else merge.tokens

    def places(self) -> tuple[Tensor | None, Tensor | None]:
        """Returns the places among the stack's input tokens that the current layer's queries and keys take.

        Returns:
            For the queries and for the keys, int64 ``(B, N)`` or ``(B, K)``; None where they are all of the input.
        """
        here = self.current
        keys = None if here.token_map is None else here.token_map.kept
        if here.merge is None:
            return keys, keys
        fewer = here.merge.token_map.kept
        return fewer if keys is None else keys.gather(1, fewer), keys

    def finish_merge(self) -> None:
        """Makes the merged tokens the keys of the layers that follow, and applies the merge to the shared mask."""
        here = self.current
        merge, mask = here.merge, here.mask
        assert merge is not None
        if mask is not None:
            mask = FactoredMask(mask.left, merge.token_map.factor(mask.right))
        self.update(mask=mask, token_map=_then(here.token_map, merge.token_map), sizes=merge.sizes, merge=None)

    def end(self) -> None:
        """Drops the current pass, and with it the graph that its mask holds."""
        self._passes.pop(_key(_rerun()), None)

    def end_all(self) -> None:
        """Drops the current passes of every thread."""
        self._passes.clear()

    def enter(self, tokens: Tensor, block: int, *, needs_pass: bool = False, inside: bool = False) -> None:
        """Continues the pass of a block's input; in a rerun, the pass of the block's first run.

        Args:
            tokens: the block's input, ``(B, N, C)``.
            block: unique number of the block.
            needs_pass: whether the block can't be rerun without its pass.
            inside: whether the block is the attention layer in one, whose tokens may just have merged.

        Raises:
            ConfigError: gradient checkpointing reruns a block that needs its pass, and the pass is unknown.
        """
        if torch.compiler.is_compiling():  # the compiler recomputes in its own graph
            return
        rerun = _rerun()
        here = self._begun(rerun)
        notes = self._notes_of(tokens)
        if rerun is None:
            then = _alive(notes.get(id(self)))
        elif inside and here is not None and here.merge is not None and here.takes(tokens, inside):
            then = None  # the rerun has merged these tokens itself
        else:
            # If the node descends from what layers share rather than from the block's input, search from the input.
            then = _nearest(torch._C._current_autograd_node(), block)
            then = then or _nearest(tokens.grad_fn, block, id(self))
            then = then or _alive(notes.get(block)) or _alive(notes.get(id(self)))
        if then is not None:
            here = then if rerun is None else then.but(rerun=rerun)
            self._put(rerun, here)
        elif here is not None and not here.takes(tokens, inside):
            self.end()
            here = None
        elif rerun is not None and here is None and needs_pass:
            raise ConfigError(
                "Gradient checkpointing reruns a block whose forward pass is unknown: it is reentrant, which cuts the "
                "gradient of what layers share, or the block's frozen input was copied into another tensor; checkpoint "
                "with use_reentrant=False, or use layers='multi' with keys='content'."
            )
        if here is not None:
            self._note_input(tokens, notes, block, here)

    def leave(self, tokens: Tensor) -> None:
        """Notes the current pass with a block's output, ``(B, N, C)``, for the lifetime of the output or its graph."""
        if torch.compiler.is_compiling():
            return
        here = self._begun(_rerun())
        if here is not None:
            # No reference cycle: the output is computed from the mask, so the mask's graph doesn't lead back to it.
            self._notes_of(tokens)[id(self)] = here

    def _begun(self, rerun: Rerun | None) -> StackPass | None:
        here = self._passes.get(_key(rerun))
        return here if here is not None and here.rerun == rerun else None

    def _put(self, rerun: Rerun | None, here: StackPass) -> None:
        key = _key(rerun)
        if rerun is not None and key not in self._passes:
            # The backward pass frees its callbacks when it ends, also if it fails and calls none of them.
            ending: Any = partial(self._passes.pop, key, None)
            weakref.finalize(ending, ending.func, key, None).atexit = False
            Variable._execution_engine.queue_callback(ending)
        self._passes[key] = here

    def _note_input(self, tokens: Tensor, notes: dict[int, Any], block: int, here: StackPass) -> None:
        if here.rerun is not None and _alive(notes.get(block)) is not None:
            return  # keep the first run's note for a second backward pass
        shares = here.mask is not None or here.kept is not None
        # Without gradients, what layers share has no graph: a rerun with it would cut its gradient.
        if tokens.grad_fn is None or torch.is_grad_enabled() or not shares:
            # Two blocks may have the same input, from which the first one made the mask. Earlier outputs hold that
            # pass; the note here is weak, because a graph noted at one of its own nodes would never be freed. Nothing
            # else holds the pass of a merge inside of a block, whose tensors are made from others than this input.
            is_held = (shares or here.token_map is not None) and here.merge is None
            notes[block] = weakref.ref(here) if is_held else here

    def _notes_of(self, tokens: Tensor) -> dict[int, Any]:
        node: Any = tokens.grad_fn
        notes: dict[int, Any] = self._notes.setdefault(tokens, {}) if node is None else node.metadata
        return notes

    def join(self, layer: Layer, place: int) -> None:
        """Adds a layer at its place in the stack; the last layer that remains in the model ends a pass.

        A shallow copy of a layer that has joined is not added.
        """
        layer.place = place
        there = self._layers.get(place)
        if there is None or there() is None:
            self._layers[place] = weakref.ref(layer, self._drop)

    def _drop(self, gone: weakref.ref[Any]) -> None:
        self._layers = {place: layer for place, layer in self._layers.items() if layer is not gone}
        last = self._layers[max(self._layers)]() if self._layers else None
        if last is not None:
            vars(last)["is_last"] = True  # not by nn.Module's setter, which is gone when the interpreter exits


def _then(before: TokenMap | None, later: TokenMap) -> TokenMap:
    return later if before is None else before.then(later)


@torch.compiler.assume_constant_result  # a compiled graph runs in one thread
def _thread() -> int:
    return threading.get_ident()


def _key(rerun: Rerun | None) -> Key:
    return _thread(), None if rerun is None else rerun[0]


def _rerun() -> Rerun | None:
    """Returns the backward pass that this thread is executing and a token of its current node; None outside of any."""
    if torch.compiler.is_compiling():
        return None
    node: Any = torch._C._current_autograd_node()
    if node is None:
        return None
    # Not the node: it would be held, with its graph. Not its id: torch may make a new object for the node in each call.
    return torch._C._current_graph_task_id(), node.metadata.setdefault(_TOKEN, object())


def _alive(note: StackPass | weakref.ref[StackPass] | None) -> StackPass | None:
    return note() if isinstance(note, weakref.ref) else note


def _nearest(node: Node | None, *keys: int) -> StackPass | None:
    """Returns the pass noted under one of the keys at a node, or at the nearest node upstream."""
    queue: deque[Any] = deque([] if node is None else [node])
    seen = {None, *queue}
    while queue:
        nearest = queue.popleft()
        for key in keys:
            if (found := _alive(nearest.metadata.get(key))) is not None:
                return found
        inputs = {before for before, _ in nearest.next_functions} - seen
        seen |= inputs
        queue.extend(inputs)
    return None
