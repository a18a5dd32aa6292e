"""``lamzoo bench``: what it hands to the benchmark, what it prints, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lamzoo.profiling import bench, read_rows
from tests.images import write_npz


@pytest.fixture
def timeouts() -> list[float | None]:
    """The limits of time of the jobs that were run."""
    return []


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, timeouts: list[float | None]) -> list[Any]:
    """The jobs that were run, by no process; those of ``vit_micro`` fail, and ``lam_vit_large`` is interrupted."""
    ran = []

    def run_job(job, *, timeout=None):
        ran.append(job)
        timeouts.append(timeout)
        if job.model == "lam_vit_large":
            raise KeyboardInterrupt
        if job.model == "vit_micro":
            return job.row(status="failed", error="it broke")
        return job.row(gmacs=1.25, lam_gmacs=0.5, latency_ms=2.0, latency_ratio=1.0625, batch=8, peak_mib=9.0)

    monkeypatch.setitem(bench.bench.__kwdefaults__, "runner", run_job)
    return ran


@pytest.fixture
def run(run):
    return lambda *args: run("bench", *args)


def test_a_table_is_printed_and_written(run, jobs) -> None:
    done = run("lam_vit_micro", "--out", "r.csv", "--no-plain")
    assert done.code == 0
    assert "lam_vit_micro" in done.out
    assert "1.062" in done.out
    assert "r.csv: 1 measured, 0 kept, 0 failed" in done.out
    assert [row.name for row in read_rows("r.csv")] == ["lam_vit_micro"]
    assert "0 measured, 1 kept" in run("lam_vit_micro", "--out", "r.csv", "--no-plain").out


def test_a_failed_row_is_printed_with_its_reason_and_in_the_exit_code(run, jobs) -> None:
    done = run("lam_vit_micro", "--out", "r.csv")
    assert done.code == 1
    assert "it broke" in done.out
    assert "1 failed" in done.out
    assert [row.status for row in read_rows("r.csv")] == ["ok", "failed"]
    assert run("lam_vit_micro", "--out", "r.csv", "--retry-failed").code == 1
    assert [job.model for job in jobs] == ["lam_vit_micro", "vit_micro", "vit_micro"]


def test_options_reach_the_job(run, jobs, timeouts: list[float | None]) -> None:
    run(
        "lam_vit_micro", "--out", "r.csv", "--no-plain", "--device", "cpu", "--dtype", "bfloat16", "--threads", "3",
        "--compile", "--batch", "4", "--img-size", "64", "--repeats", "7", "--seed", "5",
        "--max-batch", "24", "--eval-batch", "9", "--workers", "2", "--timeout", "90.5",
    )  # fmt: skip
    (job,) = jobs
    assert (job.max_batch, job.eval_batch, job.workers, timeouts) == (24, 9, 2, [90.5])
    assert (job.device, job.dtype, job.threads, job.mode, job.batch) == ("cpu", "bfloat16", 3, "compiled", 4)
    assert (job.img_size, job.resize, job.repeats, job.seed) == ("64", 64, 7, 5)
    assert (job.data, job.split, job.tag, job.plain) == (None, None, None, "vit_micro")


def test_merged_models_are_measured_beside_themselves_with_all_tokens(run, jobs) -> None:
    done = run("lam_vit_micro.cifar10", "--out", "r.csv", "--no-plain", "--merge", "0.63333")
    assert [job.merge for job in jobs] == [None, 0.6333]
    assert "lam_vit_micro.cifar10, merged to" in " ".join(done.out.split())
    assert (
        "0 measured, 2 kept" in run("lam_vit_micro.cifar10", "--out", "r.csv", "--no-plain", "--merge", "0.63333").out
    )


def test_fused_models_are_measured_beside_themselves(run, jobs) -> None:
    done = run("lam_vit_tiny", "lam_vit_micro.cifar10_mul", "--out", "r.csv", "--fuse", "--merge", "0.7")
    assert done.code == 1  # of the plain twin, which fails
    tiny = [(job.merge, job.form) for job in jobs if job.model == "lam_vit_tiny"]
    assert tiny == [(None, None), (None, "fused"), (0.7, None), (0.7, "fused")]
    assert {job.form for job in jobs if job.model != "lam_vit_tiny"} == {None}  # plain, or multiplicative masks
    assert "lam_vit_tiny, merged to 70 %, fused" in " ".join(done.out.split())


def test_with_data_the_models_have_weights(run, jobs, tmp_path: Path) -> None:
    data = f"npz:{write_npz(tmp_path / 'data')}"
    run("lam_vit_micro", "--out", "r.csv", "--no-plain", "--data", data)
    (job,) = jobs
    assert (job.name, job.data, job.split) == ("lam_vit_micro.cifar10", data, "test")


def test_models_that_cannot_read_the_data_do_not_stop_the_others(run, jobs, tmp_path: Path) -> None:
    data = f"npz:{write_npz(tmp_path / 'data')}"
    run("lam_vit_micro", "qd_detr_micro", "--out", "r.csv", "--no-plain", "--data", data)
    assert [(job.task, job.split) for job in jobs] == [("classification", "test"), ("moments", "test")]


def test_json_is_the_rows_and_nothing_else(run, jobs) -> None:
    done = run("lam_vit_micro", "--out", "r.csv", "--no-plain", "--json")
    (row,) = json.loads(done.out)
    assert (row["model"], row["gmacs"], row["status"]) == ("lam_vit_micro", 1.25, "ok")


def test_ctrl_c_leaves_a_whole_table(run, jobs) -> None:
    done = run("lam_vit_micro", "lam_vit_large", "--out", "r.csv", "--no-plain")
    assert done.code == 130
    assert [row.name for row in read_rows("r.csv")] == ["lam_vit_micro"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing_like_it"], "no model matches"),
        ([""], "the first argument is empty"),
        (["lam_vit_micro", "--data", "npz:nowhere"], "nowhere"),
        (["lam_vit_micro", "--device", "cuda:9"], "cuda:9"),
        (["lam_vit_micro", "--repeats", "1"], "repeats"),
        (["lam_vit_micro.cifar10", "--merge", "2"], "--merge is 2; it must be above 0 and at most 1"),
        (["lam_vit_micro", "--out", "file/r.csv"], "can't be written"),
    ],
)
def test_what_cannot_be_is_said_in_one_line_before_anything_runs(run, jobs, tmp_path, arguments, says: str) -> None:
    (tmp_path / "file").write_text("")
    done = run(*arguments, *([] if "--out" in arguments else ["--out", "r.csv"]))
    assert done.code == 2
    assert says in done.err
    assert done.err.count("\n") == 1
    assert not jobs
    assert not (tmp_path / "r.csv").exists()


@pytest.mark.slow
def test_a_real_benchmark(run) -> None:
    done = run("lam_vit_micro", "--out", "r.csv", "--threads", "1", "--batch", "2", "--repeats", "2")
    assert done.code == 0
    masked, plain = read_rows("r.csv")
    assert (masked.plain, plain.name) == ("vit_micro", "vit_micro")
    assert masked.gmacs is not None
    assert masked.lam_gmacs
    assert plain.gmacs == pytest.approx(masked.gmacs - masked.lam_gmacs, abs=2e-6)
    assert masked.latency_ratio is not None
    assert plain.latency_ratio is None
