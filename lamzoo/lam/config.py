"""The description of a learnable attention mask, as data; knows nothing of tensors or models."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from lamzoo.errors import ConfigError

Layers = Literal["multi", "single"]
Keys = Literal["content", "position"]
Op = Literal["mul", "add"]
Heads = Literal["shared", "per-head"]
Sign = Literal["free", "positive"]
Init = Literal["identity", "paper"]
Config = TypeVar("Config")

_CHOICES: dict[str, tuple[str, ...]] = {
    "layers": get_args(Layers),
    "keys": get_args(Keys),
    "op": get_args(Op),
    "heads": get_args(Heads),
    "sign": get_args(Sign),
    "init": get_args(Init),
}


@dataclass(frozen=True)
class LamConfig:
    """What a learnable attention mask (LAM) is made of; arXiv 2406.02761, section 3.

    The paper's own mask is ``LamConfig(keys="position", op="mul", heads="shared", init="paper")``, with ``hidden`` and
    ``rank`` as the widths of its Linear + ReLU stack. The defaults are what the ablation (docs) found best among
    the masks that need no fixed length; where the length is fixed, as in the zoo's image models, ``keys="position"``
    was better still.

    Attributes:
        layers: ``"multi"``: every layer has its own mask network, run on that layer's tokens;
            ``"single"``: one network, run on the first layer's tokens, its mask shared by all layers.
        keys: ``"content"``: the key factor is computed from the key tokens, so that any length works;
            ``"position"``: it is a learned table over key positions (the paper's).
        op: ``"add"`` adds the mask to the scaled scores, ``"mul"`` multiplies them by it (the paper's).
        rank: width of the last hidden layer. The mask's factors have one column more, the bias.
        hidden: widths of the Linear + ReLU layers before the last one.
        heads: ``"per-head"``: one mask for each head; ``"shared"``: one for all of them (the paper's).
        sign: ``"free"``: the mask may be negative and flip a score (the paper's); ``"positive"``: both
            factors are non-negative, so that it never does.
        init: ``"identity"``: the mask starts as the neutral element (1 for ``"mul"``, 0 for ``"add"``) and a
            fresh LAM changes nothing; ``"paper"``: torch's default initialisation throughout.
        max_length: number of key positions of a ``"position"`` table. ``None`` takes it from the host;
            hosts that don't know their length (text, ``nn.MultiheadAttention``) need it.

    Raises:
        ConfigError: a field has a value, type or companion that means nothing.
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

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"LamConfig.{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}.")
        _check_width("rank", self.rank)
        if not isinstance(self.hidden, (tuple, list)):
            raise ConfigError(f"LamConfig.hidden is {self.hidden!r}; it must be a tuple of widths, such as (64,).")
        for width in self.hidden:
            _check_width("hidden", width)
        object.__setattr__(self, "hidden", tuple(self.hidden))  # TOML and JSON give lists
        if self.max_length is not None:
            _check_width("max_length", self.max_length)
            if self.keys == "content":
                raise ConfigError(
                    "LamConfig.max_length sizes a table of key positions and keys='content' has none; "
                    "leave it out or use keys='position'."
                )
        if self.sign == "positive" and self.op == "add":
            raise ConfigError(
                "LamConfig.sign='positive' keeps a factor from flipping a score and op='add' has no factor; "
                "use op='mul', or sign='free' with op='add'."
            )

    def differences(self, other: LamConfig) -> list[str]:
        """Returns the fields in which masks of ``other`` would mean something else, though their tensors may fit.

        ``init`` matters before training only, and tables of another ``max_length`` are resized.
        """
        names = (field.name for field in dataclasses.fields(self) if field.name not in ("init", "max_length"))
        return [name for name in names if getattr(self, name) != getattr(other, name)]

    @classmethod
    def of(cls, value: LamConfig | Mapping[str, Any] | bool) -> LamConfig:
        """Returns a configuration that is given as one, as a mapping of its fields, or as True for the defaults.

        Raises:
            ConfigError: anything else, or as :meth:`from_dict`.
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
        """Returns the fields as plain TOML and JSON values, ``max_length`` left out where it is None."""
        fields = dataclasses.asdict(self)
        fields["hidden"] = list(self.hidden)
        if self.max_length is None:
            del fields["max_length"]
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> LamConfig:
        """Builds a configuration from the fields given; the others keep their defaults.

        Raises:
            ConfigError: an unknown field, named with the closest known one, an impossible value, or no mapping at all.
        """
        return from_fields(cls, fields)

    def to_json(self) -> str:
        """Returns the configuration as a JSON object."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> LamConfig:
        """Reads what :meth:`to_json` wrote.

        Raises:
            ConfigError: the text is not a JSON object, or not a valid configuration.
        """
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"LamConfig.from_json got text that is not JSON: {error}.") from None
        return cls.from_dict(fields)

    def to_toml(self) -> str:
        """Returns the configuration as TOML key/value lines."""
        # Every value is a string, an int or a list of ints, for which JSON's notation is TOML's too.
        return "".join(f"{name} = {json.dumps(value)}\n" for name, value in self.to_dict().items())

    @classmethod
    def from_toml(cls, text: str) -> LamConfig:
        """Reads what :meth:`to_toml` wrote.

        Raises:
            ConfigError: the text is not TOML, or not a valid configuration.
        """
        try:
            fields = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"LamConfig.from_toml got text that is not TOML: {error}.") from None
        return cls.from_dict(fields)


def _check_width(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"LamConfig.{name} has {value!r}; widths and lengths are whole numbers of at least 1.")


def from_fields(cls: type[Config], fields: Mapping[str, Any]) -> Config:
    """Builds a dataclass of a configuration from some of its fields; raises as :meth:`LamConfig.from_dict`."""
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
