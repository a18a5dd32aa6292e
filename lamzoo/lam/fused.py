"""The fused form of masked attention, for inference: one linear layer makes queries and keys with the mask in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamzoo.lam import kernels
from lamzoo.lam.config import LamConfig
from lamzoo.lam.layer import Lam
from lamzoo.lam.masks import FactoredMask, MaskNetwork
from lamzoo.lam.passes import StackPass
from lamzoo.lam.resize import Grid
from lamzoo.lam.unmasked import log_sizes
from lamzoo.reading import parse_csv, read_text

#: Measured times of whole models in both forms, written by ``python -m benchmarks.fused``.
MEASURED = Path(__file__).with_name("fused.csv")

_WIDE = 768  # see faster
_SIZES = 16  # of position tables of other sizes than the model's that are kept

Between = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Projection(NamedTuple):
    """The linear layer of an attention layer that makes queries, keys and values of the same tokens.

    Attributes:
        weight: ``(3 E, C)``, of queries, keys and values in this order.
        bias: ``(3 E,)``, or None.
        heads: number of attention heads, into which ``E`` is split.
        scale: of the scores.
        modules: that hold these tensors.
    """

    weight: Tensor
    bias: Tensor | None
    heads: int
    scale: float
    modules: Sequence[nn.Module]


def is_bare(layer: nn.Module) -> bool:
    """Returns whether a layer computes what its weight and bias say: not if it is adapted, quantised or hooked."""
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    return type(layer) is nn.Linear and not any(hooks) and "forward" not in vars(layer)


def unsupported_config(config: LamConfig) -> str | None:
    """Returns why attention under such masks has no fused form, as a clause, or None if it may have one."""
    if config.op != "add":
        return f"its mask has op={config.op!r}, which no linear layer can compute"
    if config.hidden:
        return f"its mask has hidden={config.hidden}, layers that come before its last one"
    return f"its mask has modalities={config.modalities}" if config.modalities else None


def unsupported(lam: Lam, projection: Projection | None) -> str | None:
    """Returns why the attention of a layer has no fused form, as a clause, or None if it has one."""
    if reason := unsupported_config(lam.config):
        return reason
    if projection is None:
        return "it adds a position bias to the scores, or has no single linear layer for queries, keys and values"
    if lam.network is not None and not all(map(is_bare, _linears(lam.network))):
        return "a linear layer of its mask is adapted, quantised or has hooks"
    weights = [projection.weight, *lam.parameters()]
    if any(hasattr(weight, "full_tensor") for weight in weights):
        return "its weights are sharded by FSDP"
    if len({(weight.dtype, weight.device) for weight in weights}) > 1:
        return "the weights of its mask differ from its own in dtype or device"
    if any(weight.is_inference() for weight in weights):
        return "its weights were made under torch.inference_mode(), where torch doesn't count their changes"
    return None


def _linears(network: MaskNetwork) -> list[nn.Module]:
    return [network.query[0]] if network.config.has_positions else [network.query[0], network.key[0]]


class _Noted(NamedTuple):
    """An entry of a module's dictionaries that a fused form was made of.

    Attributes:
        entries: the dictionary.
        name: of the entry.
        value: what was there.
        version: of a tensor, how often it had been changed in place.
        address: of a tensor's memory.
        memory: a tensor with this memory, which is not reused while it is held.
    """

    entries: dict[str, Any]
    name: str
    value: Any
    version: int | None = None
    address: int = 0
    memory: Tensor | None = None

    @classmethod
    def all_of(cls, module: nn.Module) -> Iterator[_Noted]:
        """Yields the parts, parameters and buffers of a module itself."""
        for name, part in module._modules.items():
            yield cls(module._modules, name, part)
        for entries in (module._parameters, module._buffers):
            for name, tensor in entries.items():
                known = () if tensor is None else (tensor._version, tensor.data_ptr(), tensor.detach())
                yield cls(entries, name, tensor, *known)


class FusedAttention(nn.Module):
    """Attention under an additive mask, whose factors are columns of queries and keys made by one linear layer.

    ``softmax(scale q kᵀ + left rightᵀ) = softmax(scale [q, left / scale] [k, right]ᵀ)``. ReLU is homogeneous, so
    ``left / scale`` is the ReLU of the mask network's rows divided by the scale, which follow those of each head's
    queries. ``right`` is a linear function of the tokens (``keys="content"``) or a table (``keys="position"``), which
    is added to zeros. With ``layers="single"`` the first layer makes both, and the others copy them. Values are
    as wide as keys, and the width of a head is a multiple of 8, because fused kernels need equal widths and are fastest
    with these.

    The tensors are copies, in buffers outside of the state dict. They are renewed by :meth:`renew`; :meth:`is_current`
    tells whether they have to be.

    Args:
        projection: of the layer.
        lam: mask of the layer; see :func:`unsupported`.
        layer: the attention layer, which holds both.
    """

    weight: Tensor
    bias: Tensor
    table: Tensor | None

    def __init__(self, projection: Projection, lam: Lam, layer: nn.Module) -> None:
        super().__init__()
        self.heads, self.scale = projection.heads, projection.scale
        self.width = projection.weight.shape[1]
        self.head_dim = projection.weight.shape[0] // (3 * self.heads)
        needed = self.head_dim + lam.config.rank + 1
        self.padding = -needed % 8
        self.columns = needed + self.padding - self.head_dim
        for name in ("weight", "bias", "table"):
            self.register_buffer(name, None, persistent=False)
        self.renew(projection, lam, layer)

    def forward(self, tokens: Tensor, lam: Lam, between: Between | None = None) -> Tensor:
        """Attends.

        Keys count as often as they have members, where tokens have merged (arXiv 2210.09461, equation 1).

        Args:
            tokens: ``(B, N, C)``, of which queries, keys, values and mask are made; where tokens merge in this layer,
                the fewer ones, of which queries are made.
            lam: mask of the layer.
            between: changes queries and keys, ``(B, H, N, d)`` each, before they attend: norms and rotations.

        Returns:
            ``(B, N, E)``.
        """
        here = lam.shared.current
        # Traced changes in place are scattered into copies, and norms save their input for the gradient.
        in_place = not (torch.is_grad_enabled() or _is_traced())
        query, key, made = self._project(tokens, tokens if here.merge is None else here.merge.tokens, in_place)
        network = lam.network
        table = None if network is None else self._table(network, key.shape[2], here)
        mask = lam.shared_mask() if network is None else None
        if in_place:
            self._insert(query, key, table, mask, between)
            value = self._wide_values(key, made)
        else:
            query, key = self._inserted(query, key, table, mask, between)
            value = F.pad(self._values(made), (0, self.columns))
        gives_mask = lam.gives_mask
        if gives_mask:
            left, right = (x[..., self._factor] for x in (query, key))
            lam.shared.update(mask=FactoredMask(left * self.scale, right))
        if here.sizes is not None:  # beside the constant column of the queries
            logs = log_sizes(here.sizes).to(key.dtype)
            if in_place and not gives_mask:
                key[..., self._constant : self._constant + 1].add_(logs)
            else:
                key = key + F.pad(logs, (self._constant, self.padding))
        out = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        if lam.is_last and not here.held:
            lam.shared.end()
        return out[..., : self.head_dim].transpose(1, 2).flatten(2)

    def _project(self, tokens: Tensor, keys: Tensor, in_place: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries and keys ``(B, H, N, D)``, and what the linear layer has made, which ends with the values."""
        tensors: Any = self._buffers  # faster than nn.Module's search for attributes
        weight, bias = tensors["weight"], tensors["bias"]
        wide = self.head_dim + self.columns
        rows = self.heads * wide
        if keys is not tokens:
            query = F.linear(tokens, weight[:rows], bias[:rows])
            made = F.linear(keys, weight[rows:], bias[rows:])
            query, key = (x.unflatten(-1, (self.heads, wide)).transpose(1, 2) for x in (query, made[..., :rows]))
            return query, key, made
        made = F.linear(tokens, weight, bias)
        if in_place:
            return self._heads(made, 0, wide, wide), self._heads(made, rows, wide, wide), made
        query, key = made[..., : 2 * rows].unflatten(-1, (2, self.heads, wide)).permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, made

    def _heads(self, made: Tensor, start: int, apart: int, width: int) -> Tensor:
        """Returns heads ``(B, H, N, width)`` that begin at a column of ``made`` and are ``apart`` columns apart."""
        batch, length, _ = made.shape
        strides = made.stride()
        return made.as_strided(
            (batch, self.heads, length, width),
            (strides[0], apart, strides[1], strides[2]),
            made.storage_offset() + start,
        )

    def _insert(
        self, query: Tensor, key: Tensor, table: Tensor | None, mask: FactoredMask | None, between: Between | None
    ) -> None:
        """Puts the mask into queries and keys ``(B, H, N, D)``, in place.

        Args:
            query: as the linear layer has made them.
            key: likewise.
            table: columns of the keys ``(1 | H, N, columns)`` or ``(1 | B, 1 | H, N, columns)`` that depend on their
                positions, if there are any; those of padding may be left out.
            mask: computed in another layer, if it was.
            between: as in :meth:`forward`.
        """
        if mask is not None:
            query[..., self._factor] = mask.left / self.scale
            key[..., self._factor] = mask.right
        else:
            query[..., self.head_dim :].relu_()
        if table is not None:
            key[..., self.head_dim : self.head_dim + table.shape[-1]].add_(table)
        if between is not None:
            given = query[..., : self.head_dim], key[..., : self.head_dim]
            for before, after in zip(given, between(*given), strict=True):
                if after is not before:
                    before.copy_(after)

    def _inserted(
        self, query: Tensor, key: Tensor, table: Tensor | None, mask: FactoredMask | None, between: Between | None
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`_insert`, without changing the input."""
        if mask is not None:
            query, key = (
                x + F.pad(factor.to(x.dtype), (self.head_dim, self.padding))
                for x, factor in ((query, mask.left / self.scale), (key, mask.right))
            )
        else:
            floor = F.pad(query.new_zeros(self.columns), (self.head_dim, 0), value=-torch.inf)
            query = torch.maximum(query, floor)
        if table is not None:
            key = key + F.pad(table.to(key.dtype), (self.head_dim, self.columns - table.shape[-1]))
        if between is not None:
            changed = between(query[..., : self.head_dim], key[..., : self.head_dim])
            query, key = (
                torch.cat([after.to(wide.dtype), wide[..., self.head_dim :]], dim=-1)
                for wide, after in zip((query, key), changed, strict=True)
            )
        return query, key

    def _values(self, made: Tensor) -> Tensor:
        end = made.shape[-1] - self.columns
        values = made[..., end - self.heads * self.head_dim : end]
        return values.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def _wide_values(self, key: Tensor, made: Tensor) -> Tensor:
        """Returns values as wide as keys."""
        if made.device.type != "cpu" and self.head_dim % 8:  # kernels of GPUs need aligned heads
            return F.pad(self._values(made), (0, self.columns))
        # Each head's values are followed by those of the next one, which make columns of the output that nobody reads,
        # and the last head's by zeros: so they have the width of the keys without a copy.
        start = made.shape[-1] - self.columns - self.heads * self.head_dim
        return self._heads(made, start, self.head_dim, key.shape[-1])

    @property
    def _factor(self) -> slice:
        """The columns of the factors."""
        return slice(self.head_dim, self.head_dim + self.columns - self.padding)

    @property
    def _constant(self) -> int:
        """The column of the constant in the query's factor."""
        return self.head_dim + self.columns - self.padding - 1

    def mask_macs(self, queries: int, keys: int) -> int:
        """Returns the multiply-accumulates of the columns of the mask, of one sample of that many queries and keys."""
        linear = (self.heads * queries + (self.heads + 1) * keys) * self.width
        return self.columns * (linear + 2 * self.heads * queries * keys)

    def _table(self, network: MaskNetwork, length: int, here: StackPass) -> Tensor | None:
        """Returns the columns of the keys that depend on their positions; see :meth:`_insert`. None if none does."""
        initial = self._buffers["table"]
        if initial is None:
            return None
        if here.merge is not None and here.merge.right is not None:
            return here.merge.right
        if here.token_map is None:
            return self._table_of(initial, network, length, here.grid)
        table = self._table_of(initial, network, here.token_map.length, here.grid)
        return here.token_map.factor(table[: network.heads].unsqueeze(0))

    def _table_of(self, initial: Tensor, network: MaskNetwork, length: int, grid: Grid | None) -> Tensor:
        """Returns the table ``(H, N, columns)`` for that many tokens, or ``initial`` if it fits."""
        own: Any = network.table
        if length == initial.shape[1] and (own.grid is None or grid in (None, own.grid)):
            return initial
        if _is_traced():
            return self._wide_table(network, length, grid)
        found = self._resized.get((length, grid))
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = self._wide_table(network, length, grid)
            if len(self._resized) >= _SIZES:
                self._resized.clear()
            self._resized[length, grid] = found
        return found

    def _wide_table(self, network: MaskNetwork, length: int, grid: Grid | None) -> Tensor:
        table = network.table(length, grid)[0].expand(self.heads, -1, -1)
        return F.pad(table, (0, self.columns - table.shape[-1])).contiguous()

    def renew(self, projection: Projection, lam: Lam, layer: nn.Module) -> None:
        """Copies the weights again; arguments as in the constructor."""
        self._resized: dict[tuple[int, Grid | None], Tensor] = {}
        with torch.inference_mode(False), torch.no_grad():
            weight, bias = self._wide_linear(projection, lam.network)
            table = None
            if lam.network is not None and lam.has_positions:
                table = self._wide_table(lam.network, lam.network.table.weight.shape[1], None)
            for name, new in (("weight", weight), ("bias", bias), ("table", table)):
                old = getattr(self, name)
                if _alike(old, new):
                    old.copy_(new)  # compiled graphs hold these tensors
                else:
                    setattr(self, name, new)
        self._noted = [
            _Noted(layer._modules, name, part)
            for name, part in layer._modules.items()
            if part in projection.modules or isinstance(part, Lam)
        ]
        for part in (*projection.modules, *lam.modules()):
            self._noted += _Noted.all_of(part)

    def is_current(self) -> bool:
        """Returns whether the weights are those that were copied.

        Changes of ``parameter.data`` in place can't be noticed.
        """
        for entries, name, value, version, address, _ in self._noted:  # in every forward pass
            found = entries.get(name)
            if found is not value or (
                version is not None and (found._version != version or found.data_ptr() != address)
            ):
                return False
        return True

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_noted": [_Noted({}, "copied", self.heads)]}  # a copy has parameters of its own

    def _wide_linear(self, projection: Projection, network: MaskNetwork | None) -> tuple[Tensor, Tensor]:
        """Returns weight and bias of the queries, keys and values, and of the zeros that follow them.

        A head has ``D`` rows of queries and of keys, with those of the mask, and ``d`` of values; ``D - d`` are zeros.
        """
        end = self.head_dim + self.columns
        weight = projection.weight.new_zeros(3, self.heads, end, self.width)
        bias = projection.weight.new_zeros(3, self.heads, end)
        weight[:, :, : self.head_dim] = projection.weight.unflatten(0, (3, self.heads, -1))
        if projection.bias is not None:
            bias[:, :, : self.head_dim] = projection.bias.unflatten(0, (3, self.heads, -1))
        if network is not None:
            query: Any = network.query[0]
            constant = self._constant
            columns = slice(self.head_dim, constant)
            weight[0, :, columns] = query.weight.unflatten(0, (network.heads, -1)) / self.scale
            bias[0, :, columns] = query.bias.unflatten(0, (network.heads, -1)) / self.scale
            bias[0, :, constant] = 1 / self.scale
            if not network.config.has_positions:
                key: Any = network.key[0]
                weight[1, :, self._factor] = key.weight.unflatten(0, (network.heads, -1))
        parts = []
        for wide in (weight, bias):
            value, zeros = wide[2, :, : self.head_dim].flatten(0, 1), wide[2, 0, self.head_dim :]
            parts.append(torch.cat([wide[:2].flatten(0, 2), value, zeros]))
        return parts[0], parts[1]

    def _apply(self, fn: Any, recurse: bool = True) -> FusedAttention:
        self._resized = {}
        self._noted = [_Noted({}, "moved", self.heads)]  # copies of the moved weights may be rounded differently
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.heads} heads of {self.head_dim} + {self.columns}"


def _alike(old: Tensor | None, new: Tensor | None) -> bool:
    if old is None or new is None:
        return False
    return (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)


class _Measured(NamedTuple):
    """Sizes of a measured model, and the ratio of its time as it is to that in the fused form."""

    device: str
    sizes: tuple[int, int, int, int]
    gain: float


@cache
def _measured() -> list[_Measured]:
    (_, columns), *records = parse_csv(read_text(MEASURED, keep_line_ends=True))
    measured = []
    for _, cells in records:
        row = dict(zip(columns, cells, strict=True))
        sizes = int(row["width"]), int(row["columns"]), int(row["tokens"]), int(row["batch"])
        measured.append(_Measured(row["device"].partition(" ")[0], sizes, float(row["unfused"]) / float(row["fused"])))
    return measured


@lru_cache(maxsize=1024)
def faster(device: str, width: int, columns: int, padding: int, tokens: int, batch: int) -> bool:
    """Returns whether the fused form is faster, by the stored measurements.

    The nearest row of the device decides: that with the smallest sum of absolute logarithms of the ratios of width,
    columns, tokens and batch. Without rows for the device, the fused form is taken, except in models of width 768 and
    more whose mask needs padding.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        width: of the tokens.
        columns: by which the heads grow, padding included.
        padding: those that are zeros.
        tokens: number of tokens.
        batch: size of the batch.
    """
    sizes = (width, columns, tokens, batch)
    rows = [row for row in _measured() if row.device == device]
    if not rows:
        return width < _WIDE or not padding
    nearest = min(rows, key=lambda row: sum(abs(math.log(a / b)) for a, b in zip(row.sizes, sizes, strict=True)))
    return nearest.gain >= 1


def _is_traced() -> bool:
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return torch.compiler.is_compiling() or tracing


_pinned: bool | None = None


@contextmanager
def pinned_form(fused: bool) -> Iterator[None]:
    """Makes all fused layers, in all threads, take the fused form or the other one, instead of the faster one."""
    global _pinned
    before, _pinned = _pinned, fused
    try:
        yield
    finally:
        _pinned = before


def takes_fused_form(fused: FusedAttention, tokens: Tensor) -> bool:
    """Returns whether a layer takes its fused form for tokens ``(B, N, C)``.

    It takes the form that :func:`faster` names. Compiled and exported models, which are for any batch, take the fused
    one, and models under a pinned :func:`lamzoo.attention_backend` the other one.
    """
    if kernels.pinned() != "auto":
        return False
    if _pinned is not None:
        return _pinned
    if _is_traced():
        return True
    batch, length, width = tokens.shape
    if not (batch and length):
        return False
    return faster(tokens.device.type, width, fused.columns, fused.padding, length, batch)
