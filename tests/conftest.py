"""What every test gets: a fixed seed, one thread, caches of its own, no hub, property tests without deadlines."""

# ruff: noqa: E402 - the environment comes before the imports that read it

import logging
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Set before huggingface_hub is imported, which reads them once: no test sees or fills the user's caches, and one that
# asks the hub for something is refused at once. Tests of the downloads name a server of their own.
_CACHE = tempfile.TemporaryDirectory(prefix="lamzoo-tests-")
os.environ |= {"XDG_CACHE_HOME": _CACHE.name, "HF_HOME": _CACHE.name, "HF_ENDPOINT": "http://127.0.0.1:9"}
os.environ.setdefault("MPLCONFIGDIR", str(Path.home() / ".cache" / "matplotlib"))  # matplotlib scans fonts for seconds
os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a script; children would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "lamzoo",
    deadline=None,
    max_examples=25,
    derandomize="CI" in os.environ,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("lamzoo")


@pytest.fixture(autouse=True)
def _log() -> Iterator[None]:
    """Leaves handlers and level of the library's log as they were, which the command line sets."""
    logger = logging.getLogger("lamzoo")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers = handlers
    logger.setLevel(level)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Seeds torch, and leaves the caller's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
