"""Calls of the command line, each test in a folder, a cache and a log of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from lamzoo.cli import _output
from lamzoo.cli import app as cli


class Run(NamedTuple):
    """What a call of the command line left: its exit code and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    def call(*args: object) -> Run:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(arg) for arg in args])
        return Run(caught.value.code, *capsys.readouterr())

    return call


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """``tmp_path`` to work in, and an empty cache elsewhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_output, "_LINE_SECONDS", math.inf)  # a slow machine adds no lines
