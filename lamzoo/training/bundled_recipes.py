"""The recipes that come with lamzoo, which are named ``lamzoo:NAME``."""

from __future__ import annotations

import difflib
from pathlib import Path

from lamzoo.errors import RecipeError
from lamzoo.registry.cards import data_dir

_PREFIX = "lamzoo:"


def recipe_file(path: str | Path) -> Path:
    """Returns the file of a recipe: of ``lamzoo:NAME``, the one that comes with lamzoo; of anything else, itself.

    Raises:
        RecipeError: lamzoo has no recipe of that name; the message lists the closest ones.
    """
    name = str(path)
    if not name.startswith(_PREFIX):
        return Path(path)
    name = name.removeprefix(_PREFIX).removesuffix(".toml")
    files = {file.stem: file for file in sorted(data_dir("recipes").glob("*.toml"))}
    if name not in files:
        close = difflib.get_close_matches(name, files, n=3) or list(files)
        raise RecipeError(f"lamzoo has no recipe {name!r}; try {', '.join(_PREFIX + other for other in close)}.")
    return files[name]
