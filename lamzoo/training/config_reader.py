"""Recipes as nested plain values: read from a file, which may be bundled, and modified by overrides."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lamzoo.errors import RecipeError
from lamzoo.reading import parse_toml
from lamzoo.records import read_table
from lamzoo.registry.cards import data_dir

_BUNDLED = "lamzoo:"


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Reads a recipe file into nested values, without checking them.

    Args:
        path: a TOML or JSON file, or ``lamzoo:NAME`` for a bundled recipe.

    Raises:
        RecipeError: the file does not exist or is not valid TOML (JSON).
    """
    return read_table(recipe_file(path), what="Recipe", error=RecipeError)


def recipe_file(path: str | Path) -> Path:
    """Returns the path of a recipe: the bundled file for ``lamzoo:NAME``, any other path unchanged.

    Raises:
        RecipeError: no bundled recipe has this name; the message lists the closest ones.
    """
    name = str(path)
    if not name.startswith(_BUNDLED):
        return Path(path)
    name = name.removeprefix(_BUNDLED).removesuffix(".toml")
    files = {file.stem: file for file in sorted(data_dir("recipes").glob("*.toml"))}
    if name not in files:
        close = difflib.get_close_matches(name, files, n=3) or list(files)
        raise RecipeError(f"lamzoo has no recipe {name!r}; try {', '.join(_BUNDLED + other for other in close)}.")
    return files[name]


def override(table: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Applies ``"section.key=value"`` overrides to nested values in place, and returns the values.

    Args:
        table: nested values.
        overrides: overrides as of :func:`lamzoo.training.load_recipe`.

    Raises:
        RecipeError: an override has another form, or its section is a value.
    """
    for entry in overrides:
        _override(table, entry)
    return table


def put(table: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Sets nested values by keys such as ``"run.seed"`` in place, and returns them; raises as :func:`override`."""
    for key, value in values.items():
        _put(table, key, value, key)
    return table


def _override(table: dict[str, Any], entry: str) -> None:
    keys, separator, text = entry.partition("=")
    if not separator or "." not in keys:
        raise RecipeError(f"Override {entry!r} is not of the form section.key=value, such as run.batch_size=256.")
    try:
        value = parse_toml(f"value = {text}")["value"]
    except ValueError:
        value = text
    _put(table, keys, value, entry)


def _put(table: dict[str, Any], keys: str, value: Any, what: str) -> None:
    *sections, key = keys.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise RecipeError(f"Override {what!r} needs a table, but {section!r} is a value.")
    table[key] = value


def without_none(table: dict[str, Any]) -> dict[str, Any]:
    """Removes None entries from nested values, because TOML has no null."""
    return {
        key: without_none(value) if isinstance(value, dict) else value
        for key, value in table.items()
        if value is not None
    }
