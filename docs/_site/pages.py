"""Writes the parts of pages that come from the code, where a page has ``<!-- generated: NAME -->``."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import griffe
import typer

import lamzoo
from lamzoo import training
from lamzoo.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
_MARKER = re.compile(r"<!-- generated: ([\w-]+) -->")


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Fills in a page, and keeps numbers with their deviations on one line; mkdocs calls it before rendering."""
    return _MARKER.sub(lambda match: GENERATED[match[1]](), markdown).replace(" ± ", "\u00a0±\u00a0")


def command_line() -> str:
    """Returns a section for each command: what it does, its arguments and its options."""
    group = typer.main.get_command(app)
    context = group.make_context("lamzoo", [], resilient_parsing=True)
    sections = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        with command.make_context(name, [], parent=context, resilient_parsing=True) as inner:
            usage = " ".join(command.collect_usage_pieces(inner))
            records = filter(None, [parameter.get_help_record(inner) for parameter in command.params])
            rows = [(f"`{option}`", text.replace("|", "&#124;")) for option, text in records]
        sections += [f"## `lamzoo {name}`", _unwrapped(command.help or ""), f"```text\nlamzoo {name} {usage}\n```"]
        sections.append(_table(("argument or option", ""), rows))
    return "\n\n".join(sections)


def recipes() -> str:
    """Returns the keys of each task's recipe, with types and defaults, from the dataclasses that read them."""
    tasks = [training.Recipe, training.RetrievalRecipe, training.MomentRecipe, training.CaptionRecipe]
    common: dict[str, list[type]] = {}
    for recipe in tasks:
        for name, section in _sections(recipe).items():
            common.setdefault(name, []).append(section)
    pages = ["## Keys of every task"]
    shared = {name for name, sections in common.items() if len(sections) == len(tasks) and len(set(sections)) == 1}
    pages += [_section(name, common[name][0], level=3) for name in sorted(shared)]
    for recipe in tasks:
        task = get_args(get_type_hints(recipe)["task"])[0]
        pages.append(f'## Keys of `task = "{task}"`')
        pages += [_section(k, section, level=3) for k, section in _sections(recipe).items() if k not in shared]
    return "\n\n".join(pages)


def _sections(recipe: type) -> dict[str, type]:
    """The tables of a recipe by name: the fields that are dataclasses themselves."""
    hints = {name: [hint, *get_args(hint)] for name, hint in get_type_hints(recipe).items()}
    return {name: kind for name, kinds in hints.items() for kind in kinds if dataclasses.is_dataclass(kind)}


def _section(name: str, section: Any, level: int) -> str:
    about, described = _docstring(section)
    for base in reversed(section.__mro__[1:-1]):
        described = {**_docstring(base)[1], **described}
    hints, rows = get_type_hints(section), []
    for field in dataclasses.fields(section):
        default = "required"
        if field.default is not dataclasses.MISSING:
            default = f"`{_toml(field.default)}`" if field.default is not None else ""
        elif field.default_factory is not dataclasses.MISSING:
            default = f"`{_toml(field.default_factory())}`"
        rows.append((f"`{field.name}`", _type(hints[field.name]), default, described.get(field.name, "")))
    return f"{'#' * level} `[{name}]`\n\n{about}\n\n" + _table(("key", "type", "default", ""), rows)


def _docstring(section: type) -> tuple[str, dict[str, str]]:
    """Returns a docstring's first paragraph without the section's name, and its attributes."""
    about, described = "", {}
    for part in griffe.Docstring(section.__doc__ or "").parse("google", warnings=False):
        if part.kind is griffe.DocstringSectionKind.text and not about:
            about = re.sub(r"^``\[\w+\]``: ", "", part.value)
        elif part.kind is griffe.DocstringSectionKind.attributes:
            described = {entry.name: _plain(" ".join(entry.description.split())) for entry in part.value}
    about = _plain(about)
    return about[:1].upper() + about[1:], described


def _plain(text: str) -> str:
    """Writes a docstring's cross-references as code."""
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)


def _type(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(f"`{_toml(value)}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(kind) for kind in inner if kind is not type(None))
    if origin is tuple:
        return "list of " + str(len(inner)) + " numbers"
    if origin in (list, dict):
        return "table" if origin is dict else f"list of {_type(inner[0])}"
    return {bool: "boolean", int: "integer", float: "number", str: "string"}[hint]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return "[" + ", ".join(f"{entry:.4g}" for entry in value) + "]"
    return str(value)


def models() -> str:
    """Returns the registry's models by family: cost, masks and weights."""
    families: dict[str, list[Any]] = {}
    for name in lamzoo.list_models():
        info = lamzoo.model_info(name)
        families.setdefault(info.family, []).append(info)
    pages = []
    for family, infos in families.items():
        rows = [(f"`{i.name}`", i.description, _millions(i.params), f"{i.gmacs:.4g}", _code(i.plain)) for i in infos]
        pages += [f"## `{family}`", _table(("model", "", "params (M)", "GMACs", "plain twin"), rows)]
        rows = [
            (f"`{i.name}.{tag.name}`", tag.dataset or "", tag.licence or "", _source(tag), _metrics(tag.metrics))
            for i in infos
            for tag in i.tags.values()
        ]
        if rows:
            pages += [f"Weights of `{family}`:", _table(("weights", "trained on", "licence", "source", "score"), rows)]
    return "\n\n".join(pages)


def _source(tag: Any) -> str:
    if tag.file:
        return "bundled"
    for kind in ("timm", "open_clip", "hub"):
        if getattr(tag, kind):
            return f"download: {kind} `{getattr(tag, kind)}`"
    return ""


def _metrics(metrics: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in metrics.items() if isinstance(value, (int, float)))


def _millions(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.3f}"


def _code(text: str | None) -> str:
    return f"`{text}`" if text else ""


def _unwrapped(text: str) -> str:
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(heads), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


GENERATED: dict[str, Callable[[], str]] = {"command-line": command_line, "recipes": recipes, "models": models}
