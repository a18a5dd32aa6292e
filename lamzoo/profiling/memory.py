"""Memory used by a model and its forward pass, and memory available on the machine."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from lamzoo.profiling.inputs import Inputs, as_arguments, evaluating

_Result = TypeVar("_Result")

_MIB = 2**20
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CGROUP = Path("/sys/fs/cgroup")


class MemoryMeter:
    """Measures the memory of a model and one forward pass; create it *before* the model.

    On CUDA it is the peak of PyTorch's allocator during the pass (``max_memory_allocated``), including weights. On the
    CPU it is the peak of the process's resident memory during the pass minus its resident memory when the meter was
    created, which excludes Python, PyTorch and other libraries. Temporary memory for reading and converting weights is
    excluded in both cases. A CPU figure is accurate to about a MiB, and only in a fresh process: otherwise freed memory
    is reused and not counted.

    Args:
        device: the model's device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self._level = torch.cuda.memory_allocated(device)
        else:
            _touch_kernels()
            self._level = _resident("VmRSS")

    def peak_mib(self, model: nn.Module, input: Inputs) -> float:
        """Runs a forward pass in evaluation and inference mode; returns the memory in MiB.

        Args:
            model: the model, created after the meter, on the device.
            input: the input, which is included.
        """
        arguments = as_arguments(input)
        with evaluating(model), torch.inference_mode():
            if self.device.type == "cuda":
                model(*arguments)  # the first pass allocates the libraries' workspaces
                torch.cuda.synchronize(self.device)
                torch.cuda.reset_peak_memory_stats(self.device)
                model(*arguments)
                return (torch.cuda.max_memory_allocated(self.device) - self._level) / _MIB
            _reset_peak()
            model(*arguments)
            return max(0, _resident("VmHWM") - self._level) / _MIB


def peak_growth(run: Callable[[], _Result]) -> tuple[_Result, int]:
    """Calls a function; returns its result and the peak growth of the process's memory in bytes."""
    before = _resident("VmRSS")
    _reset_peak()
    result = run()
    return result, max(0, _resident("VmHWM") - before)


def free_bytes() -> int | None:
    """Returns the memory available on this machine, within its container's limit; None if unknown."""
    try:
        (line,) = (row for row in Path("/proc/meminfo").read_text().splitlines() if row.startswith("MemAvailable:"))
        free = int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return None
    try:
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        parts = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        cached = int(parts.get("inactive_file", 0))  # the kernel drops these files where memory is needed
    except (OSError, ValueError):  # no container, or no limit ("max")
        return free
    return min(free, limit - used + cached)


def _touch_kernels() -> None:
    """Loads what the first convolution, product and attention of a process load, so that it is not counted."""
    with torch.inference_mode():
        images = torch.zeros(1, 3, 8, 8)
        tokens = F.linear(F.conv2d(images, torch.zeros(8, 3, 2, 2)).flatten(2).mT, torch.zeros(8, 8))
        F.gelu(F.scaled_dot_product_attention(tokens, tokens, tokens) @ tokens.mT)


def _reset_peak() -> None:
    with contextlib.suppress(OSError):  # without this file, it remains the peak since the start
        _RESET.write_text("5")  # resets the peak to the current size


def _resident(field: str) -> int:
    try:
        (line,) = (row for row in _STATUS.read_text().splitlines() if row.startswith(f"{field}:"))
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        import resource  # not available on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
