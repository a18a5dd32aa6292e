"""The command ``lamzoo``: subcommands, exit codes and error messages."""

from __future__ import annotations

import io
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version as installed
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lamzoo.cli import _output as out
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
from lamzoo.errors import HubUnreachableError, LamzooError
from lamzoo.version import __version__

# The sections of --help, which imports all of these modules: they import torch and timm inside functions only.
_COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Models": {"list": list_command, "info": info, "download": download, "export": export},
    "Images": {"predict": predict_command, "explain": explain, "demo": demo},
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
        app.command(_name)(_command)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line and exits.

    The exit code is 0 on success, 2 for errors that the user can fix (one line on stderr, three if the hub cannot be
    reached), 130 after Ctrl-C and 1 for unexpected errors (one line; ``--debug`` prints the traceback).

    Args:
        args: the arguments; ``sys.argv[1:]`` by default.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for file names outside the terminal's encoding
    rest = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in rest[: rest.index("--") if "--" in rest else None]
    if debug:
        rest.remove("--debug")
    try:
        code = typer.main.get_command(app).main(rest, prog_name="lamzoo", standalone_mode=False, obj=rest)
    except Exception as error:  # noqa: BLE001 - the outermost handler: reports the error and exits
        if debug:
            traceback.print_exc()
        code = _report(error)
    except KeyboardInterrupt:
        code = 130
    out.flush()
    sys.exit(code if isinstance(code, int) else 0)


def _report(error: Exception) -> int:
    """Prints an error and returns the exit code."""
    if isinstance(error, HubUnreachableError):
        out.print_error(error.missing, error.works, error.bring)
        return 2
    if isinstance(error, LamzooError):
        out.print_error(str(error))
        return 2
    if isinstance(error, typer.Abort):
        return 130
    if isinstance(error, typer.BadParameter.__bases__[0]):  # click's UsageError, which typer does not name
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "lamzoo"
        message = getattr(error, "format_message", error.__str__)()
        out.print_error(f"{message.rstrip('.')}; see {path} --help")
        return 2
    out.print_error(f"{type(error).__name__}: {error} (unexpected; --debug shows where)")
    return 1


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
