"""Turns the cross-reference roles of docstrings into links of the site where their target is documented there."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|exc|obj):`(~?)([^`]+)`")


def _link(match: re.Match[str]) -> str:
    short, target = match[1], match[2].lstrip(".")
    text = target.rpartition(".")[2] if short else target
    return f'<autoref identifier="{target}" optional><code>{text}</code></autoref>'


class Roles(griffe.Extension):
    """Rewrites every docstring as it is collected; a target without a page becomes plain code."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Griffe's hook, called once for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_link, obj.docstring.value)
