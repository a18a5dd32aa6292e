"""What could be imported from 0.1.0 can be imported until 0.3, maybe with a DeprecationWarning.

``artefacts/names.json`` lists ``lamzoo.__all__``, the names of the modules that were public, the builders that cards
name, and what the README of 0.1.0 showed; names that became public since are added to it. Never remove a line before
0.3.
"""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import lamzoo
from lamzoo.errors import MissingExtraError

NAMES = json.loads((Path(__file__).resolve().parent / "artefacts" / "names.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", NAMES["imports"])
def test_a_module_has_its_names(module: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            found = importlib.import_module(module)
        except MissingExtraError as error:
            pytest.skip(str(error))
        missing = [name for name in NAMES["imports"][module] if not hasattr(found, name)]
    assert not missing
    assert NAMES["imports"][module]


@pytest.mark.parametrize("path", NAMES["attributes"])
def test_what_the_readme_showed_is_reached_from_lamzoo_alone(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: Any = lamzoo
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for name in path.split(".")[1:]:
            if isinstance(vars(found).get(name), ModuleType):
                monkeypatch.delitem(vars(found), name)  # as if nobody had imported it
            found = getattr(found, name)
    assert found is not None
