"""One model's measurement as a process of its own: the job, and the row of a process that crashed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

from lamzoo.profiling.results import BenchRow, Mode

_WORKER = (sys.executable, "-m", "lamzoo.profiling.worker")


@dataclass(frozen=True)
class BenchJob:
    """A measurement: model and settings; fields shared with :class:`BenchRow` have the same meaning.

    Attributes:
        model: architecture.
        tag: set of weights.
        plain: name of the plain twin's row.
        data: what to score the model on, with its weights; None for random weights and no score.
        split: of the data.
        task: the name of the model's task.
        img_size: size of the images in the row, ``"224"`` or ``"HxW"``; None where it is not known beforehand.
        resize: input size to build the model with; None for its own.
        dtype: of weights and input for the timing, and of the autocast for the score.
        device: as torch writes it.
        device_name: as the row has it.
        threads: of PyTorch on the CPU.
        mode: eager or compiled.
        batch: of the throughput; None searches for the best.
        max_batch: where that search ends; None for the device's default.
        repeats: timed passes.
        seed: of random weights and input.
        eval_batch: images at a time when scoring.
        workers: processes that read images when scoring.
        commit: of the checkout.
    """

    model: str
    tag: str | None = None
    plain: str | None = None
    data: str | None = None
    split: str | None = None
    task: str = "classification"
    img_size: str | None = None
    resize: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    device_name: str = "cpu"
    threads: int = 1
    mode: Mode = "eager"
    batch: int | None = None
    max_batch: int | None = None
    repeats: int = 30
    seed: int = 0
    eval_batch: int = 64
    workers: int = 0
    commit: str | None = None

    @property
    def name(self) -> str:
        """As for ``create_model``."""
        return f"{self.model}.{self.tag}" if self.tag else self.model

    def row(self, **measured: Any) -> BenchRow:
        """Returns the row of this job: the settings, overridden by the measured values."""
        import timm
        import torch

        known = {field.name for field in dataclasses.fields(BenchRow)}
        told = {key: value for key, value in dataclasses.asdict(self).items() if key in known}
        told |= {"device": self.device_name, "torch": torch.__version__, "timm": timm.__version__}
        return BenchRow(**told | measured)

    def fits(self, row: BenchRow) -> bool:
        """Whether a row is of this model, data and setting, so that the job's result would take its place."""
        mine = self.row()
        same_size = mine.img_size == row.img_size or None in (mine.img_size, row.img_size)
        return same_size and dataclasses.replace(mine, img_size=row.img_size).key == row.key

    def answered_by(self, row: BenchRow) -> bool:
        """Whether a row is what this job would measure: it fits, and seed and demanded batch are the same."""
        return self.fits(row) and row.seed == self.seed and self.batch in (None, row.batch)


def run_job(job: BenchJob, *, timeout: float | None = None, command: Sequence[str] = _WORKER) -> BenchRow:
    """Measures one model in a process of its own.

    Args:
        job: what and how.
        timeout: seconds after which the process is ended and the row has failed.
        command: the process: reads a job as a line of JSON from its stdin, writes a row as JSON to its stdout.

    Returns:
        The row, with ``status="failed"`` and the reason where the process reported an error, crashed, was killed or
        took too long. The process never outlives this call, nor this process.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # left open: its end tells the worker that nobody waits for it any more
            stdout=out,
            stderr=err,
            env=os.environ | {"OMP_NUM_THREADS": str(job.threads), "MKL_NUM_THREADS": str(job.threads)},
            start_new_session=True,  # Ctrl-C is for this process, which then ends that one and all it started
            text=True,
        )
        try:
            _tell(process.stdin, json.dumps(dataclasses.asdict(job)))
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            return _failed(job, f"took longer than {timeout:g} s and was ended; --timeout gives it more")
        finally:
            _end(process)
        return _result(job, process.returncode, out, err)


def _tell(stdin: IO[str] | None, line: str) -> None:
    assert stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died before it could read: its exit code and stderr say why
        stdin.write(line + "\n")
        stdin.flush()


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:  # else its process group may be somebody else's by now
        with contextlib.suppress(ProcessLookupError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:  # Windows, which has no process groups to end
                process.kill()
    with contextlib.suppress(BrokenPipeError):
        if process.stdin is not None:
            process.stdin.close()
    process.wait()


def _result(job: BenchJob, code: int, out: IO[str], err: IO[str]) -> BenchRow:
    out.seek(0)
    text = out.read()
    if code == 0:
        try:
            return BenchRow(**json.loads(text))
        except (ValueError, TypeError):
            return _failed(job, "the process ended without a result")
    err.seek(0)
    lines = [line.strip() for line in err.read().splitlines() if line.strip()]
    last = f": {lines[-1]}" if lines else ""
    if code >= 0:
        return _failed(job, f"the process ended with exit code {code}{last}")
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = ", probably because memory ran out; try a smaller --max-batch" if name == "SIGKILL" else last
    return _failed(job, f"the process was killed by {name}{hint}")


def _failed(job: BenchJob, reason: str) -> BenchRow:
    return job.row(status="failed", error=reason)
