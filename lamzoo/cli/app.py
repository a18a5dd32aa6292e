"""The command ``lamzoo``: parses, calls the library, prints; every command imports what it needs when it runs."""

from __future__ import annotations

import dataclasses
import io
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lamzoo.cli import _output as out
from lamzoo.cli._options import BatchSize, Checkpoint, Device, Json, Name, load_model
from lamzoo.cli.bench import bench
from lamzoo.cli.compare import compare
from lamzoo.cli.describe import describe
from lamzoo.cli.eval import eval_command
from lamzoo.cli.explain import explain
from lamzoo.cli.export import export
from lamzoo.cli.extract_features import extract_features
from lamzoo.cli.find import find
from lamzoo.cli.search import search
from lamzoo.cli.train import train
from lamzoo.errors import HubUnreachableError, LamzooError, UnknownModelError

app = typer.Typer(help="Transformers with learnable attention masks.", add_completion=False, rich_markup_mode=None)
app.command()(bench)
app.command()(compare)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line and exits.

    The exit code is 0, 2 for what the user can put right (one line on stderr, three where the hub is out of reach),
    130 after Ctrl-C, and 1 for what nobody expected (one line, and with ``--debug`` the traceback).

    Args:
        args: the arguments; those of the process by default.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for file names that the terminal's encoding has not
    rest = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in rest[: rest.index("--") if "--" in rest else None]
    if debug:
        rest.remove("--debug")
    try:
        code = typer.main.get_command(app).main(rest, prog_name="lamzoo", standalone_mode=False, obj=rest)
    except Exception as error:  # noqa: BLE001 - the last line of defence: says what it was and never hides it
        if debug:
            traceback.print_exc()
        code = _report(error)
    except KeyboardInterrupt:
        code = 130
    out.flush()
    sys.exit(code if isinstance(code, int) else 0)


def _report(error: Exception) -> int:
    """Prints an error, as one line but for that of a hub out of reach, and returns the exit code."""
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
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is done, not only warnings.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if version:
        from lamzoo import __version__

        out.print_line(f"lamzoo {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit
    out.log_to_stderr(verbose)


@app.command("list")
def list_command(
    pattern: Annotated[str, typer.Argument(metavar="[PATTERN]", help="Wildcard or part of a name; timm/... too.")] = "",
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Only names with weights, as arch.tag.")] = False,
    json: Json = False,
) -> None:
    """Lists the models that there are."""
    from lamzoo.registry.catalog import list_models, model_info

    wildcard = pattern
    if pattern and not set(pattern) & set("*?["):
        wildcard = f"{pattern}*" if pattern.startswith("timm/") else f"*{pattern}*"
    names = list_models(wildcard, pretrained=pretrained)
    if not names:
        weights = " with weights" if pretrained else ""
        raise UnknownModelError(
            f"no model{weights} matches {pattern!r}; `lamzoo list` shows all, `lamzoo list timm/` timm's"
        )
    infos = [(name, model_info(name)) for name in names]
    if json:
        keys = ("family", "description", "params", "gmacs")
        out.print_json([{"name": n, **{k: getattr(i, k) for k in keys}, "tags": list(i.tags)} for n, i in infos])
        return
    rows = [(n, _millions(i.params), i.gmacs, "yes" if i.lam else "no", ", ".join(i.tags)) for n, i in infos]
    out.print_table(("model", "params (M)", "GMACs", "masks", "weights"), rows)


@app.command()
def info(name: Name, json: Json = False) -> None:
    """Shows what is known of a model: its cost, masks, preprocessing and weights."""
    from lamzoo.cli.info import describe as facts_of

    facts, tags = facts_of(name)
    if json:
        out.print_json({**facts, "tags": tags})
        return
    out.print_table(("property", "value"), [(key, _brief(value)) for key, value in facts.items() if value is not None])
    if tags:
        columns = ("tag", "dataset", "licence", "source", "metrics")
        out.print_table(columns, [[_brief(tag[column]) for column in columns] for tag in tags], title="weights")


@app.command()
def predict(
    name: Name,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files and folders.")],
    topk: Annotated[int, typer.Option(help="Guesses per image.")] = 5,
    checkpoint: Checkpoint = None,
    device: Device = "auto",
    batch_size: BatchSize = 64,
    json: Json = False,
) -> None:
    """Classifies photographs."""
    from lamzoo.data import find_images

    paths = find_images(images)
    from lamzoo.evaluation import check_batches, predict, resolve_device

    resolve_device(device)
    check_batches(batch_size)
    model = load_model(name, checkpoint)
    results = predict(model, paths, topk=topk, batch_size=batch_size, device=device)
    pairs = [(out.printable(path), guesses) for path, guesses in zip(paths, results, strict=True)]
    if json:
        out.print_json([{"image": path, "predictions": [dataclasses.asdict(g) for g in gs]} for path, gs in pairs])
        return
    rows = [
        (path if rank == 0 else "", guess.label, 100 * guess.probability)
        for path, guesses in pairs
        for rank, guess in enumerate(guesses)
    ]
    out.print_table(("image", "class", "%"), rows)


app.command()(describe)
app.command("eval")(eval_command)
app.command()(explain)
app.command()(export)
app.command("extract-features")(extract_features)
app.command()(find)
app.command()(search)
app.command()(train)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the pictures.")] = Path(".demo"),
    cifar10: Annotated[Path | None, typer.Option(metavar="DIR", help="A CIFAR-10 copy to score on.")] = None,
) -> None:
    """Shows the zoo at work on real photographs: predictions, cost, masks and accuracy."""
    from lamzoo.report.demo import run

    run(output, cifar10=cifar10)


@app.command()
def download(name: Name) -> None:
    """Brings a model's weights into the local cache, and checks them."""
    from lamzoo.cli.info import fetch

    for path in fetch(name):
        out.print_line(out.printable(path))


def _millions(count: int | None) -> float | None:
    return None if count is None else count / 1e6


def _brief(value: Any) -> str:
    """Writes a value for a table cell: tables as ``key value`` pairs, long lists cut."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_brief(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        shown = ", ".join(map(_brief, value[:10]))
        return shown if len(value) <= 10 else f"{shown}, ... ({len(value)})"
    return "" if value is None else str(value)
