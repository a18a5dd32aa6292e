"""The configuration of a learnable attention mask, as data; needs no torch."""

from __future__ import annotations

import dataclasses
import difflib
import json
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from lamzoo.errors import ConfigError
from lamzoo.lam.ops import OPS, MaskOp, Op
from lamzoo.reading import parse_json, parse_toml

Layers = Literal["multi", "single"]
Keys = Literal["content", "position"]
Heads = Literal["shared", "per-head"]
Sign = Literal["free", "positive"]
Init = Literal["identity", "paper"]
Config = TypeVar("Config")

_MOST, _MOST_LAYERS = 10_000_000, 100  # far above any useful mask; a damaged file can state any number

_CHOICES: dict[str, Collection[str]] = {
    "layers": get_args(Layers),
    "keys": get_args(Keys),
    "op": OPS,
    "heads": get_args(Heads),
    "sign": get_args(Sign),
    "init": get_args(Init),
}


@dataclass(frozen=True)
class LamConfig:
    """Configuration of a learnable attention mask (LAM); arXiv 2406.02761, section 3.

    The paper's mask is ``LamConfig(keys="position", op="mul", heads="shared", init="paper")``, with ``hidden`` and
    ``rank`` as the widths of its Linear + ReLU stack. The defaults were the best in the ablation among masks without a
    fixed length; with a fixed length, as in the zoo's image models, ``keys="position"`` was better.

    Attributes:
        layers: ``"multi"``: every layer has its own mask network, run on that layer's tokens;
            ``"single"``: one network, run on the first layer's tokens, its mask shared by all layers.
        keys: ``"content"``: the key factor is computed from the key tokens, for any length; ``"position"``: the key
            factor is a learned table over key positions (the paper's).
        op: ``"add"`` adds the mask to the scaled scores, ``"mul"`` multiplies them by it (the paper's).
        rank: width of the last hidden layer. The mask's factors have one more column, the bias.
        hidden: widths of the Linear + ReLU layers before the last one.
        heads: ``"per-head"``: one mask for each head; ``"shared"``: one mask for all heads (the paper's).
        sign: ``"free"``: the mask may be negative and flip a score (the paper's); ``"positive"``: both factors are
            non-negative, and with them the mask.
        init: ``"identity"``: the mask starts as the neutral element (1 for ``"mul"``, 0 for ``"add"``) and a
            fresh LAM changes nothing; ``"paper"``: torch's default initialisation throughout.
        max_length: number of key positions of a ``"position"`` table. ``None`` takes it from the host;
            it is required for hosts of unknown length (text, ``nn.MultiheadAttention``).
        modalities: number of modalities of the tokens: the mask also has a learned number for each pair of a query's
            and a key's modality. For hosts that know the modality of each token, such as the joint transformer of
            CLIP4Clip's tight head (2: text, video); 0 for masks that know none.

    Raises:
        ConfigError: a field has an invalid value or type, or two fields contradict each other.
    """

    layers: Layers = "multi"
    keys: Keys = "content"
    op: Op = "add"
    rank: int = 8
    hidden: tuple[int, ...] = ()
    heads: Heads = "per-head"
    sign: Sign = "free"
    init: Init = "identity"
    max_length: int | None = None
    modalities: int = 0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in tuple(choices):  # the value may be unhashable
                raise ConfigError(f"LamConfig.{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}.")
        _check_width("rank", self.rank)
        if not isinstance(self.hidden, (tuple, list)):
            raise ConfigError(f"LamConfig.hidden is {self.hidden!r}; it must be a tuple of widths, such as (64,).")
        if len(self.hidden) > _MOST_LAYERS:
            raise ConfigError(f"LamConfig.hidden has {len(self.hidden)} widths; a mask has at most {_MOST_LAYERS}.")
        for width in self.hidden:
            _check_width("hidden", width)
        object.__setattr__(self, "hidden", tuple(self.hidden))  # TOML and JSON give lists
        if self.max_length is not None:
            _check_width("max_length", self.max_length)
            if self.keys == "content":
                raise ConfigError(
                    "LamConfig.max_length sizes a table of key positions, and keys='content' has no table; "
                    "leave it out or use keys='position'."
                )
        if isinstance(self.modalities, bool) or self.modalities not in (0, *range(2, _MOST_LAYERS + 1)):
            raise ConfigError(
                f"LamConfig.modalities is {self.modalities!r}; it must be from 2 to {_MOST_LAYERS}, or 0 for none."
            )
        if self.modalities and self.sign == "positive":
            raise ConfigError("LamConfig.modalities adds numbers of any sign; use sign='free', or modalities=0.")
        if self.sign == "positive" and not self.mask_op.flips:
            raise ConfigError(
                f"LamConfig.sign='positive' keeps the mask from flipping scores, and a mask with op={self.op!r} flips "
                f"none; use op='mul', or sign='free' with op={self.op!r}."
            )

    @property
    def mask_op(self) -> MaskOp:
        """How the mask acts on the scores."""
        return OPS[self.op]

    @property
    def columns(self) -> int:
        """Number of columns of the factors: the rank, the bias, and one for each modality."""
        return self.rank + 1 + self.modalities

    @property
    def has_positions(self) -> bool:
        """Whether the key factor is a table over key positions."""
        return self.keys == "position"

    def with_length(self, length: int | None) -> LamConfig:
        """Returns the configuration with ``max_length`` set, if it has positions and no ``max_length`` of its own."""
        return dataclasses.replace(self, max_length=length) if self.has_positions and self.max_length is None else self

    def differences(self, other: LamConfig) -> list[str]:
        """Returns the fields that make masks of ``other`` incompatible, even where their tensors fit.

        ``init`` matters before training only, and tables of another ``max_length`` are resized.
        """
        names = (field.name for field in dataclasses.fields(self) if field.name not in ("init", "max_length"))
        return [name for name in names if getattr(self, name) != getattr(other, name)]

    @classmethod
    def of(cls, value: LamConfig | Mapping[str, Any] | bool) -> LamConfig:
        """Returns a configuration given as one, as a mapping of its fields, or as True for the defaults.

        Raises:
            ConfigError: ``value`` is none of these, or as for :meth:`from_dict`.
        """
        if isinstance(value, cls):
            return value
        if value is True:
            return cls()
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        raise ConfigError(
            f"{value!r} is not a LamConfig; pass one, a dict of its fields, or True for the default configuration."
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain TOML and JSON values, without ``max_length`` and ``modalities`` where unset."""
        fields = dataclasses.asdict(self)
        fields["hidden"] = list(self.hidden)
        if self.max_length is None:
            del fields["max_length"]
        if not self.modalities:
            del fields["modalities"]
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> LamConfig:
        """Builds a configuration from the fields given; the others keep their defaults.

        Raises:
            ConfigError: an unknown field (the message suggests the closest known one), an invalid value, or
                ``fields`` is no mapping.
        """
        return from_fields(cls, fields)

    def to_json(self) -> str:
        """Returns the configuration as a JSON object."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> LamConfig:
        """Reads the output of :meth:`to_json`.

        Raises:
            ConfigError: the text is not a JSON object, or not a valid configuration.
        """
        try:
            fields = parse_json(text)
        except ValueError as error:
            raise ConfigError(f"LamConfig.from_json got text that is not JSON: {error}.") from None
        return cls.from_dict(fields)

    def to_toml(self) -> str:
        """Returns the configuration as TOML key/value lines."""
        # Every value is a string, an int or a list of ints, for which JSON's notation is TOML's too.
        return "".join(f"{name} = {json.dumps(value)}\n" for name, value in self.to_dict().items())

    @classmethod
    def from_toml(cls, text: str) -> LamConfig:
        """Reads the output of :meth:`to_toml`.

        Raises:
            ConfigError: the text is not TOML, or not a valid configuration.
        """
        try:
            fields = parse_toml(text)
        except ValueError as error:
            raise ConfigError(f"LamConfig.from_toml got text that is not TOML: {error}.") from None
        return cls.from_dict(fields)


def _check_width(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST:
        raise ConfigError(
            f"LamConfig.{name} has {reprlib.repr(value)}; widths and lengths must be whole numbers from 1 to {_MOST:,}."
        )


def from_fields(cls: type[Config], fields: Mapping[str, Any]) -> Config:
    """Builds a configuration dataclass from some of its fields; raises as :meth:`LamConfig.from_dict`."""
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{cls.__name__} needs a mapping of its fields, not a {type(fields).__name__}.")
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name in fields:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the fields are {', '.join(known)}."
            raise ConfigError(f"{cls.__name__} has no field {name!r}; {hint}")
    try:
        return cls(**fields)
    except TypeError as error:
        raise ConfigError(f"{cls.__name__} cannot be made of {dict(fields)}: {error}.") from error
