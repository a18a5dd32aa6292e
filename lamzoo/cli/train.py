"""The command ``lamzoo train``: trains from a recipe, or from a model and a data set with default settings."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lamzoo.cli import _output as out
from lamzoo.cli._options import FORMS, MOST_PIXELS
from lamzoo.errors import RecipeError

if TYPE_CHECKING:
    from lamzoo.training import AnyRecipe, TrainResult

_SPEC = "A folder of images, videos:DIR, or another data set, as for eval."


def train(
    context: typer.Context,
    arguments: Annotated[list[str] | None, typer.Argument(
        metavar="[RECIPE] [KEY=VALUE]...", help=(
            "A TOML file, or lamzoo:NAME for a bundled recipe; overrides, such as run.seed=1."),
    )] = None,
    model: Annotated[str | None, typer.Option(
        metavar="NAME", help=f"{FORMS}.")] = None,
    data: Annotated[str | None, typer.Option(metavar="SPEC", help=_SPEC)] = None,
    pretrained: Annotated[bool | None, typer.Option(
        "--pretrained/--no-pretrained", help="Start from the published weights.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(metavar="FILE", help="Safetensors to start from.")] = None,
    tune: Annotated[Literal["all", "lam", "head"] | None, typer.Option(
        help="Trained part: all [default], masks and classifier, or only the classifier.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Number of epochs.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Inputs per update, over all processes.")] = None,
    img_size: Annotated[int | None, typer.Option(
        min=1, max=MOST_PIXELS, help="Height and width of the images.")] = None,
    train_split: Annotated[str | None, typer.Option(metavar="NAME", help="Training split [train].")] = None,
    val_split: Annotated[str | None, typer.Option(metavar="NAME", help="Validation split [validation].")] = None,
    test_split: Annotated[str | None, typer.Option(metavar="NAME", help="Split to score once at the end.")] = None,
    val_fraction: Annotated[float | None, typer.Option(
        help="Share of the training images or videos to hold out without a validation split [0.1].")] = None,
    on_bad_input: Annotated[Literal["stop", "skip"] | None, typer.Option(
        help="Stop at unreadable inputs, or leave them out [stop].")] = None,
    scan: Annotated[bool | None, typer.Option(
        "--scan/--no-scan", help="Read all inputs once before the first epoch.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Random seed [0].")] = None,
    output: Annotated[Path | None, typer.Option(
        "--output", "--out", metavar="DIR", help="Output folder [runs/MODEL-DATA].")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"] | None, typer.Option(help="Training device.")] = None,
    precision: Annotated[Literal["no", "bf16", "fp16"] | None, typer.Option(help="Autocast precision.")] = None,
    fsdp: Annotated[bool | None, typer.Option(
        "--fsdp/--no-fsdp", help="Shard the model over the processes, to save memory.")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes that read inputs.")] = None,
    report: Annotated[bool | None, typer.Option("--report/--no-report", help="Write OUTPUT/report/.")] = None,
    resume: Annotated[bool, typer.Option(
        "--resume", help="Continue from the latest checkpoint, if any.")] = False,
    print_recipe: Annotated[bool, typer.Option(
        "--print-recipe", help="Print the complete recipe as TOML without training.")] = False,
) -> None:  # fmt: skip
    """Trains or fine-tunes a model; also runs under torchrun and accelerate launch.

    Takes a recipe, or --model and --data, in which case all other settings default to values suited to data and
    weights. Writes a report to OUTPUT/report/ and the model to OUTPUT/model/; with --tune lam also the masks and the
    classifier alone, to OUTPUT/lam/.
    """
    options = {
        "model.name": model, "model.pretrained": pretrained, "model.tune": tune,
        "model.kwargs.checkpoint_path": None if checkpoint is None else str(checkpoint),
        "model.kwargs.img_size": img_size, "data.source": data, "data.train_split": train_split,
        "data.eval_split": val_split, "data.test_split": test_split, "data.val_fraction": val_fraction,
        "data.on_bad_input": on_bad_input, "data.scan": scan, "data.workers": workers, "schedule.epochs": epochs,
        "optimizer.lr": lr, "run.batch_size": batch_size, "run.seed": seed,
        "run.output": None if output is None else str(output), "run.device": device, "run.precision": precision,
        "run.report": report, "run.fsdp": fsdp,
    }  # fmt: skip
    given = {key: value for key, value in options.items() if value is not None}
    recipe = _recipe(list(arguments or ()), given, resume)
    if print_recipe:
        from lamzoo.records import to_toml

        out.print_text(to_toml(recipe.to_dict()))
        return
    result = _run(recipe, resume, _command(context))
    if out.is_main_process():
        _print_result(recipe, result)


def _recipe(arguments: list[str], options: dict[str, Any], resume: bool) -> AnyRecipe:
    """Builds the recipe from the file, the options, or the run to continue; options override the file."""
    from lamzoo.training.config_reader import override, put, read_recipe
    from lamzoo.training.defaults import complete_recipe
    from lamzoo.training.recipe import parse_recipe

    file = Path(arguments.pop(0)) if arguments and not _is_override(arguments[0]) else None
    if file is None and resume and "model.name" not in options and "run.output" in options:
        file = Path(options["run.output"], "recipe.json")
    if file is not None:
        return parse_recipe(put(override(read_recipe(file), arguments), options))
    table = put(override({}, arguments), options)
    missing = [
        option
        for option, section, key in (("--model", "model", "name"), ("--data", "data", "source"))
        if key not in table.get(section, {})
    ]
    if missing:
        raise RecipeError(
            f"There is no recipe, and no {' and no '.join(missing)}; give a RECIPE.toml, or --model NAME --data SPEC."
        )
    recipe = complete_recipe(table)
    stored = Path(recipe.run.output, "recipe.json")
    if resume and stored.is_file():  # keeps the settings that were derived from the data
        return parse_recipe(put(override(read_recipe(stored), arguments), options))
    return recipe


def _is_override(argument: str) -> bool:
    return "=" in argument and not Path(argument).is_file()


def _run(recipe: AnyRecipe, resume: bool, command: str) -> TrainResult:
    from lamzoo.training import Progress, train

    out.show_log("lamzoo.training.trainer")  # the settings, and a line per epoch
    with out.progress_bar(recipe.model.name, hidden=not out.is_main_process()) as advance:

        def scanning(split: str, done: int, total: int) -> None:
            advance(done, total, f"scanning {split}")

        def moved(progress: Progress) -> None:
            note = f"epoch {progress.epoch + 1} of {progress.epochs}, loss {progress.loss:.4g}"  # scores are logged
            advance(progress.update, progress.updates, note)

        return train(recipe, resume=resume, progress=moved, scanning=scanning, command=command)


def _print_result(recipe: AnyRecipe, result: TrainResult) -> None:
    from lamzoo.tasks import find_task

    out.print_scores(find_task(recipe.task).score_table(result.scores), recipe.model.name)
    if result.report is not None:
        out.print_line(f"the report is {out.path_text(result.report)}")
    out.print_line(f"the model is {out.path_text(result.model)}")
    if result.masks is not None:
        out.print_line(f"its masks and its classifier alone are {out.path_text(result.masks)}")
    out.print_line(result.about)


def _command(context: typer.Context) -> str:
    """Returns the command line as typed."""
    typed = context.obj if isinstance(context.obj, list) else sys.argv[1:]
    return shlex.join(["lamzoo", *typed])
