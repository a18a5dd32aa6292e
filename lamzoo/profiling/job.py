"""Measurement of one model in a separate process: the job, and the row of a failed process."""

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

from lamzoo.errors import LamzooError
from lamzoo.profiling.results import BenchRow, Form, Mode
from lamzoo.registry.refs import join_name

_WORKER = (sys.executable, "-m", "lamzoo.profiling.worker")


@dataclass(frozen=True)
class BenchJob:
    """A model and its measurement settings; fields shared with :class:`BenchRow` have the same meaning.

    Attributes:
        model: architecture.
        tag: tag of the weights.
        plain: name of the plain twin's row.
        data: data set to score the model on, with its weights; None for random weights and no score.
        split: split of the data.
        task: name of the model's task.
        img_size: image size for the row, ``"224"`` or ``"HxW"``; None if not known in advance.
        resize: input size to build the model with; None for its own.
        dtype: dtype of weights and input in timings, and of autocast in scoring.
        device: a torch device.
        device_name: label of the device in the row.
        threads: number of PyTorch's CPU threads.
        mode: ``"eager"`` or ``"compiled"``.
        batch: batch size of the throughput; None searches for the best.
        max_batch: limit of that search; None for the device's default.
        repeats: number of timed passes.
        seed: seed of random weights and input.
        eval_batch: batch size in scoring.
        workers: worker processes that read images in scoring.
        commit: commit of the checkout.
        merge: share of its GMACs to merge the model's tokens to; None leaves the model as it is.
        form: ``"fused"`` to fuse the model; None leaves it as it is.
        rerank: candidates of a retrieval model in two stages, 0 for the first one alone; None compares every pair.
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
    merge: float | None = None
    form: Form | None = None
    rerank: int | None = None

    @property
    def name(self) -> str:
        """The name for ``create_model``."""
        return join_name(self.model, self.tag)

    def row(self, **measured: Any) -> BenchRow:
        """Returns the row of this job, with measurements overriding the values known in advance."""
        import timm
        import torch

        known = {field.name for field in dataclasses.fields(BenchRow)}
        told = {key: value for key, value in dataclasses.asdict(self).items() if key in known}
        told |= {"device": self.device_name, "torch": torch.__version__, "timm": timm.__version__}
        return BenchRow(**told | measured)

    def fits(self, row: BenchRow) -> bool:
        """Returns whether a row has this job's model, data and settings, so that the result would replace it."""
        if row.model != self.model:  # most rows of a large table
            return False
        mine = self.row()
        same_size = mine.img_size == row.img_size or None in (mine.img_size, row.img_size)
        return same_size and dataclasses.replace(mine, img_size=row.img_size).key == row.key

    def answered_by(self, row: BenchRow) -> bool:
        """Returns whether a row is a result of this job.

        It matches, with the same seed and requested batch size, and was scored with the weights that are in the model's
        folder now, if it is a model in a folder.
        """
        matches = self.fits(row) and row.seed == self.seed and self.batch in (None, row.batch)
        if not matches or row.weights_sha256 is None or not self.model.startswith("local-dir:"):
            return matches
        try:
            return row.weights_sha256 == self.hash_weights()
        except LamzooError:
            return False  # the worker reports it, in the row

    def hash_weights(self) -> str:
        """Hashes the model's weights file, or the index of sharded weights."""
        from lamzoo.registry.factory import find_weights_file
        from lamzoo.weights.files import file_sha256

        return file_sha256(find_weights_file(self.name).path)


def run_job(job: BenchJob, *, timeout: float | None = None, command: Sequence[str] = _WORKER) -> BenchRow:
    """Measures a model in a separate process.

    Args:
        job: what and how.
        timeout: seconds after which the process is killed and the row marked as failed.
        command: command of the process, which reads a job as a line of JSON from stdin and writes a row to stdout.

    Returns:
        The row, with ``status="failed"`` and the reason if the process reported an error, crashed, was killed or timed
        out. The process never outlives this call or the calling process.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # kept open: the worker exits when it closes
            stdout=out,
            stderr=err,
            env=os.environ | {"OMP_NUM_THREADS": str(job.threads), "MKL_NUM_THREADS": str(job.threads)},
            start_new_session=True,  # Ctrl-C reaches only this process, which then kills the worker's group
            text=True,
        )
        try:
            _tell(process.stdin, json.dumps(dataclasses.asdict(job)))
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            return _failed(job, f"took longer than {timeout:g} s and was killed; raise --timeout")
        finally:
            _end(process)
        return _result(job, process.returncode, out, err)


def _tell(stdin: IO[str] | None, line: str) -> None:
    assert stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died before reading; exit code and stderr give the reason
        stdin.write(line + "\n")
        stdin.flush()


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:  # otherwise its process group id may have been reused
        with contextlib.suppress(ProcessLookupError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:  # Windows has no process groups
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
