import dataclasses
import logging
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import lamzoo
from lamzoo.errors import DataError
from lamzoo.profiling import read_rows, write_rows
from lamzoo.profiling.bench import bench, checkout_commit
from lamzoo.profiling.job import BenchJob

JOB = BenchJob("lam_vit_micro", plain="vit_micro", img_size="32", batch=2, repeats=2)
JOBS = [JOB, dataclasses.replace(JOB, model="vit_micro", plain=None)]


class Runner:
    """Runs no process: notes the jobs, and fails or stops where told to."""

    def __init__(self, fail: str = "", stop: str = "") -> None:
        self.fail, self.stop = fail, stop
        self.ran: list[str] = []

    def __call__(self, job: BenchJob, timeout: float | None = None):
        self.ran.append(job.name)
        if job.name == self.stop:
            raise KeyboardInterrupt
        status, error = ("failed", "because") if job.name == self.fail else ("ok", None)
        return job.row(status=status, error=error, latency_ms=float(len(self.ran)), batch=job.batch or 8)


def test_every_job_is_a_row_in_order(tmp_path: Path):
    result = bench(JOBS, tmp_path / "r.csv", runner=Runner())
    assert [row.name for row in result.rows] == ["lam_vit_micro", "vit_micro"]
    assert read_rows(tmp_path / "r.csv") == result.rows
    assert (result.kept, result.failed) == (0, [])


def test_rows_that_are_there_are_kept(tmp_path: Path):
    first = bench(JOBS[:1], tmp_path / "r.csv", runner=Runner())
    runner = Runner()
    result = bench(JOBS, tmp_path / "r.csv", runner=runner)
    assert runner.ran == ["vit_micro"]
    assert result.kept == 1
    assert result.rows[0] == first.rows[0]


def test_a_model_that_was_trained_again_is_scored_again(tmp_path: Path):
    def save() -> None:
        lamzoo.save_pretrained(lamzoo.create_model("vit_micro", embed_dim=32, depth=1, num_heads=1), tmp_path / "run")

    def run(job: BenchJob, timeout: float | None = None):
        return job.row(value=1.0, weights_sha256=job.hash_weights(), batch=2)

    job = dataclasses.replace(JOB, model=f"local-dir:{tmp_path / 'run'}", data="imagefolder:x", split="test")
    save()
    assert [bench([job], tmp_path / "r.csv", runner=run).kept for _ in range(2)] == [0, 1]
    save()
    assert [bench([job], tmp_path / "r.csv", runner=run).kept for _ in range(2)] == [0, 1]


def test_failed_rows_are_kept_until_told_otherwise(tmp_path: Path):
    result = bench(JOBS, tmp_path / "r.csv", runner=Runner(fail="lam_vit_micro"))
    assert [row.error for row in result.failed] == ["because"]
    again, retry, force = Runner(), Runner(), Runner()
    assert len(bench(JOBS, tmp_path / "r.csv", runner=again).failed) == 1
    assert not bench(JOBS, tmp_path / "r.csv", runner=retry, retry_failed=True).failed
    bench(JOBS, tmp_path / "r.csv", runner=force, force=True)
    assert (again.ran, retry.ran, force.ran) == ([], ["lam_vit_micro"], ["lam_vit_micro", "vit_micro"])
    assert [row.name for row in read_rows(tmp_path / "r.csv")] == ["lam_vit_micro", "vit_micro"]


def test_one_failure_does_not_stop_the_others(tmp_path: Path, caplog):
    with caplog.at_level(logging.WARNING, "lamzoo"):
        result = bench(JOBS, tmp_path / "r.csv", runner=Runner(fail="lam_vit_micro"))
    assert [row.ok for row in result.rows] == [False, True]
    assert "lam_vit_micro failed: because" in caplog.text


def test_a_stopped_benchmark_leaves_a_whole_table_and_goes_on(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        bench(JOBS, tmp_path / "r.csv", runner=Runner(stop="vit_micro"))
    assert [row.name for row in read_rows(tmp_path / "r.csv")] == ["lam_vit_micro"]
    runner = Runner()
    bench(JOBS, tmp_path / "r.csv", runner=runner)
    assert runner.ran == ["vit_micro"]


def test_another_setting_is_another_row(tmp_path: Path):
    bench([JOB], tmp_path / "r.csv", runner=Runner())
    others = [
        dataclasses.replace(JOB, tag="cifar10"),
        dataclasses.replace(JOB, threads=2),
        dataclasses.replace(JOB, dtype="bfloat16"),
        dataclasses.replace(JOB, mode="compiled"),
        dataclasses.replace(JOB, img_size="64", resize=64),
        dataclasses.replace(JOB, data="npz:x", split="test"),
        dataclasses.replace(JOB, device="cuda", device_name="cuda (X)"),
    ]
    runner = Runner()
    bench([JOB, *others], tmp_path / "r.csv", runner=runner)
    assert len(runner.ran) == len(others)
    assert len(read_rows(tmp_path / "r.csv")) == 1 + len(others)


def test_another_seed_or_batch_takes_the_rows_place(tmp_path: Path):
    bench(JOBS, tmp_path / "r.csv", runner=Runner())
    runner = Runner()
    bench([dataclasses.replace(JOB, batch=4), dataclasses.replace(JOBS[1], seed=1)], tmp_path / "r.csv", runner=runner)
    assert len(runner.ran) == 2
    assert [(row.model, row.batch, row.seed) for row in read_rows(tmp_path / "r.csv")] == [
        ("lam_vit_micro", 4, 0),
        ("vit_micro", 2, 1),
    ]


def test_rows_of_others_stay(tmp_path: Path):
    write_rows(tmp_path / "r.csv", [dataclasses.replace(JOB, model="other").row()])
    bench(JOBS, tmp_path / "r.csv", runner=Runner())
    assert [row.model for row in read_rows(tmp_path / "r.csv")] == ["other", "lam_vit_micro", "vit_micro"]


def test_rows_of_other_versions_are_kept_and_named(tmp_path: Path, caplog):
    write_rows(tmp_path / "r.csv", [JOB.row(torch="1.0")])
    with caplog.at_level(logging.WARNING, "lamzoo"):
        bench([JOB], tmp_path / "r.csv", runner=Runner())
    assert "torch 1.0" in caplog.text
    assert torch.__version__ not in caplog.text


def test_a_table_that_is_none_or_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path):
    (tmp_path / "r.csv").write_text("a,b\n1,2\n")
    (tmp_path / "file").write_text("")
    runner = Runner()
    for path in (tmp_path / "r.csv", tmp_path / "file" / "r.csv"):
        with pytest.raises(DataError):
            bench(JOBS, path, runner=runner)
    assert runner.ran == []
    assert (tmp_path / "r.csv").read_text() == "a,b\n1,2\n"


def test_progress_is_told(tmp_path: Path):
    seen = []
    bench(JOBS, tmp_path / "r.csv", runner=Runner(), progress=lambda *state: seen.append(state))
    assert seen == [(0, 2, "lam_vit_micro"), (1, 2, "vit_micro"), (2, 2, "")]


def test_the_commit_is_that_of_the_checkout():
    root, commit = Path(__file__).resolve().parents[2], checkout_commit()
    if not (root / ".git").exists() or shutil.which("git") is None:
        assert commit is None
        return
    line = ["git", "-C", str(root), "rev-parse", "HEAD"]
    head = subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()
    assert commit is not None and commit.removesuffix("-dirty") == head[:12]
