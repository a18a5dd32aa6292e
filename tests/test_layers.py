"""The order of dependence inside the package, as code: no import goes upwards, and none goes round in a circle."""

import ast
from collections import Counter
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "lamzoo"

# From the lowest layer to the highest. A module may import modules of its own layer and of those above it in this list.
LAYERS = (
    {"_aliases", "errors", "escaping", "files", "hub", "lazy", "quiet", "reading", "records", "version"},
    {"data", "lam", "layers"},
    {"adapters", "reduction"},
    {"models"},
    {"tasks"},
    {"registry", "weights"},
    {"evaluation", "export", "profiling", "video"},
    {"report", "training"},
    {"__main__", "cli", "timm"},
)
LAYER = {name: height for height, names in enumerate(LAYERS) for name in names}

# Names of files with the same role in each folder that has them. Those of cli/ are the names of the commands.
REPEATED = {
    "__init__", "attention", "base", "batches", "config", "evaluate", "factory", "feature_files", "files", "flickr",
    "grid", "metrics", "model", "recipe", "run", "splits", "timm", "validation",
}  # fmt: skip


class Import(NamedTuple):
    """One import statement: where it is, what it imports, and whether only type checkers run it."""

    module: str
    target: str
    place: str
    typing_only: bool


@cache
def modules() -> dict[str, Path]:
    """The modules of the package, by dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if path.name == "__init__.py" else parts)] = path
    return found


@cache
def imports() -> list[Import]:
    """What the modules import of one another, inside functions too; lamzoo/__init__.py names all that is public."""
    found = []
    for module, path in modules().items():
        if module == "lamzoo":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        guards = [
            node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        ]
        guarded = {id(inner) for guard in guards for child in guard.body for inner in ast.walk(child)}
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                full = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in modules() else node.module for name in full]
            place = f"{path.relative_to(PACKAGE.parent)}:{getattr(node, 'lineno', 0)}"
            for target in names:
                if target.split(".")[0] == "lamzoo":
                    found.append(Import(module, target, place, id(node) in guarded))
    return found


def test_every_module_has_a_layer() -> None:
    assert {name.split(".")[1] for name in modules() if name != "lamzoo"} <= set(LAYER)


def test_no_module_imports_one_above_it() -> None:
    upwards = [
        f"{place}: {module} imports {target}"
        for module, target, place, _ in imports()
        if target == "lamzoo" or LAYER[target.split(".")[1]] > LAYER[module.split(".")[1]]
    ]
    assert not upwards, "\n".join(upwards)


def test_masks_need_nothing_else_of_lamzoo() -> None:
    allowed = ("lamzoo.lam", "lamzoo.errors", "lamzoo.lazy", "lamzoo.reading")
    others = [
        f"{i.place}: {i.target}"
        for i in imports()
        if i.module.startswith("lamzoo.lam") and not i.target.startswith(allowed)
    ]
    assert not others, "\n".join(others)


@pytest.mark.parametrize("with_typing", [False, True])
def test_imports_have_no_circle(with_typing: bool) -> None:
    needs: dict[str, set[str]] = {}
    for module, target, _, typing_only in imports():
        if with_typing or not typing_only:
            needs.setdefault(module, set()).add(target)
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_a_file_name_has_one_meaning() -> None:
    counts = Counter(path.stem for path in modules().values() if path.parent.name != "cli")
    assert {name for name, count in counts.items() if count > 1} <= REPEATED
