"""The module that an attention layer carries as ``.lam``: mask network, state shared with other layers, recorder."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import Node
from torch.utils.weak import WeakTensorKeyDictionary

from lamzoo.errors import ConfigError
from lamzoo.lam.attention import check_inputs, lam_attention
from lamzoo.lam.config import LamConfig
from lamzoo.lam.kernels.eager import attention_weights
from lamzoo.lam.masks import FactoredMask, MaskNetwork
from lamzoo.lam.pruning import Attended, Reduction, among_kept, learn_decisions, with_decisions
from lamzoo.lam.resize import Grid


@dataclass
class MaskRecord:
    """What one attention layer did in one forward pass.

    Attributes:
        mask: the factors of M.
        attention: softmax weights under the mask, ``(B, H, Nq, Nk)``, detached.
        importance: mean mask value of each key, ``(B, Hm, Nk)``, detached.
    """

    mask: FactoredMask
    attention: Tensor
    importance: Tensor


Rerun = tuple[int, int]


@dataclass(frozen=True, eq=False)
class StackPass:
    """What one forward pass of a stack knows: the patch grid of its input, a mask that layers share, tokens gone.

    Attributes:
        grid: ``(rows, columns)`` of the patches, where a host has them.
        mask: the first layer's, with ``layers="single"``, reduced as the tokens are.
        reductions: what tokens went through on their way to the current layer.
        kept: straight-through decisions over the tokens, ``(B, N)``, 1 for those that stay and 0 for those that left,
            where training keeps them all in place.
        scores: of the current layer's tokens, ``(B, N)``, where tokens are to leave behind it.
        rerun: the backward pass, and the autograd node in it, that run this pass again; None in a forward pass.
    """

    grid: Grid | None = None
    mask: FactoredMask | None = None
    reductions: tuple[Reduction, ...] = ()
    kept: Tensor | None = None
    scores: Tensor | None = None
    rerun: Rerun | None = None


class SharedState:
    """The forward passes of one stack, and what its layers hand each other during each of them.

    Each thread has a current pass of its own, because ``nn.DataParallel`` runs replicas in threads over one such
    object. A block's output is noted with its pass, so that passes may take turns: a block that gets a noted tensor
    goes on with that pass, and with the current one otherwise. Gradient checkpointing runs blocks once more during the
    backward pass, on inputs that a wrapper such as FSDP may have put into other tensors. There the pass is found in the
    autograd graph: it is noted at the node that made the block's input, to which the node that asks for the rerun
    leads back.

    Notes are kept in the graph, or, for tensors without one, beside the tensor, and live no longer than these. Copies
    and pickles start empty.
    """

    def __init__(self) -> None:
        self._passes: dict[int, StackPass] = {}
        self._notes = WeakTensorKeyDictionary()
        self._layers: dict[int, weakref.ref[Lam]] = {}  # by their places in the stack

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    @property
    def current(self) -> StackPass:
        """The pass that this thread is in; an empty one where none began."""
        here = self._passes.get(_thread())
        return here if here is not None and here.rerun == _rerun() else StackPass()

    def begin(
        self,
        grid: Grid | None = None,
        mask: FactoredMask | None = None,
        reductions: tuple[Reduction, ...] = (),
        kept: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> None:
        """Starts a pass, or restates the current one."""
        self._passes[_thread()] = StackPass(grid, mask, reductions, kept, scores, _rerun())

    def reduce(self, reduction: Reduction) -> None:
        """Notes that the tokens became fewer, and with them what the layers share of them; the scores are used up."""
        here = self.current
        mask = here.mask and FactoredMask(*map(reduction.factor, here.mask))
        self.begin(here.grid, mask, (*here.reductions, reduction))

    def keep(self, kept: Tensor) -> None:
        """Notes which tokens stay, where all of them remain in place; the scores are used up."""
        here = self.current
        self.begin(here.grid, here.mask, here.reductions, kept)

    def end(self) -> None:
        """Forgets the current pass, and with it the graph that its mask holds."""
        self._passes.pop(_thread(), None)

    def enter(self, tokens: Tensor, block: int, *, needs_pass: bool = False) -> None:
        """Goes on with the pass that a block's input belongs to; in a backward pass, with the one it had before.

        Args:
            tokens: the block's input, ``(B, N, C)``.
            block: a number that no other block has.
            needs_pass: whether the block can't run again without knowing its pass.

        Raises:
            ConfigError: gradient checkpointing runs a block again whose pass is unknown and needed.
        """
        if torch.compiler.is_compiling():  # the compiler recomputes in its own graph
            return
        rerun, here, thread = _rerun(), self._passes.get(_thread()), _thread()
        begun = here is not None and here.rerun == rerun
        notes = self._notes_of(tokens)
        if rerun is None:
            then = _alive(notes.get(id(self)))
        else:
            # Where the node isn't behind the block's input but behind what layers share, the input itself leads there.
            then = _nearest(torch._C._current_autograd_node(), block)
            then = then or _nearest(tokens.grad_fn, block, id(self))
            then = then or _alive(notes.get(block)) or _alive(notes.get(id(self)))
        if then is not None:
            self._passes[thread] = then if rerun is None else replace(then, rerun=rerun)
        elif rerun is not None and not begun and needs_pass:
            raise ConfigError(
                "Gradient checkpointing reruns a block whose forward pass is unknown: it is reentrant, which cuts the "
                "gradient of what layers share, or the block's frozen input was put into another tensor; checkpoint "
                "with use_reentrant=False, or use layers='multi' with keys='content'."
            )
        if rerun is not None and not begun:
            forget: Any = partial(self._passes.pop, thread, None)
            Variable._execution_engine.queue_callback(forget)
        self._note_input(tokens, notes, block)

    def leave(self, tokens: Tensor) -> None:
        """Notes the current pass with a block's output, ``(B, N, C)``, for as long as it or its graph lives."""
        here = self._passes.get(_thread())
        if not torch.compiler.is_compiling() and here is not None and here.rerun == _rerun():
            # No cycle of references: the output comes from the mask, so that the mask's graph doesn't lead back to it.
            self._notes_of(tokens)[id(self)] = here

    def _note_input(self, tokens: Tensor, notes: dict[int, Any], block: int) -> None:
        here = self._passes.get(_thread())
        if here is None or here.rerun != _rerun():
            return
        if here.rerun is not None and _alive(notes.get(block)) is not None:
            return  # the first run's, which a second backward pass looks for
        shares = here.mask is not None or here.kept is not None
        # Without gradients, what layers share is noted nowhere in a graph: a rerun would cut its gradient.
        if tokens.grad_fn is None or torch.is_grad_enabled() or not shares:
            # Two blocks may have one input, from which the first of them made the mask: then it is held by the outputs
            # before, and here weakly, as what has a graph that leads to where it is noted would never go.
            notes[block] = weakref.ref(here) if shares or here.reductions else here

    def _notes_of(self, tokens: Tensor) -> dict[int, Any]:
        node: Any = tokens.grad_fn
        notes: dict[int, Any] = self._notes.setdefault(tokens, {}) if node is None else node.metadata
        return notes

    def join(self, layer: Lam, place: int) -> None:
        """Adds a layer at its place in the stack; the last one that is left in the model ends a pass.

        A shallow copy of a layer that is there is not added.
        """
        layer.place = place
        there = self._layers.get(place)
        if there is None or there() is None:
            self._layers[place] = weakref.ref(layer, self._drop)

    def _drop(self, gone: weakref.ref[Lam]) -> None:
        self._layers = {place: layer for place, layer in self._layers.items() if layer is not gone}
        last = self._layers[max(self._layers)]() if self._layers else None
        if last is not None:
            vars(last)["is_last"] = True  # past nn.Module's own setter, which is gone when the interpreter ends


@torch.compiler.assume_constant_result  # compiled code only ever keeps a pass while it runs in one thread
def _thread() -> int:
    return threading.get_ident()


def _rerun() -> Rerun | None:
    """Returns the backward pass and the node of it that are at work in this thread; None outside of any."""
    if torch.compiler.is_compiling():
        return None
    node = torch._C._current_autograd_node()
    return None if node is None else (torch._C._current_graph_task_id(), id(node))


def _alive(note: StackPass | weakref.ref[StackPass] | None) -> StackPass | None:
    return note() if isinstance(note, weakref.ref) else note


def _nearest(node: Node | None, *keys: int) -> StackPass | None:
    """Returns the pass noted under one of the keys at a node, or at the nearest one from which its inputs came."""
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


class Lam(nn.Module):
    """The learnable attention mask of one layer.

    Args:
        config: what the mask is made of.
        network: this layer's mask network; ``None`` for a layer that uses the first layer's mask
            (``layers="single"``).
        shared: the state of the stack that the layer belongs to.
        is_last: whether the stack ends here. A layer also becomes the last one when those behind it, which joined
            ``shared`` too, leave the model (``prune_intermediate_layers``).

    Attributes:
        is_fresh: whether the mask was initialised and no state dict has been loaded into it since.
    """

    def __init__(
        self, config: LamConfig, network: MaskNetwork | None, shared: SharedState, is_last: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.network = network
        self.shared = shared
        self.is_last = is_last
        self.is_fresh = True
        self.place: int | None = None
        self.backend = "auto"
        self.recorder: Callable[[MaskRecord], None] | None = None
        self.scorer: Callable[[Attended], Tensor] | None = None

    def forward(self, query_tokens: Tensor, key_tokens: Tensor, present: Tensor | None = None) -> FactoredMask:
        """Returns the mask of these tokens.

        Args:
            query_tokens: ``(B, Nq, C)``.
            key_tokens: ``(B, Nk, C)``; the same tensor in self-attention.
            present: bool ``(B, Nk)``, False where a key is padding, which has no position; None where there is none.

        Returns:
            Factors ``(B, Hm, Nq, rank + 1)`` and ``(B | 1, Hm, Nk, rank + 1)``.

        Raises:
            ConfigError: the layer shares the first layer's mask, which is not at hand.
        """
        here = self.shared.current
        if self.network is None:
            if here.mask is None:
                raise ConfigError(
                    "A layer with layers='single' has no mask to share, because the stack did not run from its first "
                    "masked layer on; run it from there, or use layers='multi'."
                )
            mask = here.mask
        else:
            mask = self.network(query_tokens, key_tokens, here.grid, here.reductions, present)
            if self.config.layers == "single" and not self.is_last:
                self.shared.begin(here.grid, mask, here.reductions, here.kept)
        pooled = here.kept is not None and here.rerun is None  # whoever pools the tokens ends the pass
        if self.is_last and not pooled:
            self.shared.end()
        return mask

    def attend(
        self,
        query_tokens: Tensor,
        key_tokens: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        allowed: Tensor | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
        dropout_p: float = 0.0,
        scale: float | None = None,
        present: Tensor | None = None,
    ) -> Tensor:
        """Attention under this layer's mask; the arguments are those of :meth:`forward` and of ``lam_attention``.

        While a recorder is set (see :func:`lamzoo.capture_masks`) the eager backend is used, since fused attention
        has no weights to show.

        Returns:
            ``(B, H, Nq, dv)``, the dtype of ``query``.
        """
        if self.recorder is not None:
            return self.attend_with_weights(
                query_tokens, key_tokens, query, key, value,
                allowed=allowed, bias=bias, is_causal=is_causal, dropout_p=dropout_p, scale=scale, present=present,
            )[0]  # fmt: skip
        kept = self.shared.current.kept
        mask = self(query_tokens, key_tokens, present)
        self._score(query, key, value, mask, scale)
        how: dict[str, Any] = {
            "op": self.config.op, "bias": bias, "is_causal": is_causal, "scale": scale, "backend": self.backend
        }  # fmt: skip
        if kept is None:
            return lam_attention(query, key, value, mask, allowed=allowed, dropout_p=dropout_p, **how)
        seen = among_kept(kept, allowed)
        out = lam_attention(query, key, value, mask, allowed=seen, dropout_p=dropout_p, **how)
        query, key, mask = query.detach(), key.detach(), mask.detach()
        attended = lam_attention(query, key, with_decisions(value, kept), mask, allowed=allowed, **how)
        return learn_decisions(out, attended)

    def attend_with_weights(
        self,
        query_tokens: Tensor,
        key_tokens: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        allowed: Tensor | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
        dropout_p: float = 0.0,
        scale: float | None = None,
        present: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`attend`, written out, for hosts that ask for the attention weights too.

        Returns:
            The output ``(B, H, Nq, dv)``, in the dtype of ``query``, and the weights ``(B, H, Nq, Nk)`` that made it,
            after dropout.
        """
        kept = self.shared.current.kept
        mask = self(query_tokens, key_tokens, present)
        check_inputs(query, key, value, mask, self.config.op, allowed, bias, scale)
        self._score(query, key, value, mask, scale)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        how: dict[str, Any] = {"op": self.config.op, "bias": bias, "is_causal": is_causal, "scale": scale}
        seen = allowed if kept is None else among_kept(kept, allowed)
        weights = attention_weights(query, key, mask, allowed=seen, **how)
        detached = mask.detach()
        if self.recorder is not None:
            self.recorder(MaskRecord(detached, weights.detach(), detached.importance()))
        weights = torch.dropout(weights, dropout_p, dropout_p > 0)
        out = (weights @ value).to(query.dtype)
        if kept is not None:
            everywhere = attention_weights(query.detach(), key.detach(), detached, allowed=allowed, **how)
            out = learn_decisions(out, (everywhere @ with_decisions(value, kept)).to(query.dtype))
        return out, weights

    def _score(self, query: Tensor, key: Tensor, value: Tensor, mask: FactoredMask, scale: float | None) -> None:
        """Leaves the scores of the tokens for whoever prunes behind this layer's block."""
        if self.scorer is not None:
            here = self.shared.current
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            present = None if here.kept is None else here.kept.detach() > 0
            scores = self.scorer(Attended(query, key, value, mask, self.config.op, scale, present))
            self.shared.begin(here.grid, here.mask, here.reductions, here.kept, scores)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"is_fresh": False, "place": None} | state)  # pickles of 0.1.0 lack these
        if self.place is not None:
            self.shared.join(self, self.place)

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
                    del state_dict[key]  # torch's own copy, from which it would go on to load the network
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.is_fresh = self.is_fresh and not loads

    def extra_repr(self) -> str:
        return "" if self.network is not None else "shares the first layer's mask"


_CONFIG = "lam_config"


def carried_configs(state_dict: Mapping[str, Any]) -> dict[str, LamConfig]:
    """Returns the configurations of masks by path, which the state dict of a masked model carries as metadata."""
    metadata: Mapping[str, Mapping[str, Any]] = getattr(state_dict, "_metadata", {})
    return {path: LamConfig.from_dict(entry[_CONFIG]) for path, entry in metadata.items() if _CONFIG in entry}


def carry_configs(state_dict: Mapping[str, Tensor], configs: Mapping[str, LamConfig]) -> OrderedDict[str, Tensor]:
    """Returns a state dict that carries configurations of masks by path, as that of a model does."""
    carrier = OrderedDict(state_dict)
    metadata = {path: {"version": Lam._version, _CONFIG: config.to_dict()} for path, config in configs.items()}
    vars(carrier)["_metadata"] = OrderedDict(metadata)
    return carrier
