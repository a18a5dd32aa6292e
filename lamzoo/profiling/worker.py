"""The worker process that measures one model: ``python -m lamzoo.profiling.worker`` maps a JSON job to a JSON row."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
from typing import Any

import torch
from torch import nn

from lamzoo.adapters import fuse
from lamzoo.errors import DataError, LamzooError
from lamzoo.profiling.candidates import size_text
from lamzoo.profiling.inputs import default_input, evaluating, image_size
from lamzoo.profiling.job import BenchJob
from lamzoo.profiling.measurement import Measurement, measure
from lamzoo.profiling.memory import MemoryMeter
from lamzoo.profiling.results import BenchRow
from lamzoo.profiling.stages import TwoStages, first_stage
from lamzoo.reading import to_json
from lamzoo.reduction.budget import merge_to_share
from lamzoo.registry.catalog import trained_data_of
from lamzoo.registry.factory import create_for_images, create_model
from lamzoo.tasks import EvalRequest, find_task


def main() -> None:
    """Reads a job from stdin, measures, and writes the row to stdout; output of libraries is redirected to stderr."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = BenchJob(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    with answer:
        answer.write(to_json(dataclasses.asdict(measured_row(job))))


def measured_row(job: BenchJob) -> BenchRow:
    """Measures a model in this process; an error becomes a failed row with its reason.

    Args:
        job: what and how.
    """
    try:
        return _measure(job)
    except LamzooError as error:
        reason = str(error)
    except Exception as error:  # noqa: BLE001 - of whatever model of whatever library: it is reported, in its row
        reason = f"{type(error).__name__}: {error}"
    return job.row(status="failed", error=" ".join(reason.split()))


def _leave_with_parent() -> None:
    while os.read(0, 1):  # returns when the parent closes the pipe or dies
        pass
    os._exit(1)


def _measure(job: BenchJob) -> BenchRow:
    torch.set_num_threads(job.threads)
    device = torch.device(job.device)
    _load_code()
    torch.manual_seed(job.seed)
    meter = MemoryMeter(device)
    model = _build(job).to(device, getattr(torch, job.dtype)).eval()
    measured = TwoStages(model, job.rerank) if job.rerank else model
    peak = _peak_mib(job, measured, meter)
    scored: dict[str, Any] = {}
    if job.data is not None and job.split is not None:
        model.cpu()  # frees the device for scoring
        metric, value = _score(job, model, device)
        scored = {"metric": metric, "value": value, "weights_sha256": job.hash_weights()}
        model.to(device)
    result = measure(
        measured, compiled=job.mode == "compiled", batch=job.batch, max_batch=job.max_batch, repeats=job.repeats
    )
    size = size_text(image_size(model)[1:]) if find_task(job.task).reads_images else None
    return job.row(img_size=size, peak_mib=peak, **_columns(result), **scored)


def _build(job: BenchJob) -> nn.Module:
    given = {} if job.resize is None else {"img_size": job.resize}
    model = create_for_images(job.name, pretrained=job.data is not None, **given)
    model = model if job.merge is None else merge_to_share(model, job.merge)
    model = model if job.form is None else fuse(model)
    return first_stage(model) if job.rerank == 0 else model


def _load_code() -> None:
    """Builds and runs a tiny model, so that lazily loaded code is not counted in any model's memory."""
    model = create_model("lam_vit_micro", embed_dim=32, depth=1, num_heads=1)
    with evaluating(model), torch.inference_mode():
        model(default_input(model))


def _peak_mib(job: BenchJob, model: nn.Module, meter: MemoryMeter) -> float | None:
    if job.mode == "eager":
        return meter.peak_mib(model, default_input(model))
    if job.device == "cpu":
        return None  # it would include the compiler's memory
    return meter.peak_mib(torch.compile(model, dynamic=False), default_input(model))  # type: ignore[arg-type]


def _score(job: BenchJob, model: nn.Module, device: torch.device) -> tuple[str, float]:
    """Returns the name of the task's watched metric for the data, and the model's score."""
    assert job.data is not None and job.split is not None
    task = find_task(job.task)
    exact = model if job.dtype == "float32" else _build(job)  # autocast needs the weights in full precision
    dataset = task.open_for_scoring(job.data, job.split, trained_data_of(job.name))
    options = {"rerank": job.rerank} if job.rerank else {}
    request = EvalRequest(job.eval_batch, device, job.dtype, job.workers, options=options)
    metric = task.watched_metric(dataset)
    value = metric.of(task.load("evaluate")(exact, dataset, request).scores)
    if value is None:
        raise DataError(f"{job.data} has no {metric.heading}; score {job.name} on other data.")
    return metric.name, value


def _columns(result: Measurement) -> dict[str, Any]:
    columns: dict[str, Any] = {
        "params_m": result.profile.params_m,
        "lam_params_m": result.profile.lam_params_m,
        "gmacs": result.profile.gmacs,
        "lam_gmacs": result.profile.lam_gmacs,
        "latency_ms": result.latency.median_ms,
        "latency_q1_ms": result.latency.quartiles_ms[0],
        "latency_q3_ms": result.latency.quartiles_ms[1],
        "batch": result.batch,
        "images_per_s": result.images_per_s,
        "images_per_s_ratio": result.images_per_s_ratio,
    }
    if result.comparison is not None:
        columns |= {
            "latency_ratio": result.comparison.ratio,
            "latency_ratio_q1": result.comparison.ratio_quartiles[0],
            "latency_ratio_q3": result.comparison.ratio_quartiles[1],
            "plain_latency_ms": result.comparison.baseline.median_ms,
        }
    return columns


if __name__ == "__main__":
    main()
