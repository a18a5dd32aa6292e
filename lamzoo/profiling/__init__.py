"""Cost of a model: multiply-accumulates, parameters, latency and memory, compared with its plain backbone."""

from typing import TYPE_CHECKING

from lamzoo.lazy import submodules_of
from lamzoo.profiling.analytic import AnalyticMacs, analytic_macs
from lamzoo.profiling.inputs import image_size
from lamzoo.profiling.latency import Latency, LatencyComparison, compare_latency, time_latency
from lamzoo.profiling.macs import Profile, profile
from lamzoo.profiling.measurement import Measurement, best_batch, measure
from lamzoo.profiling.memory import MemoryMeter
from lamzoo.profiling.results import BenchRow, read_rows, write_rows

__all__ = [
    "AnalyticMacs",
    "BenchRow",
    "Latency",
    "LatencyComparison",
    "Measurement",
    "MemoryMeter",
    "Profile",
    "analytic_macs",
    "best_batch",
    "compare_latency",
    "image_size",
    "measure",
    "profile",
    "read_rows",
    "time_latency",
    "write_rows",
]

if not TYPE_CHECKING:  # hidden from type checkers, which would accept any name
    __getattr__ = submodules_of(__name__)
