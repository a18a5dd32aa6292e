"""Whatever happens to a file, reading it ends in a right result or in one sentence, never in another exception."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from lamzoo.errors import LamzooError
from tests.faults.formats import ARRAYS, FORMATS, Format
from tests.faults.mutations import VALUES, draw, mutate_bytes, mutate_values

# A fixed set of files, so that the suite is stable; LAMZOO_FUZZ=20 tries other ones, and 20 times as many.
TIMES = int(os.environ.get("LAMZOO_FUZZ", "1"))
BATCH = 20  # files per example, because hypothesis takes longer to draw an example than lamzoo to read a file


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one, since some file systems take milliseconds to overwrite a file."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(prefix="lamzoo-", dir=memory) as name:
        yield Path(name)


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_a_mutated_file_is_read_rightly_or_refused(kind: Format, folder: Path) -> None:
    path = kind.write(folder)
    kind.read(path)
    content = path.read_bytes()
    values = None if kind.load is None else kind.load(path)
    vocabulary = ARRAYS if path.suffix == ".npz" else VALUES

    examples = TIMES * (50 if kind.often else 10)

    @hypothesis.settings(max_examples=examples, derandomize=TIMES == 1, database=None, report_multiple_bugs=False)
    @hypothesis.given(st.integers(0, 2**40))
    def read(seed: int) -> None:
        for number in range(BATCH):
            edits = draw(BATCH * seed + number)
            if number % 2 or kind.store is None:
                path.write_bytes(mutate_bytes(content, edits))
            else:
                path.write_bytes(content)
                kind.store(path, mutate_values(values, edits, vocabulary))
            hypothesis.note(f"{edits} of the {'bytes' if number % 2 else 'values'}: {path.read_bytes()[:2000]!r}")
            with contextlib.suppress(LamzooError):
                kind.read(path)

    read()
