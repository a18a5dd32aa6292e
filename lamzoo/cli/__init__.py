"""The command line: the start of its process; each command of ``lamzoo`` has a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lamzoo.cli._process import exit_code, open_streams, stop_on_signals


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line and exits, as :func:`lamzoo.cli.app.main`; Ctrl-C is handled during imports too.

    Args:
        args: the arguments; ``sys.argv[1:]`` by default.
    """
    open_streams()
    try:
        with stop_on_signals():
            from lamzoo.cli.app import main as run  # 0.3 s

            run(args)
    except KeyboardInterrupt as stop:
        sys.exit(exit_code(stop))
