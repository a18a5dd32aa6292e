"""``lamzoo list``: the models, with their cost and their weights."""

from __future__ import annotations

from typing import Annotated

import typer

from lamzoo.cli import _output as out
from lamzoo.cli._options import Json
from lamzoo.errors import UnknownModelError


def list_command(
    pattern: Annotated[str, typer.Argument(metavar="[PATTERN]", help="Wildcard or part of a name; timm/... too.")] = "",
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Only names with weights, as arch.tag.")] = False,
    json: Json = False,
) -> None:
    """Lists the models that there are."""
    from lamzoo.registry.catalog import list_models, model_info

    wildcard = pattern
    if pattern and not set(pattern) & set("*?["):
        wildcard = f"{pattern}*" if pattern.startswith("timm/") else f"*{pattern}*"
    names = list_models(wildcard, pretrained=pretrained)
    if not names:
        weights = " with weights" if pretrained else ""
        raise UnknownModelError(
            f"no model{weights} matches {pattern!r}; `lamzoo list` shows all, `lamzoo list timm/` timm's"
        )
    infos = [(name, model_info(name)) for name in names]
    if json:
        keys = ("family", "description", "params", "gmacs")
        out.print_json([{"name": n, **{k: getattr(i, k) for k in keys}, "tags": list(i.tags)} for n, i in infos])
        return
    rows = [(n, _millions(i.params), i.gmacs, "yes" if i.lam else "no", ", ".join(i.tags)) for n, i in infos]
    out.print_table(("model", "params (M)", "GMACs", "masks", "weights"), rows)


def _millions(count: int | None) -> float | None:
    return None if count is None else count / 1e6
