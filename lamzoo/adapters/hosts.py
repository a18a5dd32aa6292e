"""What every adapter tells of its host: the attention layers that can carry a mask; knows no host library."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
import torch.fx
from torch import nn

from lamzoo.errors import ExportError
from lamzoo.lam import Lam, SharedState
from lamzoo.lam.resize import Grid

HostModule = TypeVar("HostModule", bound=nn.Module)


@dataclass(frozen=True)
class Slot:
    """One attention layer of a host that can carry a mask.

    Attributes:
        path: of the attention module in the model, such as ``"blocks.3.attn"``.
        stack: layers with the same value belong together: with ``layers="single"`` they share one mask.
        query_dim: width of the tokens that ask.
        key_dim: width of the tokens that are attended to.
        num_heads: attention heads.
        like: a parameter whose device and dtype the mask network takes.
        attach: puts the mask into the host.
        length: key positions, prefix tokens included, where the host knows them.
        num_prefix_tokens: class and register tokens at the start.
        grid: ``(rows, columns)`` of the patches behind them; ``None`` for a sequence.
        watch_grid: registers the hook that begins a pass with its patch grid; given the stack's state.
        no_positions: why the layer can't have a mask over key positions, where that is so.
    """

    path: str
    stack: str
    query_dim: int
    key_dim: int
    num_heads: int
    like: torch.Tensor
    attach: Callable[[Lam], None]
    length: int | None = None
    num_prefix_tokens: int = 0
    grid: Grid | None = None
    watch_grid: Callable[[SharedState], None] | None = None
    no_positions: str | None = None


@dataclass(frozen=True)
class TokenHost:
    """A stack of blocks whose tokens may become fewer on the way, and how the host pools those that are left.

    Attributes:
        num_prefix_tokens: class and register tokens at the start, which always stay.
        has_class_token: whether the first of them stands for all tokens.
        pool: ``"token"``, ``"avg"``, ``""`` for none, or another.
        num_unpooled: tokens at the start that a mean leaves out.
        last: the module whose output, ``(B, N, C)``, is pooled.
    """

    num_prefix_tokens: int
    has_class_token: bool
    pool: str
    num_unpooled: int
    last: nn.Module


class SharedStateHook:
    """A hook that works for a stack's shared state; :func:`lamzoo.remove_lam` knows it by this class."""

    def __init__(self, shared: SharedState) -> None:
        self.shared = shared


class EnterBlock(SharedStateHook):
    """Forward pre-hook of a block: finds the pass that its input belongs to, also when checkpointing reruns it.

    Args:
        shared: the stack's state.
        needs_pass: whether the block can't be rerun without its pass.
    """

    def __init__(self, shared: SharedState, needs_pass: bool) -> None:
        super().__init__(shared)
        self.needs_pass = needs_pass

    # Pickles of 0.1.0 have the hook without needs_pass, and registered it without keyword arguments.
    needs_pass: bool = False

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        tokens = _first_tensor((*args, *kwargs.values()))
        if tokens is not None:
            self.shared.enter(tokens, id(self), needs_pass=self.needs_pass)


class LeaveBlock(SharedStateHook):
    """Forward hook of a block: notes the pass with its output, or ends the pass where the block raised."""

    def __call__(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tokens = _first_tensor(output if isinstance(output, (tuple, list)) else (output,))
        if tokens is not None:
            self.shared.leave(tokens)
        elif output is None:
            self.shared.end()


def watch_block(block: nn.Module, enter: EnterBlock, leave: LeaveBlock) -> None:
    """Registers the hooks that keep a block's pass apart from others."""
    block.register_forward_pre_hook(enter, with_kwargs=True)
    block.register_forward_hook(leave, always_call=True)


def remove_hooks(module: nn.Module, kinds: tuple[type[SharedStateHook], ...]) -> None:
    """Removes a module's forward hooks and pre-hooks of some kinds."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, kinds)]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)


def _first_tensor(values: Iterable[Any]) -> torch.Tensor | None:
    return next((value for value in values if isinstance(value, torch.Tensor)), None)


class HostTakeover(nn.Module):
    """An attention layer that takes over the parameters, submodules, hooks and attributes of a host's own.

    Parameter names stay those of the host, and :meth:`release` gives the original class back. In a symbolic trace
    (``torch.fx``, torchvision's and timm's ``create_feature_extractor``) the layer is one node: what a mask does
    depends on shapes and on the other layers.
    """

    lam: Lam
    host_class: type[nn.Module]

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        proxy = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.fx.Proxy)), None)
        if proxy is None:
            return super()._call_impl(*args, **kwargs)
        tracer: Any = proxy.tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by ``torch.jit.script``, which would fail in the middle of a mask."""
        raise ExportError(
            "torch.jit.script can't compile a model with learnable masks; use torch.jit.trace, torch.export or "
            "lamzoo.export_model."
        )

    if TYPE_CHECKING:  # the host's attributes are known at run time alone

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def take_over(cls, host: nn.Module, lam: Lam) -> HostTakeover:
        """Returns a new module that shares the host's parameters and carries ``lam``; the host is left as it is."""
        module = _with_state_of(cls, host)
        module.host_class = type(host)
        module.lam = lam
        return module

    def release(self) -> nn.Module:
        """Returns a module of the host's own class that shares the parameters, without the mask."""
        host = _with_state_of(self.host_class, self)
        del host.host_class, host.lam
        return host


def _with_state_of(cls: type[HostModule], source: nn.Module) -> HostModule:
    # The dictionaries of parameters, submodules and hooks are copied, so that neither module sees later changes
    # of the other; the tensors and submodules in them are shared.
    module = cls.__new__(cls)
    module.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in source.__dict__.items()})
    return module


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Puts ``new`` where ``model.get_submodule(path)`` is now."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)
