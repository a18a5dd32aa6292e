"""Recipe files: TOML or JSON into nested values, changes to them, and dataclasses out of them; knows no section."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from lamzoo.errors import RecipeError

Section = TypeVar("Section")


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Returns a recipe file's nested values, not yet checked.

    Raises:
        RecipeError: no such file, or not TOML (or, for a ``.json``, not JSON).
    """
    path = Path(path)
    kind = "JSON" if path.suffix.lower() == ".json" else "TOML"
    try:
        text = path.read_text(encoding="utf-8-sig")
        table = json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except OSError as error:
        raise RecipeError(f"Recipe {path} can't be read: {error.strerror}; give the path of a TOML file.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RecipeError(f"Recipe {path} is not valid {kind}: {error}.") from None
    if not isinstance(table, dict):
        raise RecipeError(f"Recipe {path} is not valid: it holds no table.")
    return table


def override(table: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Puts ``"section.key=value"`` entries into nested values, and returns them; see :func:`load_recipe`.

    Raises:
        RecipeError: an entry of another form, or one that reaches into a value.
    """
    for entry in overrides:
        _override(table, entry)
    return table


def put(table: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Puts values into nested values by keys such as ``"run.seed"``, and returns them; raises as :func:`override`."""
    for key, value in values.items():
        _put(table, key, value, key)
    return table


def _override(table: dict[str, Any], entry: str) -> None:
    keys, separator, text = entry.partition("=")
    if not separator or "." not in keys:
        raise RecipeError(f"Override {entry!r} is not of the form section.key=value, such as run.batch_size=256.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    _put(table, keys, value, entry)


def _put(table: dict[str, Any], keys: str, value: Any, what: str) -> None:
    *sections, key = keys.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise RecipeError(f"Override {what!r} reaches into {section!r}, which is a value and not a table.")
    table[key] = value


def build(cls: type[Section], table: Any, where: str) -> Section:
    """Makes a dataclass of nested values, each checked against its annotation.

    Args:
        cls: a dataclass whose fields are plain values, tuples of numbers, ``Literal``, ``X | None`` or dataclasses.
        table: the values.
        where: the keys that lead there, for messages.

    Raises:
        RecipeError: an unknown, missing or mistyped key; named, with the closest known one.
    """
    if not isinstance(table, Mapping):
        raise RecipeError(f"Recipe entry [{where}] must be a table, not {table!r}.")
    hints = get_type_hints(cls)
    dot = f"{where}." if where else ""
    for key in table:
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {dot}{close[0]}?" if close else f"known are {', '.join(hints)}."
            raise RecipeError(f"Recipe key {dot}{key} is unknown; {hint}")
    for entry in dataclasses.fields(cls):  # type: ignore[arg-type]
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and entry.name not in table:
            raise RecipeError(f"Recipe key {dot}{entry.name} is missing; add it.")
    return cls(**{key: _typed(value, hints[key], dot + key) for key, value in table.items()})


def _typed(value: Any, hint: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)  # type: ignore[arg-type]
    origin, args = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, typing.Union):  # `X | None` or `X | bool | None`; TOML has no null
        return value if isinstance(value, bool) and bool in args else _typed(value, args[0], where)
    if origin is Literal:
        if value in args:
            return value
        raise RecipeError(f"Recipe key {where} is {value!r}; it must be one of {', '.join(map(repr, args))}.")
    if origin is tuple:
        if isinstance(value, (list, tuple)) and len(value) == len(args):
            return tuple(_typed(item, arg, where) for item, arg in zip(value, args, strict=True))
        raise RecipeError(f"Recipe key {where} is {value!r}; it must be {len(args)} numbers.")
    kind = origin or hint
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RecipeError(f"Recipe key {where} is {json.dumps(value, default=str)}; it must be a {kind.__name__}.")
    return value


def without_none(table: dict[str, Any]) -> dict[str, Any]:
    """Returns nested values without the entries that are None, which TOML has no word for."""
    return {
        key: without_none(value) if isinstance(value, dict) else value
        for key, value in table.items()
        if value is not None
    }
