"""Learnable masks in ``torch.nn.MultiheadAttention``, in any model.

Modifications to the host: each ``nn.MultiheadAttention`` is replaced by a subclass that takes over its parameters and
calls :func:`lamzoo.lam.lam_attention`. It switches off the fast path of ``nn.TransformerEncoderLayer``, which would
use the weights without calling the layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamzoo.adapters.hosts import AttentionSite, HostTakeover, TakeoverAdapter, adapters_of, libraries_of, named
from lamzoo.errors import MaskShapeError, UnsupportedHostError
from lamzoo.lam import Lam
from lamzoo.lam.fused import Projection
from lamzoo.lam.layer import lets_attend
from lamzoo.lam.unmasked import Unmasked
from lamzoo.layers.attention import split_heads


class LamMultiheadAttention(HostTakeover, nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` under a learnable mask.

    It stays an ``nn.MultiheadAttention`` for code that looks for one (precision conversion, weight initialisation). A
    row in which every key is masked returns the bias of the output projection, where torch returns NaN.
    """

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # Unless this is False, nn.TransformerEncoderLayer in evaluation passes the weights to a fused kernel and never
        # calls the module. The host's value stays in __dict__, for unwrap().
        return False

    def _reset_parameters(self) -> None:
        plain = self.unwrap()  # shares the parameters
        assert isinstance(plain, nn.MultiheadAttention)
        plain._reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Masked attention; arguments and results as ``nn.MultiheadAttention``, boolean masks True = *not* allowed.

        Args:
            query: ``(B, Nq, C)``, ``(Nq, B, C)`` without ``batch_first``, or ``(Nq, C)``.
            key: likewise with ``Nk`` and ``kdim``. The mask network reads ``query`` and ``key``.
            value: likewise with ``Nk`` and ``vdim``.
            key_padding_mask: ``(B, Nk)`` or ``(Nk,)``, bool or float (added to the scores).
            need_weights: also return the attention weights.
            attn_mask: ``(Nq, Nk)`` or ``(B * heads, Nq, Nk)``, bool or float (added to the scores).
            average_attn_weights: average them over the heads.
            is_causal: hint that ``attn_mask``, which must be given, is causal.

        Returns:
            The output, in the layout of ``query``, and the weights ``(B, Nq, Nk)`` or ``(B, heads, Nq, Nk)`` or None.

        Raises:
            MaskShapeError: a mask doesn't fit the tokens, is an integer tensor, or is missing.
        """
        if query.is_nested:
            if not (query is key is value and self.batch_first and key_padding_mask is None and attn_mask is None):
                raise MaskShapeError(
                    "nn.MultiheadAttention takes nested tensors only in self-attention with batch_first=True and "
                    "without masks; pad them and pass key_padding_mask."
                )
            return self._forward_nested(query, need_weights, average_attn_weights)
        if is_causal and attn_mask is None:
            raise MaskShapeError(
                "is_causal=True is a hint about attn_mask, which was not given; "
                "pass nn.Transformer.generate_square_subsequent_mask(length)."
            )
        queries = self._to_batch_first(query)
        plain = attn_mask is None and key_padding_mask is None and not need_weights
        if plain and query is key is value and (heads := self.attend_fused(queries)) is not None:
            return self._as_given(self.out_proj(heads), query), None
        keys = self.lam.key_tokens(queries) if key is query else self._to_batch_first(key)
        values = keys if value is key else self._to_batch_first(value)
        q, k, v = (split_heads(x, self.num_heads) for x in self._project(queries, keys, values))
        allowed, bias = None, None
        # As in torch, the hint replaces the mask where nothing else has to be merged with it.
        is_causal = is_causal and key_padding_mask is None and not need_weights
        if attn_mask is not None and not is_causal:
            allowed, bias = read_attn_mask(attn_mask, q, k)
        if key_padding_mask is not None:
            allowed, bias = _add_padding(key_padding_mask, query, q, k, allowed, bias)
        present = present_keys(self.lam, k, attn_mask, key_padding_mask)
        dropout_p = self.dropout if self.training else 0.0
        if need_weights:
            out, weights = self.lam.attend_with_weights(
                queries, keys, q, k, v, allowed=allowed, bias=bias, dropout_p=dropout_p, present=present
            )
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights.squeeze(0) if query.ndim == 2 else weights
        else:
            weights = None
            out = self.lam.attend(
                queries, keys, q, k, v, allowed=allowed, bias=bias, is_causal=is_causal, dropout_p=dropout_p,
                present=present,
            )  # fmt: skip
        return self._as_given(self.out_proj(out.transpose(1, 2).flatten(2)), query), weights

    def projection(self) -> Projection | None:
        if self.in_proj_weight is None:
            return None
        scale = (self.embed_dim // self.num_heads) ** -0.5
        return Projection(self.in_proj_weight, self.in_proj_bias, self.num_heads, scale, (self,))

    def _as_given(self, out: Tensor, query: Tensor) -> Tensor:
        """Returns an output ``(B, Nq, C)`` in the layout of the query that was given."""
        if query.ndim == 2:
            return out.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1)

    def _to_batch_first(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _project(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        if self.in_proj_weight is not None:
            if queries is keys is values:
                return F.linear(queries, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(map(F.linear, (queries, keys, values), weights, biases))

    def _forward_nested(self, x: Tensor, need_weights: bool, average: bool) -> tuple[Tensor, Tensor | None]:
        # In evaluation nn.TransformerEncoder turns padded batches into nested tensors, for its fast path.
        lengths = [len(sample) for sample in x.unbind()]
        padded = x.to_padded_tensor(0.0)
        padding = torch.arange(padded.shape[1], device=x.device) >= torch.tensor(lengths, device=x.device)[:, None]
        out, weights = self.forward(padded, padded, padded, padding, need_weights, average_attn_weights=average)
        samples = [sample[:length] for sample, length in zip(out, lengths, strict=True)]
        return torch.nested.as_nested_tensor(samples, layout=x.layout), weights


def project_apart(queries: Tensor, keys: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Returns the queries of some tokens and the keys and values of others, by a projection of all three.

    Args:
        queries: ``(B, Nq, C)``.
        keys: ``(B, Nk, C)``.
        weight: ``(3 E, C)``, of queries, keys and values in this order.
        bias: ``(3 E,)``.

    Returns:
        ``(B, Nq, E)``, and twice ``(B, Nk, E)``.
    """
    width = weight.shape[0] // 3
    weights = weight.split((width, 2 * width))
    biases = (None, None) if bias is None else bias.split((width, 2 * width))
    query, rest = map(F.linear, (queries, keys), weights, biases)
    return query, *rest.chunk(2, dim=-1)


def read_attn_mask(attn_mask: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Translates an ``attn_mask`` of ``nn.MultiheadAttention`` to arguments of :func:`lamzoo.lam.lam_attention`.

    Args:
        attn_mask: ``(Nq, Nk)`` or ``(B * H, Nq, Nk)``; bool with True = not allowed, or float, added to the scores.
        query: ``(B, H, Nq, d)``.
        key: ``(B, H, Nk, d)``.

    Returns:
        ``allowed`` and ``bias``, one of them None, broadcastable to ``(B, H, Nq, Nk)``.

    Raises:
        MaskShapeError: the mask has another shape, or is an integer tensor.
    """
    batch, heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    if tuple(attn_mask.shape) not in ((num_queries, num_keys), (batch * heads, num_queries, num_keys)):
        raise MaskShapeError(
            f"attn_mask has shape {tuple(attn_mask.shape)}; it must be {(num_queries, num_keys)} or "
            f"{(batch * heads, num_queries, num_keys)}, batch times heads first."
        )
    if attn_mask.ndim == 3:
        attn_mask = attn_mask.view(batch, heads, num_queries, num_keys)
    return _split(attn_mask, "attn_mask", query.dtype)


def _add_padding(
    padding: Tensor, tokens: Tensor, query: Tensor, key: Tensor, allowed: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    wanted = (key.shape[2],) if tokens.ndim == 2 else (key.shape[0], key.shape[2])
    if tuple(padding.shape) != wanted:
        raise MaskShapeError(f"key_padding_mask has shape {tuple(padding.shape)}; it must be {wanted}.")
    padding = padding.view(key.shape[0], 1, 1, key.shape[2])
    unpadded, shift = _split(padding, "key_padding_mask", query.dtype)
    if unpadded is not None:
        allowed = unpadded if allowed is None else allowed & unpadded
    if shift is not None:
        bias = shift if bias is None else bias + shift
    return allowed, bias


def present_keys(
    lam: Lam | Unmasked, key: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None = None
) -> Tensor | None:
    """Returns which keys aren't padding, bool ``(B, Nk)``, for masks with ``keys="position"``; None if all are tokens.

    A key is padding if ``key_padding_mask`` hides it, or if a per-sample ``attn_mask`` hides it from every query; an
    ``attn_mask`` that all samples share is an attention pattern.

    Args:
        lam: of the layer.
        key: ``(B, H, Nk, d)``.
        attn_mask: as checked by :func:`read_attn_mask`.
        key_padding_mask: ``(B, Nk)`` or ``(Nk,)``, bool with True = padding, or float.
    """
    present = None
    if not lam.has_positions:
        return present
    if key_padding_mask is not None:
        present = _unhidden(key_padding_mask).view(key.shape[0], key.shape[2])
    if attn_mask is not None and attn_mask.ndim == 3:
        seen = _unhidden(attn_mask).unflatten(0, (key.shape[0], -1)).any(dim=2).any(dim=1)
        present = seen if present is None else present & seen
    return present


def _unhidden(mask: Tensor) -> Tensor:
    return ~mask if mask.dtype == torch.bool else lets_attend(mask)  # here True hides


def _split(mask: Tensor, name: str, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    if mask.dtype == torch.bool:
        return ~mask, None
    if not mask.is_floating_point():
        raise MaskShapeError(f"{name} is {mask.dtype}; it must be torch.bool (True = not allowed) or floating point.")
    return None, mask.to(dtype)


class MultiheadAttentionAdapter(TakeoverAdapter):
    """Masks every ``nn.MultiheadAttention``, except where another adapter owns it."""

    takeovers: ClassVar[Mapping[type[nn.Module], type[HostTakeover]]] = {nn.MultiheadAttention: LamMultiheadAttention}

    def sites(self, model: nn.Module) -> Iterator[AttentionSite]:
        """Yields every ``nn.MultiheadAttention`` of a model.

        Layers whose paths differ only in the last number form a stack (``decoder.layers.*.self_attn``): an encoder's
        self-attention, a decoder's self-attention and its cross-attention are three stacks.

        Raises:
            UnsupportedHostError: a layer has ``add_bias_kv`` or ``add_zero_attn``, or is a subclass, which may compute
                something else.
        """
        adapters = adapters_of(model).items()
        owners = {library for library, adapter in adapters if adapter.owns_multihead_attention}
        paths: dict[nn.MultiheadAttention, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):  # a layer may be used in several places
            if not isinstance(module, nn.MultiheadAttention):
                continue
            if owners & libraries_of(model.get_submodule(path.rpartition(".")[0])):
                continue
            _check_host(path, module)
            paths.setdefault(module, []).append(path)
        for module, places in paths.items():
            yield mha_site(module, places, _stack(places[0]))


def mha_site(attn: nn.MultiheadAttention, paths: Sequence[str], stack: str) -> AttentionSite:
    """Describes one ``nn.MultiheadAttention``, which is used at each of ``paths``."""
    return AttentionSite(
        path=paths[0],
        stack=stack,
        query_dim=attn.embed_dim,
        key_dim=attn.kdim,
        num_heads=attn.num_heads,
        other_paths=tuple(paths[1:]),
    )


def _check_host(path: str, attn: nn.MultiheadAttention) -> None:
    where = named(path, attn)
    if type(attn) is not nn.MultiheadAttention:
        raise UnsupportedHostError(
            f"{where} is an unknown subclass of nn.MultiheadAttention; use nn.MultiheadAttention itself, or call "
            "add_lam on the parts of the model without it."
        )
    if attn.bias_k is not None or attn.add_zero_attn:
        raise UnsupportedHostError(
            f"{where} has add_bias_kv or add_zero_attn, whose extra key is not a token that a mask network could read; "
            "build it without them."
        )


def _stack(path: str) -> str:
    parts = path.split(".")
    for index in reversed(range(len(parts))):
        if parts[index].isdigit():
            parts[index] = "*"
            break
    return ".".join(parts)
