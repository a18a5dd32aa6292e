"""What a model costs: multiply-accumulates, parameters and latency, side by side with its unmasked backbone."""

from lamzoo.profiling.inputs import image_size
from lamzoo.profiling.latency import Latency, LatencyComparison, compare_latency
from lamzoo.profiling.macs import Profile, profile

__all__ = ["Latency", "LatencyComparison", "Profile", "compare_latency", "image_size", "profile"]
