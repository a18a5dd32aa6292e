"""Learnable masks in the models of Hugging Face transformers that use its ``AttentionInterface``, and a few others.

Modifications to the host: each attention layer gets the mask as a submodule, a forward pre-hook that computes the mask
from the layer's tokens, and a copy of its configuration that names the attention function of this file. The model gets
a copy of its configuration with the :class:`LamConfig`, because other models may share the original. The attention
masks that it makes (padding, causality, windows) stay those of the host.

In the pre-hook the mask becomes a keyword argument of the layer, which hands it to the attention function. With a
key-value cache, the key factors of earlier tokens are stored in the cache, as columns in front of their keys.

The layers of :mod:`lamzoo.adapters.transformers_vision` and :mod:`lamzoo.adapters.transformers_own` are replaced
instead.
"""

from __future__ import annotations

import ast
import copy
import inspect
import logging
import re
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.masking_utils import eager_mask, sdpa_mask

from lamzoo.adapters.hosts import (
    AttentionSite,
    HostTakeover,
    TakeoverAdapter,
    TokenLayout,
    input_width,
    named,
    output_width,
    without_numbers,
)
from lamzoo.adapters.state import has_masks
from lamzoo.adapters.transformers_own import OWN_TAKEOVERS, own_site
from lamzoo.adapters.transformers_vision import TAKEOVERS, present_keys, read_mask, tower_layouts
from lamzoo.errors import ConfigError, UnsupportedHostError, class_name
from lamzoo.lam import FactoredMask, Lam, lam_attention
from lamzoo.lam.layer import EagerAttention, Scores
from lamzoo.lam.unmasked import Unmasked

_logger = logging.getLogger(__name__)

#: Implementation that the configuration of a layer names without and with masks.
_IMPLEMENTATIONS = {None: "lam_eager", "eager": "lam_eager", "sdpa": "lam_sdpa"}

# Names in the attention classes of transformers; the first that a layer has counts.
_QUERY_PROJECTIONS = (
    "q_proj", "query", "q", "q_attn", "q_lin", "q_content_proj", "linear_q", "to_q", "Wq", "qkv", "qkv_proj", "c_attn",
    "Wqkv", "query_key_value",
)  # fmt: skip
_KEY_PROJECTIONS = ("k_proj", "key", "k", "k_lin", "k_content_proj", "kv_proj", "c_attn")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_QUERY_TOKENS = ("hidden_states", "query", "query_tensor")
_KEY_TOKENS = (
    "key_value_states", "encoder_hidden_states", "cross_attention_states", "key_hidden_states", "key", "key_tensor",
)  # fmt: skip
_MASKS = ("attention_mask", "mask")

# Arguments of the attention function, and what they do to the attention.
_UNSUPPORTED = {
    "softcap": "caps its scores (softcap); where its configuration allows None for the cap, build it so",
    "s_aux": "has attention sinks; use a model without them",
    "sinks": "has attention sinks; use a model without them",
    "indices": "attends to a sparse selection of keys; use a model with dense attention",
    "block_indices": "attends to a sparse selection of keys; use a model with dense attention",
}

# Functions that a layer with attention of its own calls.
_ATTENDING = {"softmax", "Softmax", "scaled_dot_product_attention", "multi_head_attention_forward"}

_KEYWORD = "lam_mask"


class TransformersAdapter(TakeoverAdapter):
    """Masks every attention layer of transformers that calls the ``AttentionInterface`` or has a takeover."""

    owns_multihead_attention = True
    takeovers: ClassVar[Mapping[type[nn.Module], type[HostTakeover]]] = {**TAKEOVERS, **OWN_TAKEOVERS}

    def sites(self, model: nn.Module) -> Iterator[AttentionSite]:
        """Yields the attention layers of a model; layers whose paths differ only in their numbers form a stack.

        The few ``nn.MultiheadAttention`` in models of transformers get no mask, which is logged, unless they belong to
        a pooling head, whose queries are learned parameters.

        Raises:
            UnsupportedHostError: a layer computes its attention itself, or has attention that can't carry a mask;
                names it.
        """
        for path, module in model.named_modules():
            interface = _interface(type(module).forward)
            if interface is not None:
                yield _site(path, module, interface)
            elif type(module) in OWN_TAKEOVERS:
                yield own_site(path, without_numbers(path), module)
            elif _attends_itself(type(module)):
                raise UnsupportedHostError(
                    f"{named(path, module)} computes its attention itself, and add_lam supports the attention layers "
                    "of transformers that call its AttentionInterface, of ViLT, FLAVA and TimeSformer; use a model of "
                    "such layers, or give add_lam the parts of this one that have them."
                )
            elif isinstance(module, nn.MultiheadAttention):
                owner = type(model.get_submodule(path.rpartition(".")[0]))
                if owner.__module__.startswith("transformers.") and "Pool" not in owner.__name__:
                    _logger.warning(
                        "%s keeps its attention without a mask: it is an nn.MultiheadAttention of transformers.", path
                    )

    def token_layout(self, model: nn.Module, path: str) -> TokenLayout | None:
        """Returns the layout of a vision tower; of another layer one without a length.

        :attr:`LamConfig.max_length` has to give that length.
        """
        module: Any = model.get_submodule(path)
        if _interface(getattr(module, "host_class", type(module)).forward) is None:
            return None
        for layout in tower_layouts(model):
            if layout.pooling is not None and path.startswith(layout.pooling.blocks + "."):
                return layout
        shifts = hasattr(model.get_submodule(path.rpartition(".")[0]), "shift_size")
        return TokenLayout(
            no_sharing="its windows shift from layer to layer, and with them its tokens" if shifts else None
        )

    def stacks(self, model: nn.Module) -> Iterator[TokenLayout]:
        """Yields the layout of the blocks of each vision transformer of a known class."""
        return tower_layouts(model)

    def wrap(self, model: nn.Module, lams: Mapping[AttentionSite, Lam | Unmasked]) -> None:
        """Puts masks into the attention layers at the sites; a whole model's ``config`` gets their ``LamConfig``."""
        config = next((lam.config for lam in lams.values() if isinstance(lam, Lam)), None)
        if config is not None and isinstance(model, PreTrainedModel):
            _own_config(model).lam_config = config.to_dict()  # for from_pretrained
        for site, lam in lams.items():
            module: Any = model.get_submodule(site.path)
            if type(module) in self.takeovers:
                super().wrap(model, {site: lam})
            else:
                interface = _interface(type(module).forward)
                assert interface is not None
                module.register_forward_pre_hook(_MaskHook(module.config, interface), with_kwargs=True)
                module.config = copy.copy(module.config)
                # Not by the setter, which also sets it in the configurations of other parts, which the copy shares.
                module.config._attn_implementation_internal = _IMPLEMENTATIONS[module.config._attn_implementation]
                module.lam = lam

    def unwrap(self, model: nn.Module, kind: type[Lam | Unmasked] | None = None) -> None:
        """Removes the masks, and gives the layers their class or their configuration back."""
        masked = has_masks(model)
        super().unwrap(model, kind)
        for module in model.modules():
            for key, hook in list(module._forward_pre_hooks.items()):
                if isinstance(hook, _MaskHook) and (kind is None or isinstance(module.lam, kind)):
                    del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key], module.lam
                    module.config = hook.config
        if masked and kind is not Unmasked:
            for module in model.modules():  # the model may be a wrapper's
                if isinstance(module, PreTrainedModel):
                    vars(module.config).pop("lam_config", None)


def _own_config(model: PreTrainedModel) -> Any:
    """Replaces the configuration of a model by a copy, in all modules that share it; returns the copy.

    The copy is shallow: transformers finds the configurations of parts by identity.
    """
    shared, own = model.config, copy.copy(model.config)
    for module in model.modules():
        vars(module).update((name, own) for name, value in list(vars(module).items()) if value is shared)
    return own


@dataclass(frozen=True)
class _Interface:
    """How the forward pass of a class calls the ``AttentionInterface``.

    Attributes:
        parameters: names of the arguments of the forward pass.
        passes_keywords: whether it hands further keyword arguments to the attention function.
        options: keyword arguments of the attention function, and the expressions that they are given.
    """

    parameters: tuple[str, ...]
    passes_keywords: bool
    options: Mapping[str, ast.expr]


@cache
def _interface(forward: Callable[..., Any]) -> _Interface | None:
    """Returns how the forward pass of a class calls the ``AttentionInterface``; None if it doesn't."""
    forward = inspect.unwrap(forward)  # without the decorators that rename arguments
    if "ALL_ATTENTION_FUNCTIONS" not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return None
    tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and "attention_interface" in node.func.id
    ]
    return _Interface(
        parameters=tuple(inspect.signature(forward).parameters)[1:],
        passes_keywords=bool(calls) and all(any(each.arg is None for each in call.keywords) for call in calls),
        options={each.arg: each.value for call in calls for each in call.keywords if each.arg is not None},
    )


def _site(path: str, module: Any, interface: _Interface) -> AttentionSite:
    where = named(path, module)
    for name, reason in _UNSUPPORTED.items():
        if _is_given(module, interface.options.get(name)):
            raise UnsupportedHostError(f"{where} can't carry a learnable mask, because it {reason}.")
    if getattr(module, "is_kv_shared_layer", False):
        raise UnsupportedHostError(
            f"{where} can't carry a learnable mask, because it takes the keys of an earlier layer, which a cache holds "
            "with the mask factors of that layer; use a model with num_kv_shared_layers=0, or one without shared keys."
        )
    if any(name.startswith("kv_a_proj") for name, _ in module.named_children()):
        raise UnsupportedHostError(
            f"{where} can't carry a learnable mask, because it caches compressed keys (multi-head latent attention), "
            "to which no mask factor can be added; use a model that caches its keys."
        )
    query = _first(module, _QUERY_PROJECTIONS, nn.Module)
    heads = _num_heads(module)
    if query is None or heads is None or interface.parameters[0] not in _QUERY_TOKENS:
        raise UnsupportedHostError(
            f"{where} can't carry a learnable mask, because its tokens or its query projection are unknown; give "
            "add_lam the parts of the model without it."
        )
    implementation = module.config._attn_implementation
    if implementation not in _IMPLEMENTATIONS:
        raise UnsupportedHostError(
            f"{where} uses the attention implementation {implementation!r}, which takes no learnable masks; call "
            "set_attn_implementation('sdpa') of the model before add_lam."
        )
    crosses = any(name in interface.parameters for name in _KEY_TOKENS)
    key = (_first(module, _KEY_PROJECTIONS, nn.Module) if crosses else None) or query
    query_dim, key_dim = input_width(query), input_width(key)
    return AttentionSite(
        path=path,
        stack=f"{without_numbers(path)} {query_dim} {key_dim} {heads}",  # stages of a pyramid share no mask
        query_dim=query_dim,
        key_dim=key_dim,
        num_heads=heads,
        watched=path,  # transformers checkpoints the forward pass of a block without its hooks
    )


def _first(module: nn.Module, names: Iterable[str], kind: type) -> Any:
    found = (getattr(module, name, None) for name in names)
    return next((value for value in found if isinstance(value, kind)), None)


def _num_heads(module: Any) -> int | None:
    heads, width = _first(module, _HEADS, int), getattr(module, "head_dim", None)
    key = _first(module, ("k_proj", "key", "k"), nn.Module)
    if heads is None and width is not None and key is not None:  # the query projection may have gates besides
        heads = output_width(key) // width * getattr(module, "num_key_value_groups", 1)
    return heads or getattr(module.config, "num_attention_heads", None)


def _is_given(module: nn.Module, value: ast.expr | None) -> bool:
    """Returns whether an expression in the forward pass of a layer may be other than None."""
    if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name) and value.value.id == "self":
        return getattr(module, value.attr, None) is not None
    return not (value is None or (isinstance(value, ast.Constant) and value.value is None))


def _attends_itself(cls: type[nn.Module]) -> bool:
    """Returns whether a class of transformers has attention over tokens in its own methods."""
    if not cls.__module__.startswith("transformers.") or "Attention" not in cls.__name__:
        return False
    if re.search("Pool|Deformable|AttentionMap|GRUCell", cls.__name__):  # over learned queries, or no tokens at all
        return False
    codes = (getattr(inspect.unwrap(member), "__code__", None) for member in vars(cls).values() if callable(member))
    return any(not _ATTENDING.isdisjoint(code.co_names) for code in codes if code is not None)


class _Factors:
    """The mask of one call of an attention layer, until the attention function takes it.

    Some vision towers call the attention function for a part of their tokens at a time, in order.
    """

    def __init__(self, mask: FactoredMask, to_itself: bool) -> None:
        self.mask, self.to_itself, self.taken = mask, to_itself, 0
        self._weights: Tensor | None = None

    def take(self, queries: int) -> FactoredMask:
        """Returns the mask of all queries, or of the next part of them and its keys."""
        if queries == self.mask.left.shape[2]:
            return self.mask
        part = slice(self.taken, self.taken + queries)
        self.taken += queries
        return FactoredMask(*(factor[:, :, part] for factor in self.mask))

    def record(self, lam: Lam, mask: FactoredMask, weights: Tensor, scores: Scores | None) -> None:
        """Records mask and attention weights, those of parts once the last one is known."""
        queries = self.mask.left.shape[2]
        if self.taken > 0:
            if self._weights is None:
                self._weights = weights.new_zeros(*weights.shape[:2], queries, queries)
            part = slice(self.taken - weights.shape[2], self.taken)
            self._weights[:, :, part, part] = weights.detach()
            mask, weights, scores = self.mask, self._weights, None
        if self.taken in (0, queries):
            lam.record(mask, weights, scores, to_itself=self.to_itself)


class _MaskHook:
    """Forward pre-hook of an attention layer: computes the mask and hands it to the attention function.

    By a keyword argument of the layer; classes that don't pass it on find it here, where each thread has its own.

    Args:
        config: of the layer, without masks.
        interface: of the layer.
    """

    def __init__(self, config: Any, interface: _Interface) -> None:
        self.config = config
        self.parameters, self.passes_keywords = interface.parameters, interface.passes_keywords
        self._kept: dict[int, _Factors] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_kept": {}}

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = dict(zip(self.parameters, args, strict=False)) | kwargs
        queries = given[self.parameters[0]]
        keys = next((given[name] for name in _KEY_TOKENS if given.get(name) is not None), None)
        lam: Any = module.lam
        present = None
        if lam.has_positions:
            crosses = keys is not None and "encoder_attention_mask" in self.parameters
            masks = ("encoder_attention_mask",) if crosses else _MASKS
            present = present_keys(next((given[name] for name in masks if name in given), None))
        tokens = _samples(queries)
        key_tokens = tokens if keys is None else _samples(keys)
        if key_tokens.shape[0] > tokens.shape[0]:  # Mllama has a sample for each tile of an image
            key_tokens = key_tokens.reshape(tokens.shape[0], -1, key_tokens.shape[-1])
        mask: FactoredMask = lam(tokens, key_tokens, present)
        places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        for where, cached in places:
            if isinstance(cached, PagedAttentionCache):
                raise UnsupportedHostError(
                    "Learnable masks don't support transformers' continuous batching; call model.generate."
                )
            if not isinstance(cached, Cache):
                continue
            if keys is not None and isinstance(cached, EncoderDecoderCache):
                continue  # the keys of the encoder are given to each call, and with them the whole factor
            if lam.has_positions:
                raise ConfigError(
                    "Masks with keys='position' have a table for the whole sequence, and a key-value cache adds "
                    "tokens one by one; call the model with use_cache=False, or use keys='content'."
                )
            extended = _extended(cached, mask.right)
            if isinstance(where, str):
                kwargs = kwargs | {where: extended}
            else:
                args = (*args[:where], extended, *args[where + 1 :])
        factors = _Factors(mask, to_itself=keys is None)
        if self.passes_keywords:
            return args, kwargs | {_KEYWORD: factors}
        self._kept[_thread()] = factors
        return args, kwargs

    def take_kept(self) -> _Factors:
        """Returns the mask of this thread's call of the layer, and forgets it."""
        return self._kept.pop(_thread())


@torch.compiler.assume_constant_result  # a compiled graph runs in one thread
def _thread() -> int:
    return threading.get_ident()


def _samples(tokens: Tensor) -> Tensor:
    """Returns tokens as ``(B, N, C)``: some vision towers have no batch, and SAM has two."""
    return tokens.unsqueeze(0) if tokens.ndim == 2 else tokens.flatten(0, -3)


def _extended(original: Any, right: Tensor) -> Any:
    """Returns a cache that stores the key factor of a mask with the keys; it shares its contents with the original."""
    extended = copy.copy(original)
    if isinstance(original, EncoderDecoderCache):
        extended.self_attention_cache = _extended(original.self_attention_cache, right)
        return extended

    def update(keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        columns = _pack(right, keys.shape[1]).to(keys.dtype).expand(keys.shape[0], -1, -1, -1)
        keys = torch.cat([columns, keys], dim=-1)  # the host may pad them behind (Moonshine)
        layers = getattr(original, "layers", ())
        held = getattr(layers[layer_idx], "keys", None) if layer_idx < len(layers) else None
        if isinstance(held, Tensor) and held.numel() and held.shape[-1] != keys.shape[-1]:
            raise UnsupportedHostError(
                f"The cache has keys of width {held.shape[-1]}, and with the factors of the masks they have "
                f"{keys.shape[-1]}: prefix tuning or a model without masks has filled it, or it was initialised for "
                "one; give an empty cache, and use prompt tuning in place of prefix tuning."
            )
        return original.update(keys, values, layer_idx, *args, **kwargs)

    extended.update = update
    return extended


def _pack(right: Tensor, key_heads: int) -> Tensor:
    """Returns a key factor ``(B, Hm, N, R)`` as columns ``(B, Hk, N, C)`` of ``Hk`` key heads."""
    if right.shape[1] == 1:
        return right.expand(-1, key_heads, -1, -1)
    return right.unflatten(1, (key_heads, -1)).transpose(2, 3).flatten(3)


def _unpack(columns: Tensor, like: Tensor) -> Tensor:
    """Undoes :func:`_pack`, for a factor with the heads and the rank of ``like``."""
    if like.shape[1] == 1:
        return columns[:, :1]
    return columns.unflatten(-1, (-1, like.shape[-1])).transpose(2, 3).flatten(1, 2)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    lam_mask: _Factors | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function of masked layers; arguments and result as those of transformers.

    It computes what the host's own implementation, eager or SDPA, would without the mask.

    Raises:
        UnsupportedHostError: the layer asks for attention that can't carry a mask, or its attention mask was made for
            another implementation.
    """
    for name, reason in _UNSUPPORTED.items():
        if options.get(name) is not None:
            raise UnsupportedHostError(f"{class_name(module)} can't carry a learnable mask, because it {reason}.")
    if lam_mask is None:
        hooks = module._forward_pre_hooks.values()
        lam_mask = next(hook for hook in hooks if isinstance(hook, _MaskHook)).take_kept()
    is_eager = module.config._attn_implementation == "lam_eager"
    causal = attention_mask is None and not is_eager
    if causal:
        # As transformers' SDPA: a mask that was left out is causal, unless a single query continues a sequence.
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = bool(causal and query.shape[2] > 1)
    left, right = lam_mask.take(query.shape[2])
    extra = key.shape[-1] - query.shape[-1]
    if extra > 0:  # from a cache
        columns, key = key.split((extra, query.shape[-1]), dim=-1)
        right = _unpack(columns, left).to(left.dtype)
    if causal and key.shape[2] > query.shape[2]:  # the first tokens in a static cache, whose other places are empty
        key, value, right = (each[:, :, : query.shape[2]] for each in (key, value, right))
        position_bias = None if position_bias is None else position_bias[..., : query.shape[2]]
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    allowed, bias = read_mask(module, attention_mask, key.shape[2])
    if position_bias is not None:
        bias = position_bias if bias is None else position_bias + bias
    lam: Lam = module.lam
    mask = FactoredMask(left, right)
    if lam.recorder is None and not (is_eager or options.get("output_attentions")):
        out = lam_attention(
            query, key, value, mask, op=lam.config.op, allowed=allowed, bias=bias, is_causal=causal, dropout_p=dropout,
            scale=scaling, backend=lam.backend,
        )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None
    eager = EagerAttention()
    out = eager(
        query, key, value, mask, op=lam.config.op, allowed=allowed, bias=bias, is_causal=causal, dropout_p=dropout,
        scale=scaling,
    )  # fmt: skip
    weights, dropped = eager.calls[0]
    lam_mask.record(lam, mask, weights, eager.scores)
    return out.transpose(1, 2).contiguous(), dropped


_MASK_FUNCTIONS: dict[str, Callable[..., Any]] = {"lam_eager": eager_mask, "lam_sdpa": sdpa_mask}
for _name, _function in _MASK_FUNCTIONS.items():
    AttentionInterface.register(_name, _attend)
    AttentionMaskInterface.register(_name, _function)  # for layers that make their masks themselves
