"""Each test of the registry has one of its own: what it registers is gone afterwards."""

import pytest

from lamzoo import list_models
from lamzoo.registry import catalog


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    list_models()
    monkeypatch.setattr(catalog, "_specs", dict(catalog._specs))
    monkeypatch.setattr(catalog, "_broken", {})
