"""The command ``lamzoo``: one file a command."""

from lamzoo.cli.app import main

__all__ = ["main"]
