"""The benchmark: jobs run sequentially, each in its own process, with a results table updated after each job."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lamzoo.files import file_lock
from lamzoo.profiling.job import BenchJob, run_job
from lamzoo.profiling.results import BenchRow, read_rows, write_rows

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchResult:
    """Result of a benchmark.

    Attributes:
        rows: one row per job, in the order of the jobs, new or kept.
        kept: number of rows that were already in the table.
    """

    rows: list[BenchRow]
    kept: int

    @property
    def failed(self) -> list[BenchRow]:
        """The rows without a measurement."""
        return [row for row in self.rows if not row.ok]


def bench(
    jobs: Sequence[BenchJob],
    out: str | Path,
    *,
    retry_failed: bool = False,
    force: bool = False,
    timeout: float | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    runner: Callable[..., BenchRow] = run_job,
) -> BenchResult:
    """Measures models and writes one row per model to a table.

    The table is replaced atomically after every job, so it is complete whenever the benchmark stops, and a second run
    continues from there. Rows of other models and settings are kept.

    Args:
        jobs: the models to measure.
        out: the CSV file; jobs whose rows exist are skipped.
        retry_failed: run the jobs of failed rows again.
        force: run all jobs again.
        timeout: seconds per job.
        progress: called with the number of jobs done, the total, and the name of the next.
        runner: function that runs a job.

    Returns:
        The rows of the jobs.

    Raises:
        DataError: the file is not a results table, or cannot be written.
    """
    out = Path(out)
    there = _rewrite(out, lambda rows: rows)  # fails early if the file can't be written
    done: dict[BenchJob, BenchRow] = {}
    for job in jobs:
        row = next((row for row in there if job.answered_by(row)), None)
        if row is not None and not force and (row.ok or not retry_failed):
            done[job] = row
    kept = len(done)
    _warn_of_others(list(done.values()), jobs)
    for job in jobs:
        if job in done:
            continue
        if progress is not None:
            progress(len(done), len(jobs), job.row().label)
        row = runner(job, timeout=timeout)
        if not row.ok:
            _logger.warning("%s failed: %s", row.label, row.error)
        _rewrite(out, partial(_with, job=job, new=row))
        done[job] = row
    if progress is not None:
        progress(len(jobs), len(jobs), "")
    return BenchResult([done[job] for job in jobs], kept)


def checkout_commit() -> str | None:
    """Returns the commit of the lamzoo checkout, with ``-dirty`` for uncommitted changes.

    None for an installed wheel, even if it is located inside another checkout.
    """
    package = Path(__file__).resolve().parents[1]
    try:
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        return _git(package, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def _rewrite(path: Path, change: Callable[[list[BenchRow]], list[BenchRow]]) -> list[BenchRow]:
    """Changes the rows of a table, while no other benchmark does, and returns them."""
    with file_lock(path.parent / f".{path.name}.lock", wait=True):
        rows = change(read_rows(path) if path.exists() else [])
        write_rows(path, rows)
    return rows


def _with(rows: list[BenchRow], job: BenchJob, new: BenchRow) -> list[BenchRow]:
    """Replaces the row of the same key, or appends the row."""
    places = [index for index, row in enumerate(rows) if job.fits(row)]
    if not places:
        return [*rows, new]
    rows[places[0]] = new
    return [row for index, row in enumerate(rows) if index not in places[1:]]


def _warn_of_others(rows: Sequence[BenchRow], jobs: Sequence[BenchJob]) -> None:
    """Warns if kept rows were measured with other versions, because the numbers may not be comparable."""
    now = {row.name: row for row in (job.row() for job in jobs)}
    stale = [row for row in rows if any(getattr(row, k) != getattr(now[row.name], k) for k in ("torch", "timm"))]
    if stale:
        _logger.warning(
            "%d kept rows were measured with other versions of torch or timm (%s: torch %s, timm %s); "
            "use --force to measure them again.",
            len(stale), stale[0].name, stale[0].torch, stale[0].timm,
        )  # fmt: skip
