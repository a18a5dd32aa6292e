"""The command line: one file for each command of ``lamzoo``."""

from lamzoo.cli.app import main

__all__ = ["main"]
