"""Submodules that are imported when they are first asked for, so that ``import lamzoo`` is enough for all of them."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


def submodules_of(package: str) -> Callable[[str], ModuleType]:
    """Returns the ``__getattr__`` of a package that finds its submodules, as in ``lamzoo.data.captions``.

    Args:
        package: its ``__name__``.
    """

    def find(name: str) -> ModuleType:
        if name.startswith("_") or find_spec(f"{package}.{name}") is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return import_module(f"{package}.{name}")

    return find
