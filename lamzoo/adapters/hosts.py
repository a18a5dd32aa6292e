"""How masks get into a model of another library: the adapter protocol, its records, and what adapters share.

To support another library, write a :class:`HostAdapter` in a file of this folder and add it to :data:`ADAPTERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Protocol, Self, TypeVar

import torch
import torch.fx
from torch import nn

from lamzoo.errors import ExportError, UnsupportedHostError, class_name
from lamzoo.lam import Lam, SharedState
from lamzoo.lam.fused import Between, FusedAttention, Projection, takes_fused_form, unsupported
from lamzoo.lam.kernels.eager import is_transformed
from lamzoo.lam.resize import Grid
from lamzoo.lam.unmasked import Unmasked

HostModule = TypeVar("HostModule", bound=nn.Module)
T = TypeVar("T")

#: Reason why tokens can't be reduced in hosts that have one; a clause, as in :class:`Pooling`.
POSITION_BIAS = (
    "adds a bias for each pair of positions to the scores, and tokens that are reduced are no longer one for each "
    "position; use a model with position embeddings or rotary ones"
)

#: Library (top-level package of a host's classes) to its adapter, in the order in which they are consulted. An adapter
#: is imported when a model has a class of its library.
ADAPTERS: dict[str, str] = {
    "timm": "lamzoo.adapters.timm:TimmAdapter",
    "open_clip": "lamzoo.adapters.open_clip:OpenClipAdapter",
    "transformers": "lamzoo.adapters.transformers:TransformersAdapter",
    "torch": "lamzoo.adapters.mha:MultiheadAttentionAdapter",
    "lamzoo": "lamzoo.adapters.zoo:ZooAdapter",
}


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One attention layer of a host that can carry a mask.

    Attributes:
        path: of the attention layer in the model, such as ``"blocks.3.attn"``.
        stack: layers with the same value form a stack; with ``layers="single"`` they share one mask.
        query_dim: width of the query tokens.
        key_dim: width of the key tokens.
        num_heads: attention heads.
        other_paths: further places of the same layer in the model.
        watched: path of the module whose calls tell forward passes apart, which gradient checkpointing has to rerun
            with its hooks; by default the block that holds the layer.
    """

    path: str
    stack: str
    query_dim: int
    key_dim: int
    num_heads: int
    other_paths: tuple[str, ...] = ()
    watched: str | None = None


@dataclass(frozen=True)
class TokenLayout:
    """The order of the key tokens of an attention layer, as far as the host defines it.

    Attributes:
        length: number of tokens, prefix tokens included.
        num_prefix_tokens: class and register tokens at the start.
        grid: ``(rows, columns)`` of the patches behind them, at the input size that the model was built for; None for
            a sequence.
        grid_at: the patch grid for an image of ``(height, width)`` pixels.
        patch_embed: the module that takes the image, where the grid may change, as ``grid_at`` tells.
        no_positions: the reason why the layer can't have a mask with ``keys="position"``; None if it can.
        no_sharing: the reason why it can't share a mask with the layers of its stack, ``layers="single"``; likewise.
        pooling: how the host pools the tokens; None where that is unknown, and tokens can't be reduced.
    """

    length: int | None = None
    num_prefix_tokens: int = 0
    grid: Grid | None = None
    grid_at: Callable[[tuple[int, int]], Grid] | None = None
    patch_embed: nn.Module | None = None
    no_positions: str | None = None
    no_sharing: str | None = None
    pooling: Pooling | None = None


def _reads_no_blocks(kwargs: Mapping[str, Any]) -> bool:
    return False


@dataclass(frozen=True)
class Pooling:
    """How a host pools the tokens of a stack of blocks, between which tokens may be removed or merged.

    Attributes:
        blocks: path of the list of blocks, each with one attention layer.
        root: path of the module whose forward pass runs the blocks and pools their tokens.
        kind: ``"token"``, ``"avg"``, ``""`` for none, or another.
        has_class_token: whether the first prefix token is a class token.
        num_unpooled: tokens at the start that the mean leaves out.
        last: the module whose output, ``(B, N, C)``, is pooled.
        norm: name of the norm of a block whose output is the input of the block's attention.
        attn: path of the attention layer in a block.
        checkpoints_forward: whether the library's gradient checkpointing reruns the forward pass of a block without the
            hooks on it, so that the attention layer has to find the pass.
        reads_prefix_only: whether the forward pass of ``root`` reads class and register tokens alone of what the last
            block returns; called in each pass, because users may change it.
        last_linear: the layer of the last block that is applied to each token by itself and added to it; None if there
            is none.
        reads_mean_only: whether the forward pass of ``root`` reads the mean over the tokens alone of what the last
            block returns, without the first ``num_unpooled``; called in each pass.
        reads_blocks: whether a forward pass of ``root`` with these keyword arguments returns the outputs of blocks;
            called in each pass.
        arguments: names of the arguments besides the tokens that a block may be called with: those that change nothing,
            and tensors of which its attention selects the rows for tokens that have been removed or merged.
        padding: name of the attention mask that a block is called with where samples are padded; it hides padding and
            nothing else.
        no_merging: the reason why tokens can't be merged, a clause that follows the path of the blocks; None if they
            can.
        no_pruning: likewise for pruning.
    """

    blocks: str
    root: str
    kind: str
    has_class_token: bool
    num_unpooled: int
    last: nn.Module
    norm: str = "norm1"
    attn: str = "attn"
    checkpoints_forward: bool = False
    reads_prefix_only: Callable[[], bool] = field(default=bool, compare=False)  # bool() is False
    last_linear: nn.Module | None = None
    reads_mean_only: Callable[[], bool] = field(default=bool, compare=False)
    reads_blocks: Callable[[Mapping[str, Any]], bool] = field(default=_reads_no_blocks, compare=False)
    arguments: frozenset[str] = frozenset()
    padding: str | None = None
    no_merging: str | None = None
    no_pruning: str | None = None


class HostAdapter(Protocol):
    """Puts masks into the models of one library, and takes them out again.

    A mask is a submodule named ``lam`` of the attention layer. The state-dict keys of the host never change.

    Attributes:
        owns_multihead_attention: whether every ``nn.MultiheadAttention`` that a module of the library holds is left to
            this adapter, to mask or to leave alone; if False, the adapter of torch masks it.
    """

    owns_multihead_attention: ClassVar[bool]

    def sites(self, model: nn.Module) -> Iterable[AttentionSite]:
        """Finds the attention layers that will carry masks, those of a stack in order of the forward pass.

        Raises:
            UnsupportedHostError: the model, or a part of it, has attention that can't carry a mask; names it.
        """
        ...

    def token_layout(self, model: nn.Module, path: str) -> TokenLayout | None:
        """Returns the token layout of the attention layer at ``path``, with or without a mask.

        None if the layer doesn't belong to the library, or its layout is unknown.
        """
        ...

    def stacks(self, model: nn.Module) -> Iterable[TokenLayout]:
        """Finds the stacks of blocks whose pooling is known, and returns their layouts, each with its ``pooling``.

        With masks or without. Tokens can be reduced in these stacks, unless the pooling gives the reason why not.
        """
        ...

    def wrap(self, model: nn.Module, lams: Mapping[AttentionSite, Lam | Unmasked]) -> None:
        """Puts masks into the attention layers at the sites, or what token reduction needs of them, in place."""
        ...

    def unwrap(self, model: nn.Module, kind: type[Lam | Unmasked] | None = None) -> None:
        """Removes what :meth:`wrap` put in, or that of one kind, in place; any other model is left unchanged."""
        ...


def adapters_of(model: nn.Module) -> dict[str, HostAdapter]:
    """Returns the adapters of the libraries that the classes of a model come from, by library."""
    found = {library for module in model.modules() for library in libraries_of(module)}
    return {library: resolve_name(home)() for library, home in ADAPTERS.items() if library in found}


def libraries_of(module: nn.Module) -> set[str]:
    """Returns the top-level packages of a module's class and its bases; for a masked layer, its host's too."""
    classes = type(module).__mro__
    if isinstance(module, HostTakeover):
        classes += module.host_class.__mro__
    return {cls.__module__.partition(".")[0] for cls in classes}


def token_layout(model: nn.Module, path: str) -> TokenLayout:
    """Returns the token layout of the attention layer at ``path``, with or without a mask; empty where unknown."""
    layouts = (adapter.token_layout(model, path) for adapter in adapters_of(model).values())
    return next((layout for layout in layouts if layout is not None), TokenLayout())


class SharedStateHook:
    """A hook that updates the shared state of a stack; :func:`lamzoo.remove_lam` removes every hook of this class."""

    def __init__(self, shared: SharedState) -> None:
        self.shared = shared


class EnterBlock(SharedStateHook):
    """Forward pre-hook of a block: finds the forward pass of its input, also when gradient checkpointing reruns it.

    Args:
        shared: state of the stack.
        needs_pass: whether rerunning the block without its pass is an error.
        inside: whether the module is the attention layer in the block, whose tokens may just have merged.
    """

    def __init__(self, shared: SharedState, needs_pass: bool, inside: bool = False) -> None:
        super().__init__(shared)
        self.needs_pass, self.inside = needs_pass, inside

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tokens = _first(torch.Tensor, (*args, *kwargs.values()))
        if tokens is not None:
            self.shared.enter(tokens, id(self), needs_pass=self.needs_pass, inside=self.inside)


class LeaveBlock(SharedStateHook):
    """Forward hook of a block: attaches the pass to its output, or ends the pass if the block raised."""

    def __call__(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tokens = _first(torch.Tensor, output if isinstance(output, (tuple, list)) else (output,))
        if tokens is not None:
            self.shared.leave(tokens)
        elif output is None:
            self.shared.end()


class NoteGrid(SharedStateHook):
    """Forward pre-hook of ``patch_embed``: begins a pass with the patch grid of its image.

    Args:
        shared: state of the stack.
        grid_at: as in :class:`TokenLayout`.
    """

    def __init__(self, shared: SharedState, grid_at: Callable[[tuple[int, int]], Grid] | None) -> None:
        super().__init__(shared)
        self.grid_at = grid_at

    def __call__(self, patch_embed: Any, args: tuple[Any, ...]) -> None:
        if not isinstance(args[0], torch.Tensor):  # a symbolic trace, at the image size of the model
            return
        height, width = args[0].shape[-2:]
        rows, columns = (self.grid_at or patch_embed.dynamic_feat_size)((height, width))
        self.shared.begin((rows, columns), pooled=self.shared.current.begins_pooled)


def watch_grid(patch_embed: nn.Module, note: NoteGrid, leave: LeaveBlock) -> None:
    """Registers the hooks that tell a forward pass the patch grid of its image."""
    patch_embed.register_forward_pre_hook(note)
    # A wrapper such as FSDP copies the input of the first block; a rerun of that block finds the pass here.
    patch_embed.register_forward_hook(leave)


def watch_block(block: nn.Module, enter: EnterBlock, leave: LeaveBlock) -> None:
    """Registers the hooks that tell the forward passes of a block apart."""
    block.register_forward_pre_hook(enter, with_kwargs=True)
    block.register_forward_hook(leave, always_call=True)


def remove_hooks(module: nn.Module, kinds: tuple[type[SharedStateHook], ...]) -> None:
    """Removes the forward hooks and pre-hooks of the given classes, and those that take the place of a method."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, kinds)]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)
    for name in [name for name, value in vars(module).items() if isinstance(value, kinds)]:
        delattr(module, name)


def named(path: str, module: nn.Module) -> str:
    """Returns the path of a module with its class, for messages."""
    return f"{path or 'The model'} ({class_name(module)})"


def check_replaceable(path: str, layer: nn.Module) -> None:
    """Checks that an attention layer at a path can be replaced by one that copies its attributes.

    Raises:
        UnsupportedHostError: the layer is the model itself, or has attributes that would still compute the attention of
            the layer that it was: a ``forward`` on the instance, or a compiled call.
    """
    if not path:
        raise UnsupportedHostError(
            f"{named(path, layer)} can't be replaced in place; put it into a module and pass that."
        )
    if "forward" in vars(layer):
        raise UnsupportedHostError(
            f"{named(path, layer)} can't be replaced, because its forward was set on the instance, as accelerate's "
            "hooks do, and would still compute the earlier attention; remove it (accelerate's "
            "remove_hook_from_submodules, or del layer.forward), and set it again afterwards."
        )
    if layer._compiled_call_impl is not None:
        raise UnsupportedHostError(
            f"{named(path, layer)} can't be replaced, because layer.compile() was called, and the compiled call would "
            "still compute the earlier attention; compile it afterwards, here in copy.deepcopy(model), which is not "
            "compiled."
        )


def floating_parameter(path: str, layer: nn.Module) -> nn.Parameter:
    """Returns the first floating-point parameter of an attention layer at a path, which its mask is like.

    Raises:
        UnsupportedHostError: there is none, as in a quantised layer.
    """
    found = next((parameter for parameter in layer.parameters() if parameter.is_floating_point()), None)
    if found is None:
        raise UnsupportedHostError(
            f"{named(path, layer)} can't carry a learnable mask, because it is quantised: it has no floating-point "
            "parameter; call add_lam before the model is quantised, or leave the layer as it is."
        )
    return found


def input_width(projection: nn.Module) -> int:
    """Returns the number of inputs of a Linear or a convolution, which a norm or an adapter such as LoRA may wrap."""
    return _width(projection, "in_features", "in_channels", "nx")  # nx: transformers' Conv1D


def output_width(projection: nn.Module) -> int:
    """Returns the number of outputs of a Linear, likewise."""
    return _width(projection, "out_features", "nf")


def _width(projection: nn.Module, *names: str) -> int:
    found = (getattr(part, name, None) for part in projection.modules() for name in names)
    return next(width for width in found if isinstance(width, int))


def without_numbers(path: str) -> str:
    """Returns a path without its numbers, which is equal for all layers of a stack."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def _first(kind: type[T], values: Iterable[Any]) -> T | None:
    for value in values:  # each layer asks in each pass, and a generator takes several times as long
        if isinstance(value, kind):
            return value
    return None


class HostTakeover(nn.Module):
    """An attention layer that takes over the parameters, submodules, hooks and attributes of the host's layer.

    It has a learnable mask, or what token reduction needs of a layer without one.

    Parameter names stay those of the host, and :meth:`unwrap` restores the original class. A symbolic trace
    (``torch.fx``, torchvision's and timm's ``create_feature_extractor``) records the layer as one node, since the mask
    depends on shapes and on other layers.
    """

    lam: Lam | Unmasked
    fused: FusedAttention
    host_class: type[nn.Module]

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        proxy = _first(torch.fx.Proxy, (*args, *kwargs.values()))
        if proxy is None:
            return super()._call_impl(*args, **kwargs)
        tracer: Any = proxy.tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by ``torch.jit.script``, which can't compile the mask."""
        raise ExportError(
            "torch.jit.script, which torch deprecates, can't compile a model with learnable masks or merged tokens; "
            "use torch.export, lamzoo.export_model or torch.compile."
        )

    if TYPE_CHECKING:  # the attributes of the host are only known at run time

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def take_over(cls, host: nn.Module, lam: Lam | Unmasked) -> HostTakeover:
        """Returns a masked layer that shares the parameters of ``host``, which itself stays unchanged."""
        module = _with_state_of(cls, host)
        module.host_class = type(host)
        module.lam = lam
        return module

    def unwrap(self) -> nn.Module:
        """Returns a layer of the host's class that shares the parameters, without the mask."""
        host = _with_state_of(self.host_class, self)
        del host.host_class, host.lam
        _remove_fused_form(host)
        return host

    def projection(self) -> Projection | None:
        """Returns the one linear layer that makes queries, keys and values of the same tokens; None without one."""
        return None

    def no_fused_form(self) -> str | None:
        """Returns why the layer has no fused form, as a clause, or None if it has one."""
        if isinstance(self.lam, Unmasked):
            return "it has no mask"
        if not isinstance(self.lam, Lam):
            return "peft holds its mask; call merge_and_unload first"
        return unsupported(self.lam, self.projection())

    @property
    def is_fused(self) -> bool:
        """Whether the layer has a fused form for inference."""
        return "fused" in self._modules

    def fuse(self) -> Self:
        """Gives the layer its fused form, or renews it, if it has one; otherwise the layer stays as it is.

        ``timm.utils.reparameterize_model`` calls this. See :func:`lamzoo.fuse`.

        Returns:
            The same layer.
        """
        projection = self.projection()
        if self.no_fused_form() is not None:
            return self.unfuse()
        assert projection is not None
        lam: Any = self.lam
        if self.is_fused:
            self.fused.renew(projection, lam, self)
        else:
            self.fused = FusedAttention(projection, lam, self)
            self.register_load_state_dict_post_hook(_fuse_again)
        return self

    def unfuse(self) -> Self:
        """Removes the fused form, if there is one; returns the same layer."""
        _remove_fused_form(self)
        return self

    def train(self, mode: bool = True) -> Self:
        """Sets the mode; the evaluation mode renews a fused form whose weights have changed."""
        super().train(mode)
        if not mode and self.is_fused and not self.fused.is_current():
            self.fuse()
        return self

    def attend_fused(self, tokens: torch.Tensor, between: Between | None = None) -> torch.Tensor | None:
        """Attends in the fused form, if the layer has one that is the faster one and may be taken.

        It may be taken in evaluation mode, unless gradients of parameters are wanted, masks are captured or the
        attention has a hook that needs its inputs. Weights that have changed are copied first.

        Args:
            tokens: ``(B, N, C)``, of which queries, keys and values are made; of the queries where tokens merge.
            between: changes queries and keys, ``(B, H, N, d)`` each, before they attend.

        Returns:
            ``(B, N, E)``, before the output projection, or None.
        """
        modules: Any = self._modules  # faster than nn.Module's search for attributes
        if self.training or "fused" not in modules:
            return None
        lam, fused = modules["lam"], modules["fused"]
        hook = lam.attention_hook
        if lam.recorder is not None or (hook is not None and not getattr(hook, "fusible", False)):
            return None
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
            return None
        if is_transformed() or not (torch.compiler.is_compiling() or fused.is_current() or self.fuse().is_fused):
            return None
        return fused(tokens, lam, between) if takes_fused_form(fused, tokens) else None


def _fuse_again(layer: HostTakeover, incompatible_keys: object) -> None:
    """Hook after loading a state dict into a fused layer."""
    layer.fuse()


def _remove_fused_form(layer: nn.Module) -> None:
    layer._modules.pop("fused", None)
    hooks = layer._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is _fuse_again]:
        del hooks[key]


def check_restorable(model: nn.Module, kind: type[Lam | Unmasked] | None = None) -> None:
    """Checks by :func:`check_replaceable` that the attention layers with masks, or those of one kind, can be restored.

    Raises:
        UnsupportedHostError: one can't; names it.
    """
    for path, module in model.named_modules():
        if isinstance(module, HostTakeover) and (kind is None or isinstance(module.lam, kind)):
            check_replaceable(path, module)


class TakeoverAdapter:
    """Base of adapters that replace attention layers by masked ones of their own class.

    Attributes:
        takeovers: class of a host's attention layer to the class that replaces it.
    """

    owns_multihead_attention: ClassVar[bool] = False
    takeovers: ClassVar[Mapping[type[nn.Module], type[HostTakeover]]]

    def token_layout(self, model: nn.Module, path: str) -> TokenLayout | None:
        """Returns None: the layout is unknown."""
        return None

    def stacks(self, model: nn.Module) -> Iterable[TokenLayout]:
        """Returns no stacks."""
        return ()

    def wrap(self, model: nn.Module, lams: Mapping[AttentionSite, Lam | Unmasked]) -> None:
        """Replaces the attention layer of each site by one of its takeover class."""
        for site, lam in lams.items():
            host = model.get_submodule(site.path)
            masked = self.takeovers[type(host)].take_over(host, lam)
            for path in (site.path, *site.other_paths):
                replace_module(model, path, masked)

    def unwrap(self, model: nn.Module, kind: type[Lam | Unmasked] | None = None) -> None:
        """Replaces each attention layer that was taken over by one of the host's class."""
        plain: dict[nn.Module, nn.Module] = {}  # a layer may be used in several places
        for path, module in list(model.named_modules(remove_duplicate=False)):
            if isinstance(module, HostTakeover) and isinstance(module, tuple(self.takeovers.values())):
                if kind is not None and not isinstance(module.lam, kind):
                    continue
                if module not in plain:
                    plain[module] = module.unwrap()
                replace_module(model, path, plain[module])

    def _serves(self, module: nn.Module) -> bool:
        return isinstance(module, tuple(self.takeovers.values())) or type(module) in self.takeovers


def _with_state_of(cls: type[HostModule], source: nn.Module) -> HostModule:
    # The dictionaries of parameters, submodules and hooks are copied, so that later changes of one module don't reach
    # the other; the tensors and submodules in them are shared.
    module = cls.__new__(cls)
    module.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in source.__dict__.items()})
    return module


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Replaces the submodule at ``path``."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)
