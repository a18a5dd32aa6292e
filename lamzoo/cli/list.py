"""``lamzoo list``: the models, with their task, input, size, score, and where their weights are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lamzoo.cli import _output as out
from lamzoo.cli._options import Json
from lamzoo.reduction.config import TokenReduction

if TYPE_CHECKING:
    from lamzoo.registry.catalog import ModelInfo

_PLACES = {"hub": "download", "missing": "none"}


def list_command(
    pattern: Annotated[str, typer.Argument(
        metavar="[PATTERN]", help="A wildcard or a part of a name; timm/... lists models of timm.")] = "",
    pretrained: Annotated[bool, typer.Option(
        "--pretrained", help="Only models with weights, a line for each arch.tag.")] = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Lists the models.

    Score and weights are those of the default tag. Weights are bundled with lamzoo, cached on this machine, or have to
    be downloaded; lamzoo info NAME shows all tags.
    """
    from lamzoo.registry.catalog import match_models, model_info

    names = match_models(pattern, pretrained=pretrained)
    infos = [model_info(name) for name in names]
    facts = [_facts(name, info) for name, info in zip(names, infos, strict=True)]
    if json:
        out.print_json(facts)
        return
    rows = [
        (
            each["name"],
            each["task"],
            _size(each["input_size"], info),
            None if each["params"] is None else f"{each['params'] / 1e6:.1f}M",
            "" if each["score"] is None else f"{each['score']['metric']} {each['score']['value']:.1f}",
            each["weights"],
        )
        for each, info in zip(facts, infos, strict=True)
    ]
    out.print_table(("model", "task", "input", "params", "score", "weights"), rows, numbers={3}, compact=True)


def _facts(name: str, info: ModelInfo) -> dict[str, Any]:
    from lamzoo.registry.catalog import get_pretrained_cfg
    from lamzoo.weights.sources import location

    cfg = get_pretrained_cfg(name).to_dict() if info.source == "timm" else info.cfg(info.tag)
    place = "none" if info.tag is None else location(info.tag, weights_dir=info.weights_dir)
    return {
        "name": name,
        "family": info.family,
        "description": info.description,
        "params": info.params,
        "gmacs": info.gmacs,
        "tags": list(info.tags),
        "task": info.task,
        "input_size": cfg.get("input_size"),
        "score": _score(info),
        "weights": _PLACES.get(place, place),
        "reduction": None if info.reduction is None else TokenReduction.to_dict(info.reduction),
    }


def _score(info: ModelInfo) -> dict[str, Any] | None:
    from lamzoo.tasks import find_task

    metric = find_task(info.task).listed_metric
    if info.tag is None or (value := info.tag.metrics.get(metric.column)) is None:
        return None
    heading = metric.short.removesuffix(" (%)")
    return {"metric": heading, "value": value, "dataset": info.tag.metrics.get("dataset")}


def _size(input_size: tuple[int, int, int] | None, info: ModelInfo) -> str:
    if input_size is None:  # a card states the size of images; the inputs of a plug-in's model are unknown
        return "features" if info.source == "card" else ""
    _, height, width = input_size
    return f"{height}px" if height == width else f"{height}x{width}"
