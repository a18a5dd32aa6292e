"""The benchmark: jobs one after the other, each in its own process, into a table that is whole after each of them."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lamzoo.profiling.job import BenchJob, run_job
from lamzoo.profiling.results import BenchRow, read_rows, write_rows

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchResult:
    """What a benchmark did.

    Attributes:
        rows: one a job, in their order, measured now or before.
        kept: how many of them were in the table already.
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
    """Measures models and writes a row for each into a table.

    The table is replaced, in one step, after every job, so that it is whole whenever the benchmark is stopped; started
    again it goes on there. Rows of other models and settings in it stay.

    Args:
        jobs: what to measure.
        out: the CSV; rows in it that answer a job are kept, and their job is not run.
        retry_failed: run the jobs of failed rows again.
        force: run all jobs again.
        timeout: seconds for each job.
        progress: called with jobs done, jobs in all, and the name of the next.
        runner: what runs a job.

    Returns:
        The rows of the jobs.

    Raises:
        DataError: the table is no results table, or cannot be written.
    """
    out = Path(out)
    there = read_rows(out) if out.exists() else []
    write_rows(out, there)  # now, rather than after minutes of measuring, is the time to learn that it can't be
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
            progress(len(done), len(jobs), job.name)
        row = runner(job, timeout=timeout)
        if not row.ok:
            _logger.warning("%s failed: %s", row.name, row.error)
        # Read again: another benchmark may write to the same table.
        write_rows(out, _with(read_rows(out) if out.exists() else [], job, row))
        done[job] = row
    if progress is not None:
        progress(len(jobs), len(jobs), "")
    return BenchResult([done[job] for job in jobs], kept)


def checkout_commit() -> str | None:
    """Returns the commit of the checkout that this package runs from, with ``-dirty`` for uncommitted changes.

    None for an installed wheel, also where that lies inside somebody else's checkout.
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


def _with(rows: list[BenchRow], job: BenchJob, new: BenchRow) -> list[BenchRow]:
    """Puts a row where the one that it replaces stands, else at the end."""
    places = [index for index, row in enumerate(rows) if job.fits(row)]
    if not places:
        return [*rows, new]
    rows[places[0]] = new
    return [row for index, row in enumerate(rows) if index not in places[1:]]


def _warn_of_others(rows: Sequence[BenchRow], jobs: Sequence[BenchJob]) -> None:
    """Says so where kept rows are of other code than this: their numbers may not be comparable."""
    now = {row.name: row for row in (job.row() for job in jobs)}
    stale = [row for row in rows if any(getattr(row, k) != getattr(now[row.name], k) for k in ("torch", "timm"))]
    if stale:
        _logger.warning(
            "%d rows that are kept were measured with other versions of torch or timm (%s: torch %s, timm %s); "
            "--force measures them again.",
            len(stale), stale[0].name, stale[0].torch, stale[0].timm,
        )  # fmt: skip
