"""Attributes of packages that are imported on first use, and the names of lamzoo 0.1 that are deprecated."""

import sys
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

from lamzoo._aliases import ALIASES

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def submodules_of(package: str, homes: Mapping[str, str] | None = None) -> Callable[[str], Any]:
    """Returns the ``__getattr__`` of a package whose names and submodules are imported on first use.

    Args:
        package: its ``__name__``.
        homes: public name to the module that defines it.
    """
    names = homes or {}

    def find(name: str) -> Any:
        full = f"{package}.{name}"
        if name in names:
            value = getattr(import_module(names[name]), name)
            setattr(sys.modules[package], name, value)
            return value
        if not name.startswith("_") and ":" not in ALIASES.get(full, "") and find_spec(full) is not None:
            return import_module(full)
        return _deprecated(package, name)

    return find


def install_aliases() -> None:
    """Makes ``import`` find the modules of :data:`lamzoo._aliases.ALIASES` that no longer exist."""
    if not any(isinstance(finder, _AliasFinder) for finder in sys.meta_path):
        sys.meta_path.append(_AliasFinder())


def renamed_argument(old: str, new: str) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Returns a decorator of functions that still take the keyword ``old`` for ``new``, with a DeprecationWarning."""

    def decorate(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        @wraps(function)
        def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
            if old in kwargs and new in kwargs:
                raise TypeError(f"{old}= is the deprecated name of {new}=; give {new}= only.")
            if old in kwargs:
                message = f"The argument {old}= is deprecated and goes in lamzoo 0.3; use {new}=."
                warnings.warn(message, DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


class _AliasFinder(MetaPathFinder, Loader):
    """The last finder of ``sys.meta_path``: it is asked only for modules that don't exist."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if ":" in ALIASES.get(fullname, ":"):
            return None
        return ModuleSpec(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name, f"Deprecated; its names are in {ALIASES[spec.name]}.")
        module.__getattr__ = lambda name: _deprecated(spec.name, name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Does nothing: attributes are found on first use."""


def _deprecated(module: str, name: str) -> Any:
    """Returns what a module of 0.1 had under a name, with a warning; raises AttributeError if it had no such name."""
    home, _, new = ALIASES.get(f"{module}.{name}", f"{ALIASES.get(module, '')}:{name}").partition(":")
    if name.startswith("__") or not home or not hasattr(import_module(home), new):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    value = getattr(import_module(home), new)
    package = home.rpartition(".")[0]  # the shortest public name is the one to use
    public = [at for at in ("lamzoo", package) if new in getattr(import_module(at), "__all__", ())]
    message = f"{module}.{name} is deprecated and goes in lamzoo 0.3; use {[*public, home][0]}.{new}."
    warnings.warn(message, DeprecationWarning, stacklevel=3)
    return value
