"""Latency of a model, alone or alternating with a baseline in the same process."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lamzoo.adapters.wrappers import check_model
from lamzoo.errors import ConfigError
from lamzoo.profiling.inputs import Inputs, as_arguments, evaluating, first_tensor


@dataclass(frozen=True)
class Latency:
    """Latency of a forward pass in milliseconds.

    Attributes:
        median_ms: the median.
        quartiles_ms: first and third quartiles.
    """

    median_ms: float
    quartiles_ms: tuple[float, float]


@dataclass(frozen=True)
class LatencyComparison:
    """Latencies of two models timed alternately on the same input.

    Attributes:
        model: latency of the model.
        baseline: latency of the baseline.
        ratio: median of the ratios model / baseline over pairs of neighbouring runs, which is robust to gradual changes
            in the machine's speed.
        ratio_quartiles: first and third quartiles of these ratios.
        repeats: number of timed pairs.
        input_shape: shape of the input.
        dtype: dtype of the input.
        device: label of the device, such as ``"cpu (AMD EPYC)"`` or ``"cuda (NVIDIA H100)"``.
        threads: number of PyTorch's CPU threads.
    """

    model: Latency
    baseline: Latency
    ratio: float
    ratio_quartiles: tuple[float, float]
    repeats: int
    input_shape: tuple[int, ...]
    dtype: str
    device: str
    threads: int


def time_latency(model: nn.Module, input: Inputs, repeats: int = 30, warmup: int = 5) -> Latency:
    """Times the forward passes of one model, in evaluation and inference mode.

    Args:
        model: a model on the input's device.
        input: the input, on the CPU or a CUDA device.
        repeats: number of timed passes.
        warmup: number of untimed passes before.

    Returns:
        Median and quartiles.

    Raises:
        ConfigError: as for :func:`compare_latency`.
    """
    timer = _checked_timer(input, repeats, warmup, model=model)
    with evaluating(model), torch.inference_mode():
        times = [timer(model, input) for _ in range(warmup + repeats)]
    return Latency(*_spread(times[warmup:]))


def compare_latency(
    model: nn.Module, baseline: nn.Module, input: Inputs, repeats: int = 30, warmup: int = 5
) -> LatencyComparison:
    """Times the forward passes of two models alternately, in evaluation and inference mode.

    The order alternates from pair to pair. On a GPU, time is measured with CUDA events.

    Args:
        model: the model of interest.
        baseline: the model to compare with, such as the same backbone without masks.
        input: the input of both, on the CPU or a CUDA device.
        repeats: number of timed pairs.
        warmup: number of untimed pairs before.

    Returns:
        Medians, quartiles and the ratio.

    Raises:
        ConfigError: fewer than 2 repeats, a negative warmup, an unsupported device, or a model and input on different
            devices.
    """
    timer = _checked_timer(input, repeats, warmup, model=model, baseline=baseline)
    pairs: list[tuple[float, float]] = []
    with evaluating(model, baseline), torch.inference_mode():
        for index in range(warmup + repeats):
            if index % 2:
                second = timer(baseline, input)
                pair = timer(model, input), second
            else:
                pair = timer(model, input), timer(baseline, input)
            if index >= warmup:
                pairs.append(pair)
    ratio, ratio_quartiles = _spread([mine / other for mine, other in pairs])
    first = first_tensor(input)
    return LatencyComparison(
        model=Latency(*_spread([first for first, _ in pairs])),
        baseline=Latency(*_spread([second for _, second in pairs])),
        ratio=ratio,
        ratio_quartiles=ratio_quartiles,
        repeats=repeats,
        input_shape=tuple(first.shape),
        dtype=str(first.dtype).removeprefix("torch."),
        device=device_label(first.device),
        threads=torch.get_num_threads(),
    )


def time_call(run: Callable[[], object], device: torch.device) -> float:
    """Returns the duration of a call in milliseconds, measured with CUDA events on a CUDA device."""
    if device.type == "cpu":
        begun = time.perf_counter()
        run()
        return (time.perf_counter() - begun) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
    return start.elapsed_time(end)


def device_label(device: torch.device) -> str:
    """Returns a label for a device that distinguishes machines: ``"cuda (NVIDIA H100)"``."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return f"{device.type} ({name})" if name else device.type


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _checked_timer(
    input: Inputs, repeats: int, warmup: int, **models: nn.Module
) -> Callable[[nn.Module, Inputs], float]:
    for model in models.values():
        check_model(model)
    if repeats < 2 or warmup < 0:
        raise ConfigError(
            f"repeats={repeats}, warmup={warmup}: quartiles need at least 2 repeats and no negative warmup."
        )
    device = first_tensor(input).device
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"Latency is measured on cpu and cuda devices, not on {device}; move the models and the input."
        )
    for role, model in models.items():
        where = next((parameter.device for parameter in model.parameters()), device)
        if where != device:
            raise ConfigError(f"The {role} is on {where} and the input on {device}; put them on one device.")
    return lambda model, input: time_call(partial(model, *as_arguments(input)), device)


def _spread(values: list[float]) -> tuple[float, tuple[float, float]]:
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return median, (first, third)
