"""The command ``lamzoo explain``: a picture or an interactive page of a model's masks on an image or a video."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lamzoo.cli import _output as out
from lamzoo.cli._options import Checkpoint, Device, Merge, Name, check_masked, load_model
from lamzoo.errors import ConfigError, DataError, UnsupportedHostError
from lamzoo.files import check_target

if TYPE_CHECKING:
    from lamzoo.tasks import Task


def explain(
    name: Name,
    image: Annotated[Path | None, typer.Argument(metavar="INPUT", help=(
        "An image file, or a video with --text, or --data instead."))] = None,
    output: Annotated[Path | None, typer.Option("--out", metavar="FILE.png", help="Picture to write.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE.html", help=(
        "Interactive page to write, in one file: masks and attention of every token, layer and head."))] = None,
    figure: Annotated[Path | None, typer.Option(metavar="FILE.pdf|svg|png", help=(
        "Compact figure for a paper to write, one column wide."))] = None,
    data: Annotated[str | None, typer.Option(metavar="SPEC", help=(
        "Data set of the model's task, such as qvhighlights:DIR, msrvtt:DIR, videos:DIR or grid:DIR."))] = None,
    split: Annotated[str | None, typer.Option(help="Split of the data [test].")] = None,
    query: Annotated[str | None, typer.Option(metavar="ID", help=(
        "Query, video or clip to draw [the first of the split]."))] = None,
    text: Annotated[list[str] | None, typer.Option(metavar="TEXT", help=(
        "Text to compare a video with; several times for texts to choose among."))] = None,
    videos: Annotated[Path | None, typer.Option(metavar="DIR", help=(
        "Folder of the videos of --data that has only features, for thumbnails on the page."))] = None,
    checkpoint: Checkpoint = None,
    merge: Merge = None,
    device: Device = "auto",
) -> None:  # fmt: skip
    """Draws a model's masks for an image, a video or a query of a data set: a picture, a page, a figure, or several."""
    if image is None and data is None:
        raise ConfigError(
            "there is nothing to explain; give INPUT, an image or a video with --text, or a data set with --data"
        )
    if image is not None and data is not None:
        raise ConfigError(f"the file {image} and --data {data} exclude each other; leave one out")
    if image is not None:
        options = (("--split", split), ("--query", query), ("--videos", videos))
        given = next((option for option, value in options if value is not None), None)
        if given is not None:
            raise ConfigError(f"{given} does not apply to a file; leave it out, or use --data instead of the file")
    elif text:
        raise ConfigError("--text applies to a video file, not to --data; leave it out")
    targets = {"explain": output, "figure": figure, "explore": html}
    if not any(targets.values()):
        raise ConfigError(
            "there is nothing to write; give --out FILE.png for a picture, --html FILE.html for a page, or --figure "
            "FILE.pdf for a figure"
        )
    for path, what, suffix in ((output, "picture", ".png"), (html, "page", ".html"), (figure, "figure", "")):
        if path is not None:
            check_target(path, what, suffix=suffix)
    if figure is not None and figure.suffix.lower() not in (".pdf", ".svg", ".png"):
        raise ConfigError(f"--figure is {figure}; its name must end in .pdf, .svg or .png")
    if videos is not None:
        from lamzoo.data.paths import check_folder

        check_folder(videos)
        if html is None:
            raise ConfigError("--videos is for the thumbnails of a page; add --html FILE.html, or leave it out")
    from lamzoo.evaluation import resolve_device
    from lamzoo.registry.catalog import task_of

    target = resolve_device(device)
    task = task_of(name)
    of_video = image is not None and task.explore_video is not None
    functions = [("explore_video" if of_video and function == "explore" else function) for function in targets]
    for function, path in zip(functions, targets.values(), strict=True):
        if path is not None and getattr(task, function) is None:
            hint = task.explain_hint or ("give --out FILE.png" if task.explain else "")
            says = f"{name} is {task.model_kind}, which `lamzoo explain` can't draw as {path}"
            raise UnsupportedHostError(f"{says}; {hint}" if hint else says)
    _check(name, task, image is not None, bool(text))
    if videos is not None and not task.takes_videos:
        raise ConfigError(f"--videos does not apply to {name}, {task.model_kind}, whose data have the videos; omit it")
    inputs: tuple[Any, ...]
    if image is not None and of_video:
        from lamzoo.data.paths import file_exists

        if not file_exists(image):
            raise DataError(f"no such video: {image}")
        inputs = (image, text)
    elif image is not None:
        from lamzoo.data import open_image

        open_image(image)
        inputs = (image,)
    else:
        inputs = (task.open_split(str(data), split or "test"), query)
    model = load_model(name, checkpoint, merge=merge).to(target)
    check_masked(model, name)
    for function, path in zip(functions, targets.values(), strict=True):
        if path is not None:
            folder = {"videos": videos} if function == "explore" and videos is not None else {}
            task.load(function)(model, *inputs, path, **folder)
            out.print_line(out.path_text(path))


def _check(name: str, task: Task, of_file: bool, with_text: bool) -> None:
    """Raises an error if the model can't be drawn on such an input."""
    if of_file and task.explore_video is not None:
        if not with_text:
            raise ConfigError(f"{name} compares videos with texts; give one with --text")
        return
    if with_text:
        raise ConfigError(f"--text does not apply to {name}, {task.model_kind}; leave it out")
    if of_file and task.explains != "image":
        raise UnsupportedHostError(f"{name} is {task.model_kind}, which takes no images; use --data instead")
    if not of_file and task.explains == "image":
        raise UnsupportedHostError(f"{name} is {task.model_kind}, which is drawn over an image; give INPUT instead")
