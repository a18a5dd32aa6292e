"""Memory: the peak of a model and one forward pass, and what this machine has left."""

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
    """Measures the memory that a model and one of its forward passes occupy; made *before* the model is built.

    On CUDA it is what PyTorch's allocator handed out at the peak of the pass (``max_memory_allocated``), weights
    included. On the CPU it is the process's peak of resident memory during the pass less its resident memory when the
    meter was made: what the model brought with it, without Python, PyTorch and the other libraries. What reading and
    converting the weights took in passing is in neither. A CPU figure is good to about a MiB, and only in a fresh
    process: in one that has worked already, freed memory is used again and seems free of cost.

    Args:
        device: where the model will be.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self._level = torch.cuda.memory_allocated(device)
        else:
            _touch_kernels()
            self._level = _resident("VmRSS")

    def peak_mib(self, model: nn.Module, input: Inputs) -> float:
        """Runs a forward pass, in evaluation and inference mode, and returns MiB.

        Args:
            model: built since, on the device.
            input: what it is called with; it counts as well.
        """
        arguments = as_arguments(input)
        with evaluating(model), torch.inference_mode():
            if self.device.type == "cuda":
                model(*arguments)  # the first pass makes the libraries' own workspaces
                torch.cuda.synchronize(self.device)
                torch.cuda.reset_peak_memory_stats(self.device)
                model(*arguments)
                return (torch.cuda.max_memory_allocated(self.device) - self._level) / _MIB
            _reset_peak()
            model(*arguments)
            return max(0, _resident("VmHWM") - self._level) / _MIB


def peak_growth(run: Callable[[], _Result]) -> tuple[_Result, int]:
    """Calls a function; returns its result, and by how many bytes this process was larger at the peak than before."""
    before = _resident("VmRSS")
    _reset_peak()
    result = run()
    return result, max(0, _resident("VmHWM") - before)


def free_bytes() -> int | None:
    """Returns how much memory is left on this machine, within its container's limit; None where that is unknown."""
    try:
        (line,) = (row for row in Path("/proc/meminfo").read_text().splitlines() if row.startswith("MemAvailable:"))
        free = int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return None
    try:
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free
    return min(free, limit - used)


def _touch_kernels() -> None:
    """Loads what the first convolution, product and attention of a process load, so that no model pays for it."""
    with torch.inference_mode():
        images = torch.zeros(1, 3, 8, 8)
        tokens = F.linear(F.conv2d(images, torch.zeros(8, 3, 2, 2)).flatten(2).mT, torch.zeros(8, 8))
        F.gelu(F.scaled_dot_product_attention(tokens, tokens, tokens) @ tokens.mT)


def _reset_peak() -> None:
    with contextlib.suppress(OSError):  # where there is no such file, it stays the peak of the process's whole life
        _RESET.write_text("5")  # the peak restarts at what is resident now


def _resident(field: str) -> int:
    try:
        (line,) = (row for row in _STATUS.read_text().splitlines() if row.startswith(f"{field}:"))
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        import resource  # not on Windows, which PyTorch's CPU figures are not taken on

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
