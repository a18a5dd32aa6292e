"""Rows of results tables for the tests of the comparison; the numbers are made up."""

from dataclasses import replace
from pathlib import Path

from lamzoo.profiling.results import BenchRow, write_rows

PLAIN = BenchRow(
    model="vit_micro",
    tag="toy",
    data="imagefolder:toys",
    split="test",
    metric="top1",
    value=80.0,
    params_m=1.0,
    lam_params_m=0.0,
    gmacs=0.1,
    lam_gmacs=0.0,
    latency_ms=2.0,
    latency_q1_ms=1.9,
    latency_q3_ms=2.2,
    images_per_s=1000.0,
    peak_mib=20.0,
    img_size="32",
    batch=32,
    dtype="float32",
    device="cpu",
    threads=2,
    torch="2.15.0",
    timm="1.0.31",
    seed=0,
)
LAM = replace(
    PLAIN,
    model="lam_vit_micro",
    value=81.5,
    params_m=1.25,
    lam_params_m=0.25,
    gmacs=0.12,
    lam_gmacs=0.02,
    latency_ms=2.5,
    latency_q1_ms=2.4,
    latency_q3_ms=2.8,
    latency_ratio=1.25,
    latency_ratio_q1=1.2,
    latency_ratio_q3=1.3,
    plain="vit_micro.toy",
)
WORSE = replace(PLAIN, model="vit_worse", value=70.0, gmacs=0.5, latency_ms=9.0)
FAILED = BenchRow(
    model="lam_vit_huge",
    data="imagefolder:toys",
    status="failed",
    error="killed: no memory </script><script>oops()</script>",
)
UNSCORED = replace(PLAIN, model="vit_small", tag=None, data=None, split=None, metric=None, value=None)


def table(folder: Path, *rows: BenchRow, name: str = "results.csv") -> Path:
    """Writes rows into a results table and returns its path."""
    path = folder / name
    write_rows(path, rows)
    return path


def timm_results(folder: Path) -> Path:
    """Writes files of timm's layout, two results with GMACs and one without, and returns their folder."""
    folder.mkdir()
    (folder / "results-imagenet.csv").write_text(
        "model,img_size,top1,top1_err,top5,top5_err,param_count,crop_pct,interpolation\n"
        'giant.one,448,90.000,10.000,99.0,1.0,"1,013.01",1.000,bicubic\n'
        "small.one,224,80.000,20.000,95.0,5.0,22.05,0.900,bicubic\n"
        "small.two,384,82.000,18.000,96.0,4.0,22.05,0.900,bicubic\n"
    )
    columns = ("img_size", "samples_per_sec", "step_time", "batch_size", "gmacs", "macts")
    head = f"model,param_count,{','.join(f'infer_{column}' for column in columns)}\n"
    (folder / "benchmark-infer-amp-gpu.csv").write_text(head + "giant,1013.01,448,10.0,100.0,64,1900.5,9\n")
    (folder / "benchmark-infer-fp32-cpu.csv").write_text(
        head + "giant,1013.01,448,0.1,9000.0,1,,9\nsmall,22.05,224,76.49,13.058,1,4.61,11.95\n"
    )
    return folder
