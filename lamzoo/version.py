"""The version of lamzoo: the one place that states it; the build reads it from here."""

__version__ = "0.2.0.dev0"
