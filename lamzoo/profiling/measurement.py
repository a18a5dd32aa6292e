"""All measurements of one model: GMACs, parameters, latency and throughput, compared with its plain backbone."""

from __future__ import annotations

import copy
import logging
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lamzoo.adapters import remove_lam
from lamzoo.adapters.state import has_masks
from lamzoo.adapters.wrappers import check_model, first_parameter
from lamzoo.errors import ConfigError, UnsupportedHostError, class_name
from lamzoo.profiling.analytic import analytic_macs
from lamzoo.profiling.inputs import as_arguments, default_input, evaluating, first_tensor
from lamzoo.profiling.latency import Latency, LatencyComparison, compare_latency, time_latency
from lamzoo.profiling.macs import Profile, profile
from lamzoo.profiling.memory import free_bytes, peak_growth
from lamzoo.reduction.stacks import reduction_of, remove_reduction

_logger = logging.getLogger(__name__)

MAX_BATCH = {"cpu": 64, "cuda": 1024}
_TOLERANCE = 0.01  # relative, between counted MACs and the formula
_GAIN = 1.01  # minimum speed-up for a batch size to count as better
_SLOWEST_S = 10.0  # a longer pass ends the search for a batch size


@dataclass(frozen=True)
class Measurement:
    """Measurements of one model.

    Attributes:
        profile: MACs and parameters for one image.
        latency: latency of one image.
        comparison: comparison with the model without its masks and token reduction; None for a model that has neither.
        batch: batch size of the highest throughput.
        images_per_s: that throughput, from the median pass.
        images_per_s_ratio: ratio to the throughput of the same at the same batch size; None likewise.
    """

    profile: Profile
    latency: Latency
    comparison: LatencyComparison | None
    batch: int
    images_per_s: float
    images_per_s_ratio: float | None


def measure(
    model: nn.Module,
    *,
    compiled: bool = False,
    batch: int | None = None,
    max_batch: int | None = None,
    repeats: int = 30,
    warmup: int = 5,
) -> Measurement:
    """Measures a model on its device and in its dtype, on random images of the size it was built for.

    A model with masks or token reduction is timed alternately with a copy without them, with the same weights and in
    the same process.

    Args:
        model: an uncompiled model, with or without masks and token reduction.
        compiled: time model and copy with ``torch.compile``; the batch size is still searched eagerly.
        batch: batch size of the throughput; by default the best that fits, see :func:`best_batch`.
        max_batch: limit of that search; by default 64 on the CPU and 1,024 on CUDA.
        repeats: number of timed passes of one image, and a third as many (at least 5) of the batch.
        warmup: number of untimed passes before.

    Returns:
        The measurement.

    Raises:
        ConfigError: the masks appear to cost nothing, the MACs differ from the family's formula by more than 1 %, the
            input size is unknown, or the number of repeats or images is invalid.
    """
    check_model(model)
    plain = _plain(model)
    cost = checked_profile(model, plain)
    if batch is None:
        batch = best_batch(model, max_batch)
    elif batch < 1:
        raise ConfigError(f"The batch is {batch}; it must be 1 or more.")
    runner, other = model, plain
    if compiled:  # static shapes, as for serving one batch size
        runner = torch.compile(model, dynamic=False)  # type: ignore[assignment]
        other = None if plain is None else torch.compile(plain, dynamic=False)  # type: ignore[assignment]
    one, many = default_input(model), default_input(model, batch)
    passes = max(5, repeats // 3)
    if other is None:
        latency, comparison, ratio = time_latency(runner, one, repeats, warmup), None, None
        median = time_latency(runner, many, passes, warmup=2).median_ms
    else:
        comparison = compare_latency(runner, other, one, repeats, warmup)
        latency = comparison.model
        beside = compare_latency(runner, other, many, passes, warmup=2)
        median, ratio = beside.model.median_ms, 1 / beside.ratio
    return Measurement(cost, latency, comparison, batch, 1e3 * batch / median, ratio)


def checked_profile(model: nn.Module, plain: nn.Module | None) -> Profile:
    """Counts a model's MACs and parameters, and checks their plausibility with all tokens.

    Args:
        model: a model with or without masks and token reduction.
        plain: the same model without both; None for a model that has neither.

    Raises:
        ConfigError: the masks appear to cost nothing, or the MACs differ from the family's formula by more than 1 %.
    """
    if reduction_of(model) is not None:
        checked_profile(remove_reduction(copy.deepcopy(model)), plain if has_masks(model) else None)
        return profile(model)
    cost = profile(model)
    if plain is not None:
        base = profile(plain)
        if cost.gmacs <= base.gmacs or cost.lam_gmacs <= 0 or cost.params_m <= base.params_m or cost.lam_params_m <= 0:
            raise ConfigError(
                f"The masks of {class_name(model)} appear to cost nothing ({cost.gmacs:.6g} GMACs with them, "
                f"{base.gmacs:.6g} without), which is implausible; profile the model with the eager backend."
            )
    try:
        formula = analytic_macs(model)
    except UnsupportedHostError as error:
        _logger.info("The counted MACs are not cross-checked: %s", error)
        return cost
    for what, counted, expected in (
        ("GMACs", cost.gmacs, formula.gmacs),
        ("GMACs of masks", cost.lam_gmacs, formula.lam_gmacs),
    ):
        if abs(counted - expected) > _TOLERANCE * expected:
            raise ConfigError(
                f"{counted:.6g} {what} were counted in {class_name(model)}, but its formula gives {expected:.6g}; one "
                "of them is wrong, please report it."
            )
    return cost


def best_batch(model: nn.Module, limit: int | None = None) -> int:
    """Finds the batch size of the highest throughput, by doubling.

    The search ends after two doublings in a row that gain less than 1 %, at ``limit``, before a batch that would not
    fit into the remaining memory, or after a pass that takes longer than 10 seconds.

    Args:
        model: a model on its device and in its dtype.
        limit: largest batch size to try; by default 64 on the CPU and 1,024 on CUDA.

    Returns:
        The batch size.

    Raises:
        ConfigError: the limit is below 1, or a single image does not fit.
    """
    check_model(model)
    device = first_parameter(model).device
    limit = MAX_BATCH.get(device.type, 64) if limit is None else limit
    if limit < 1:
        raise ConfigError(f"The batch limit is {limit}; it must be 1 or more.")
    best, best_rate, idle, batch, needed = 0, 0.0, 0, 1, 0
    while batch <= limit and idle < 2 and needed <= _free_host_bytes(device):
        timed = _try_batch(model, batch)
        if timed is None:
            break
        seconds, grown = timed
        gained = batch / seconds > _GAIN * best_rate
        if gained:
            best, best_rate = batch, batch / seconds
        _logger.info("batch %d: %.1f images/s", batch, batch / seconds)
        idle = 0 if gained else idle + 1
        batch, needed = 2 * batch, 2 * grown
        if seconds > _SLOWEST_S:
            break
    if not best:
        raise ConfigError(f"A single image does not fit into the memory of {device}; use a smaller model or dtype.")
    return best


def _free_host_bytes(device: torch.device) -> float:
    # Checked in advance: a GPU raises an error that can be caught, but on the CPU the kernel would kill the process.
    free = free_bytes() if device.type == "cpu" else None
    return float("inf") if free is None else free


def _try_batch(model: nn.Module, batch: int) -> tuple[float, int] | None:
    """Returns duration in seconds and memory growth in bytes of a pass; None if the batch does not fit."""
    try:
        inputs = as_arguments(default_input(model, batch))
        with evaluating(model), torch.inference_mode():
            _, grown = peak_growth(lambda: _pass(model, inputs))
            return statistics.median(_pass(model, inputs) for _ in range(3)), grown
    except (torch.OutOfMemoryError, MemoryError):
        torch.cuda.empty_cache()
        return None
    except RuntimeError as error:
        if "not enough memory" in str(error) or "can't allocate memory" in str(error):
            return None
        raise


def _pass(model: nn.Module, inputs: tuple[Any, ...]) -> float:
    device = first_tensor(inputs).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    model(*inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _plain(model: nn.Module) -> nn.Module | None:
    """Returns a copy without masks and token reduction; None for a model that has neither."""
    if has_masks(model):
        return remove_lam(copy.deepcopy(model))
    return remove_reduction(copy.deepcopy(model)) if reduction_of(model) is not None else None
