"""The recipes bundled with lamzoo, referred to as ``lamzoo:NAME``."""

from __future__ import annotations

import difflib
from pathlib import Path

from lamzoo.errors import RecipeError
from lamzoo.registry.cards import data_dir

_PREFIX = "lamzoo:"


def recipe_file(path: str | Path) -> Path:
    """Returns the path of a recipe: the bundled file for ``lamzoo:NAME``, any other path unchanged.

    Raises:
        RecipeError: no bundled recipe has this name; the message lists the closest ones.
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
