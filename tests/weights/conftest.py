"""A hub on this machine, for the tests of weights."""

from collections.abc import Iterator

import pytest

from tests.weights.hub_server import HubServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub without repositories, which downloads and uploads go to."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server
