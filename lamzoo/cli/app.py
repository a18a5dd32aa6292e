"""The command ``lamzoo``: subcommands, exit codes and error messages."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version as installed
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from typer.core import TyperGroup

from lamzoo.cli import _output as out
from lamzoo.cli._options import CheckedCommand
from lamzoo.cli._process import Stopped, exit_code
from lamzoo.cli.bench import bench
from lamzoo.cli.compare import compare
from lamzoo.cli.demo import demo
from lamzoo.cli.describe import describe
from lamzoo.cli.download import download
from lamzoo.cli.eval import eval_command
from lamzoo.cli.explain import explain
from lamzoo.cli.export import export
from lamzoo.cli.extract_features import extract_features
from lamzoo.cli.find import find
from lamzoo.cli.info import info
from lamzoo.cli.list import list_command
from lamzoo.cli.predict import predict_command
from lamzoo.cli.search import search
from lamzoo.cli.train import train
from lamzoo.cli.web_app import app_command
from lamzoo.errors import HubUnreachableError, LamzooError
from lamzoo.files import shortened
from lamzoo.version import __version__

# Limits that any code may meet, and a way out.
_SHORTAGES = {
    errno.EMFILE: "raise the limit of `ulimit -n`, or lower --workers",
    errno.ENFILE: "end other programs, or lower --workers",
    errno.ENOMEM: "use a smaller batch size or model, or end other programs",
    errno.ENOSPC: "free some space, or set TMPDIR, XDG_CACHE_HOME or HF_HOME to a folder on another disk",
    errno.EDQUOT: "free some space, or set TMPDIR, XDG_CACHE_HOME or HF_HOME to a folder on another disk",
    errno.ENAMETOOLONG: "use a shorter path",
    errno.EROFS: "choose another folder, or set XDG_CACHE_HOME and HF_HOME to one that can be written",
}

_LOST_WORKER = re.compile(r"DataLoader worker .*(exited unexpectedly|killed by signal)")
_OUT_OF_MEMORY = re.compile(
    "out of memory|(can't|cannot) allocate memory|not enough memory|storage size calculation|failed to map segment",
    re.I,
)

# The sections of --help, which imports all of these modules: they import torch and timm inside functions only.
_COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Models": {"list": list_command, "info": info, "download": download, "export": export},
    "Images": {"predict": predict_command, "explain": explain, "demo": demo, "app": app_command},
    "Videos": {"search": search, "find": find, "describe": describe, "extract-features": extract_features},
    "Training and evaluation": {"train": train, "eval": eval_command},
    "Benchmarks": {"bench": bench, "compare": compare},
}


class _Sections(TyperGroup):
    """Lists the commands in --help under the headings of :data:`_COMMANDS`."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        width = max(map(len, self.commands))
        for heading, commands in _COMMANDS.items():
            rows = [(name, self.commands[name].get_short_help_str(formatter.width - width - 6)) for name in commands]
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(width), text) for name, text in rows])


app = typer.Typer(
    cls=_Sections,
    help="Transformers with learnable attention masks.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _commands in _COMMANDS.values():
    for _name, _command in _commands.items():
        app.command(_name, cls=CheckedCommand)(_command)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line and exits.

    The exit code is 0 on success, 2 for errors that the user can fix (one line on stderr, three if the hub cannot be
    reached), 130 after Ctrl-C, 143 after SIGTERM, and 1 for unexpected errors (one line; ``--debug`` prints the
    traceback).

    Args:
        args: the arguments; ``sys.argv[1:]`` by default.
    """
    rest = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in rest[: rest.index("--") if "--" in rest else None]
    if debug:
        rest.remove("--debug")
    with out.safe_streams():
        try:
            code = _run(rest)
            sys.stdout.flush()
        except BaseException as error:  # noqa: BLE001 - the outermost handler: reports the error and exits
            if debug:
                out.print_traceback(error)
            code = _report(error)
        sys.stderr.flush()
    sys.exit(code)


def _run(args: list[str]) -> int:
    """Runs a command; unlike click's own ``main``, leaves every exception but a requested exit to the caller."""
    try:
        os.getcwd()
    except OSError as error:  # libraries of torch end the process without saying so
        raise LamzooError(f"the current folder can't be used ({error.strerror}); change to another one") from error
    _check_hub_address()
    command = typer.main.get_command(app)
    try:
        with command.make_context("lamzoo", args, obj=list(args)) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    return 0


def _check_hub_address() -> None:
    """Checks the address of the hub in the environment, which ends the import of huggingface_hub if it is malformed."""
    address = os.environ.get("HF_ENDPOINT")
    if address is None:
        return
    if not address.strip():  # which huggingface_hub would take for an address
        del os.environ["HF_ENDPOINT"]
        return
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and address.isprintable()
    except ValueError:
        usable = False
    if not usable:
        raise LamzooError(f"HF_ENDPOINT is {shortened(repr(address))}, which is no http address; correct or unset it")


def _report(error: BaseException) -> int:
    """Prints an error and returns the exit code."""
    if isinstance(error, KeyboardInterrupt):
        if isinstance(error, Stopped) and error.number != signal.SIGINT:
            out.print_error(f"stopped by {signal.Signals(error.number).name}")
        return exit_code(error)
    if isinstance(error, HubUnreachableError):
        out.print_error(error.missing, error.works, error.bring)
        return 2
    if isinstance(error, LamzooError):
        out.print_error(str(error))
        return 2
    if isinstance(error, typer.BadParameter.__bases__[0]):  # click's UsageError, which typer does not name
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "lamzoo"
        message = getattr(error, "format_message", error.__str__)()
        out.print_error(f"{message.rstrip('.')}; see {path} --help")
        return 2
    if (shortage := _shortage(error)) is not None:
        out.print_error(shortage)
        return 2
    if isinstance(error, SystemExit):
        out.print_error(f"a library ended the command with sys.exit({error.code!r}) (unexpected; --debug shows where)")
        return 1
    what = "".join(traceback.format_exception_only(error)).strip()  # unlike str(error), it never fails
    out.print_error(f"{what} (unexpected; --debug shows where)")
    return 1


def _shortage(error: BaseException) -> str | None:
    """Returns the sentence for a limit of the machine that any code may meet; None for other errors."""
    if isinstance(error, OSError):
        hint = _SHORTAGES.get(error.errno or 0)
        if hint is None:
            return None
        where = f" for {shortened(error.filename)}" if isinstance(error.filename, str) else ""
        return f"{error.strerror}{where}; {hint}"
    # torch raises a RuntimeError on the CPU, of which torch.OutOfMemoryError is a subclass, for accelerators; an
    # ImportError tells that a library did not fit.
    if not isinstance(error, (MemoryError, RuntimeError, ImportError)):
        return None
    text = str(error).strip()
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(text):
        detail = f" ({text})" if text else ""
        return f"memory ran out{detail}; use a smaller batch size or model, or end other programs"
    if _LOST_WORKER.search(text):
        return (
            "a process that reads the data was ended by the system, as when memory or /dev/shm runs out; lower "
            "--workers (data.workers in a recipe), and start again, a training with --resume"
        )
    if "can't start new thread" in text:
        return "no more threads or processes may be started; lower --workers, or raise the limit of `ulimit -u`"
    return None


@app.callback(invoke_without_command=True)
def _lamzoo(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the versions of lamzoo, torch and timm.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log progress, not only warnings.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")] = False,
) -> None:
    if version:
        hosts = ", ".join(f"{name} {installed(name)}" for name in ("torch", "timm"))
        out.print_line(f"lamzoo {__version__} ({hosts})")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit
    out.log_to_stderr(verbose)
