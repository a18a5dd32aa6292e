"""The module that an attention layer carries as ``.lam``: mask network, state shared with other layers, recorder."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lamzoo.errors import ConfigError
from lamzoo.lam.attention import check_inputs, lam_attention
from lamzoo.lam.config import LamConfig
from lamzoo.lam.kernels.eager import attention_weights
from lamzoo.lam.masks import FactoredMask, MaskNetwork
from lamzoo.lam.pruning import Attended, Reduction, among_kept, learn_decisions, with_decisions
from lamzoo.lam.tables import Grid


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


@dataclass(frozen=True)
class StackPass:
    """What one forward pass of a stack knows: the patch grid of its input, a mask that layers share, tokens gone.

    Attributes:
        grid: ``(rows, columns)`` of the patches, where a host has them.
        mask: the first layer's, with ``layers="single"``, reduced as the tokens are.
        reductions: what tokens went through on their way to the current layer.
        kept: straight-through decisions over the tokens, ``(B, N)``, 1 for those that stay and 0 for those that left,
            where training keeps them all in place.
        scores: of the current layer's tokens, ``(B, N)``, where tokens are to leave behind it.
        backward: id of the backward pass in which this pass ran (again), -1 outside of any.
    """

    grid: Grid | None = None
    mask: FactoredMask | None = None
    reductions: tuple[Reduction, ...] = ()
    kept: Tensor | None = None
    scores: Tensor | None = None
    backward: int = -1


class SharedState:
    """What the layers of one stack hand each other during a forward pass.

    Each thread has a pass of its own, because ``nn.DataParallel`` runs its replicas in threads over one such object.
    Gradient checkpointing runs a block once more during the backward pass, perhaps after other inputs went through
    the model; :meth:`enter` recognises the block's input and brings its pass back. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._passes: dict[int, StackPass] = {}
        self._pass_of_input = WeakTensorKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    @property
    def current(self) -> StackPass:
        """The pass that this thread is in; an empty one where none began."""
        here = self._passes.get(_thread())
        return here if here is not None and here.backward == _backward() else StackPass()

    def begin(
        self,
        grid: Grid | None = None,
        mask: FactoredMask | None = None,
        reductions: tuple[Reduction, ...] = (),
        kept: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> None:
        """Starts a pass, or restates the current one."""
        self._passes[_thread()] = StackPass(grid, mask, reductions, kept, scores, _backward())

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

    def enter(self, tokens: Tensor) -> None:
        """Notes that a block begins to work on ``tokens``, and when recomputing returns to the pass they belong to."""
        if torch.compiler.is_compiling():  # the compiler recomputes in its own graph
            return
        if _backward() == -1:
            self._pass_of_input[tokens] = self.current
        elif tokens in self._pass_of_input:
            then = self._pass_of_input[tokens]
            self.begin(then.grid, then.mask, then.reductions, then.kept)


@torch.compiler.assume_constant_result  # compiled code only ever keeps a pass while it runs in one thread
def _thread() -> int:
    return threading.get_ident()


def _backward() -> int:
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


class Lam(nn.Module):
    """The learnable attention mask of one layer.

    Args:
        config: what the mask is made of.
        network: this layer's mask network; ``None`` for a layer that uses the first layer's mask
            (``layers="single"``).
        shared: the state of the stack that the layer belongs to.
        is_last: whether the stack ends here.

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
                    "A layer with layers='single' has no mask to share: either the stack did not run from its first "
                    "masked layer on, or reentrant gradient checkpointing, which cuts the mask's gradient, reran it; "
                    "use layers='multi'."
                )
            mask = here.mask
        else:
            mask = self.network(query_tokens, key_tokens, here.grid, here.reductions, present)
            if self.config.layers == "single" and not self.is_last:
                self.shared.begin(here.grid, mask, here.reductions, here.kept)
        if self.is_last and (here.kept is None or here.backward != -1):  # else whoever pools the tokens ends the pass
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
