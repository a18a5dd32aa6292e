"""Silence for libraries that address their warnings to developers."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.RLock()  # the level below which logging is disabled is that of the process


@contextmanager
def quietly() -> Iterator[None]:
    """Suppresses warnings, in the log and of :mod:`warnings`; in one thread at a time."""
    with _lock:
        before = logging.root.manager.disable
        logging.disable(max(before, logging.WARNING))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            logging.disable(before)
