"""Lists which of timm's models take learnable masks, by building the models of ``timm.list_models()`` without memory.

    python -m benchmarks.hosts                     all of them, in minutes, into results/timm_hosts.csv
    python -m benchmarks.hosts 'swin*' 'maxvit*'   these alone; the other rows stay
    python -m benchmarks.hosts --missing           those without a row of the installed timm

A model takes masks if :func:`lamzoo.add_lam` supports all of its attention layers. ``benchmarks.tables`` writes the
rows into the documentation.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import timm
from torch import nn

from benchmarks.rows import STORED, markdown, read_rows, write_rows
from lamzoo.adapters.hosts import adapters_of
from lamzoo.errors import UnsupportedHostError

RESULTS = STORED / "timm_hosts.csv"
_REFUSAL = re.compile(r"^.+? \(([\w.]+)\) (.+)")
_OTHER = "which acts on a softmax over tokens: "


@dataclass(frozen=True)
class Row:
    """What :func:`lamzoo.add_lam` does with one of timm's models.

    Attributes:
        model: name in ``timm.list_models()``.
        family: module of ``timm.models`` that defines the model.
        layers: number of attention layers that get a mask.
        attention: their classes or, if the model is refused, the class that the refusal names; None without attention.
        refusal: what the error says about that class; None if the model isn't refused.
        timm: version of timm.
    """

    model: str
    family: str
    layers: int
    attention: str | None
    refusal: str | None
    timm: str

    @property
    def other(self) -> bool:
        """Whether the model has attention that is no softmax over tokens."""
        return _OTHER in (self.refusal or "")


def inspect(name: str) -> Row:
    """Builds one of timm's models on the ``meta`` device, and finds its attention layers as ``add_lam`` does."""
    family = family_of(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = timm.create_model(name, device="meta")
    try:
        paths = [site.path for adapter in adapters_of(model).values() for site in adapter.sites(model)]
    except UnsupportedHostError as error:
        layer, why = _REFUSAL.findall(str(error))[0]
        return Row(name, family, 0, layer.rpartition(".")[2], why, timm.__version__)
    return Row(name, family, len(paths), _classes(model, paths), None, timm.__version__)


def all_models(patterns: Sequence[str] = ()) -> list[str]:
    """Returns the names of timm's own models: :mod:`lamzoo.timm` may have registered others."""
    names = timm.list_models(list(patterns))
    return [name for name in names if timm.models.model_entrypoint(name).__module__.startswith("timm.")]


def family_of(name: str) -> str:
    """Returns the module of ``timm.models`` that defines a model."""
    return timm.models.model_entrypoint(name).__module__.rpartition(".")[2]


def _classes(model: nn.Module, paths: Iterable[str]) -> str | None:
    return ", ".join(sorted({type(model.get_submodule(path)).__name__ for path in paths})) or None


def coverage_table(rows: Sequence[Row]) -> str:
    """Returns the numbers of models with masks, of those that are refused, and of those without attention."""
    masked = sum(row.layers > 0 for row in rows)
    other = sum(row.other for row in rows)
    without = sum(row.layers == 0 and not row.refusal for row in rows)
    softmax = len(rows) - other - without
    versions = ", ".join(sorted({row.timm for row in rows}))
    return markdown(
        (f"tried, of `timm.list_models()` in timm {versions}", f"{len(rows):,}"),
        [
            ("without attention layers", f"{without:,}"),
            ("with attention that is no softmax over tokens", f"{other:,}"),
            ("whose attention is a softmax over tokens", f"{softmax:,}"),
            ("of these, with masks", f"{masked:,} ({masked / softmax:.1%})"),
        ],
    )


def table(rows: Iterable[Row]) -> str:
    """Returns timm's families whose models take masks, with the classes of their attention layers."""
    families: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.layers:
            families[row.family].append(row)
    lines = []
    for family, members in sorted(families.items()):
        layers = sorted({layer for row in members for layer in (row.attention or "").split(", ")})
        lines.append((f"`{family}`", len(members), _code(layers), _code(_spread(members))))
    return markdown(("family", "models", "attention layers", "such as"), lines)


def left_out_table(rows: Iterable[Row]) -> str:
    """Returns the models that are refused, by family and reason."""
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row in rows:
        if row.refusal:
            groups[row.family, row.attention or "", _reason(row.refusal)].append(row.model)
    lines = (
        (f"`{family}`", f"`{layer}`", reason, _code(names)) for (family, layer, reason), names in sorted(groups.items())
    )
    return markdown(("family", "because of", "which", "models"), lines)


def _reason(refusal: str) -> str:
    return refusal.partition(_OTHER)[2].partition(";")[0] or "isn't supported"


def _spread(rows: Sequence[Row]) -> list[str]:
    """Returns the first model with each combination of attention classes."""
    first: dict[str | None, str] = {}
    for row in rows:
        first.setdefault(row.attention, row.model)
    return list(first.values())


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def main() -> None:
    """Inspects models and writes their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", help="of names, as in timm.list_models; all of them by default")
    parser.add_argument("--missing", action="store_true", help="only those without a row of the installed timm")
    arguments = parser.parse_args()
    every = all_models()
    rows = {row.model: row for row in read_rows(RESULTS, Row) if row.timm == timm.__version__}
    for name in every if not arguments.patterns else all_models(arguments.patterns):
        if not (arguments.missing and name in rows):
            rows[name] = inspect(name)
    write_rows(RESULTS, [rows[name] for name in every if name in rows])


if __name__ == "__main__":
    main()
