import contextlib
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lamzoo.profiling.job import BenchJob, run_job
from lamzoo.profiling.worker import measured_row
from lamzoo.registry.cards import data_dir
from lamzoo.weights.files import file_sha256
from tests.images import write_npz

JOB = BenchJob("lam_vit_micro", plain="vit_micro", img_size="32", batch=2, repeats=2)


def test_a_measured_row_is_complete():
    row = measured_row(JOB)
    assert (row.status, row.error) == ("ok", None)
    assert row.params_m == pytest.approx(1.066522)
    assert row.gmacs is not None
    assert row.lam_gmacs is not None
    assert row.gmacs > row.lam_gmacs > 0
    empty = {field.name for field in dataclasses.fields(row) if getattr(row, field.name) is None}
    assert empty == {
        "tag",
        "data",
        "split",
        "metric",
        "value",
        "weights_sha256",
        "commit",
        "error",
        "merge",
        "form",
        "rerank",
    }
    assert (row.img_size, row.batch, row.dtype, row.device, row.plain) == ("32", 2, "float32", "cpu", "vit_micro")
    assert JOB.answered_by(row)


def test_a_plain_row_has_no_ratio():
    row = measured_row(dataclasses.replace(JOB, model="vit_micro", plain=None))
    assert row.ok
    assert (row.lam_gmacs, row.lam_params_m) == (0, 0)
    assert [row.latency_ratio, row.latency_ratio_q1, row.plain_latency_ms, row.images_per_s_ratio] == [None] * 4


def test_a_row_with_data_has_the_score_and_the_hash_of_the_weights(tmp_path: Path):
    data = write_npz(tmp_path / "data")
    (data / "classes.json").unlink()  # those three classes are not the model's ten
    row = measured_row(dataclasses.replace(JOB, tag="cifar10", data=f"npz:{data}", split="test"))
    assert (row.status, row.error, row.metric) == ("ok", None, "top1")
    assert row.value is not None
    assert 0 <= row.value <= 100
    assert row.weights_sha256 == file_sha256(data_dir("weights") / "lam_vit_micro.cifar10.safetensors")


def test_another_image_size_is_measured_and_said():
    row = measured_row(dataclasses.replace(JOB, resize=64, img_size="64"))
    assert row.img_size == "64"
    assert row.gmacs is not None
    assert row.gmacs > 0.2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "lam_vit_mikro"}, "There is no model 'lam_vit_mikro'"),
        ({"dtype": "float12"}, "AttributeError: module 'torch'"),
        ({"tag": "cifar10", "data": "npz:nowhere", "split": "test"}, "nowhere"),
    ],
)
def test_an_error_is_a_failed_row_with_its_reason(change, says: str):
    job = dataclasses.replace(JOB, **change)
    row = measured_row(job)
    assert row.status == "failed"
    assert says in str(row.error)
    assert "\n" not in str(row.error)
    assert (row.latency_ms, row.gmacs) == (None, None)
    assert job.fits(row)


def worker(code: str):
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL, probably because memory ran"),
        ("import os; os.abort()", "killed by SIGABRT"),
        ("import sys; sys.stderr.write('so it\\nended\\n'); sys.exit(7)", "exit code 7: ended"),
        ("print('no JSON')", "without a result"),
        ("print('{\"models\": 1}')", "without a result"),
    ],
)
def test_a_process_that_dies_is_a_failed_row_with_its_reason(code: str, says: str):
    row = run_job(JOB, command=worker(code))
    assert row.status == "failed"
    assert says in str(row.error)
    assert JOB.fits(row)


def test_a_process_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path):
    pid = shlex.quote(str(tmp_path / "pid"))
    row = run_job(JOB, timeout=1, command=["sh", "-c", f"sleep 60 & echo $! > {pid}; exec sleep 60"])
    assert "longer than 1 s" in str(row.error)
    assert _has_ended(int((tmp_path / "pid").read_text()))


def _has_ended(pid: int) -> bool:
    for _ in range(600):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True  # ended, and init has not noticed yet
        time.sleep(0.05)
    return False


def test_a_process_is_told_its_job_and_its_threads():
    code = """
import json, os, sys
job = json.loads(sys.stdin.readline())
print(json.dumps({"model": job["model"], "error": os.environ["OMP_NUM_THREADS"]}))
"""
    row = run_job(dataclasses.replace(JOB, threads=3), command=worker(code))
    assert (row.model, row.error, row.status) == ("lam_vit_micro", "3", "ok")


@pytest.mark.slow
def test_the_real_process_measures():
    row = run_job(JOB)
    assert (row.status, row.error) == ("ok", None)
    assert row.latency_ratio is not None
    assert 2 < float(row.peak_mib or 0) < 40


@pytest.mark.slow
def test_the_real_process_ends_with_the_one_that_started_it():
    job = dataclasses.replace(JOB, repeats=10**6)
    process = subprocess.Popen(
        [sys.executable, "-m", "lamzoo.profiling.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
    process.stdin.close()
    assert process.wait(120) == 1
