"""The command ``lamzoo eval``: a model and a data set in, its accuracy out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lamzoo import cli_output as out
from lamzoo.cli_options import BatchSize, Checkpoint, Device, Json, Name, load_model
from lamzoo.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from lamzoo.data import LabelledImages


def eval_command(
    name: Name,
    data: Annotated[str, typer.Option(metavar="SPEC", help=(
        "imagefolder:DIR, imagelist:DIR:FILE, npz:DIR, torchvision:NAME:ROOT, hfds:NAME, wds:SHARDS, or a folder."))],
    split: Annotated[str, typer.Option(help="Which part of the data, where it has parts.")] = "test",
    class_map: Annotated[str | None, typer.Option(metavar="FILE", help=(
        "Which class is which output, for data with a part of the classes: a file, imagenet-1k, or model."))] = None,
    real_labels: Annotated[str | None, typer.Option(metavar="FILE", help=(
        "Score by ImageNet's ReaL labels too: real.json, or timm for timm's copy."))] = None,
    on_bad_input: Annotated[Literal["stop", "skip"], typer.Option(help=(
        "At an image that cannot be read, or leave it out and say so."))] = "stop",
    batch_size: BatchSize = 64,
    device: Device = "auto",
    precision: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the autocast.")] = "float32",
    workers: Annotated[int, typer.Option(help="Processes that read images.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Score this many images, spread over the data.")] = None,
    state: Annotated[Path | None, typer.Option(metavar="FILE", help="Where partial results are kept.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a killed run stopped.")] = False,
    checkpoint: Checkpoint = None,
    json: Json = False,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the JSON here.")] = None,
) -> None:  # fmt: skip
    """Scores a model on a data set: top-1 and top-5 accuracy."""
    from lamzoo.data import create_dataset
    from lamzoo.evaluation import EvalProgress, check_batches, default_state_path, evaluate, resolve_device

    target = resolve_device(device)
    check_batches(batch_size, workers, precision)
    if output is not None and not output.absolute().parent.is_dir():
        raise ConfigError(f"the folder of {output} does not exist; make it first")
    dataset = create_dataset(data, split)
    model = load_model(name, checkpoint)
    if class_map is not None:
        dataset = _relabelled(dataset, class_map, model)
    choices = (str(checkpoint), str(limit), str(class_map), str(real_labels), on_bad_input)
    with out.progress_bar(f"{name} on {data}", hidden=json) as advance:

        def moved(progress: EvalProgress) -> None:
            advance(progress.seen, progress.total, f"top-1 {progress.top1:.2f} %")

        result = evaluate(
            model,
            dataset,
            batch_size=batch_size,
            device=target,
            precision=precision,
            workers=workers,
            limit=limit,
            on_bad_input=on_bad_input,
            real_labels=real_labels,
            state=state or default_state_path(name, data, split, *choices),
            resume=resume,
            progress=moved,
        )
    record = {"model": name, "data": data, "split": dataset.split, "device": str(target), "precision": precision,
              "batch_size": batch_size, **dataclasses.asdict(result)}  # fmt: skip
    if output is not None:
        out.write_json(output, record)
    if json:
        out.print_json(record)
    else:
        _print(record)


def _relabelled(dataset: LabelledImages, class_map: str, model: nn.Module) -> LabelledImages:
    from lamzoo.data import read_class_map, relabel
    from lamzoo.evaluation import label_names

    if class_map == "model":
        return relabel(dataset, label_names(model), "the model's classes")
    return relabel(dataset, read_class_map(class_map), class_map)


def _print(record: dict[str, Any]) -> None:
    """Prints the score as a table of one row; what was not asked for has no column."""
    cells = {
        "model": record["model"],
        "data": record["data"],
        "split": record["split"] or "all",
        "images": record["samples"],
        "top-1 (%)": record["top1"],
        "top-5 (%)": record["top5"],
    }
    if record["real_samples"] is not None:
        cells |= {"ReaL images": record["real_samples"], "ReaL top-1 (%)": record["real_top1"]}
        cells |= {"ReaL top-5 (%)": record["real_top5"]}
    if record["skipped"]:
        cells["skipped"] = record["skipped"]
    cells |= {"images/s": record["images_per_s"], "device": record["device"]}
    out.print_table(tuple(cells), [tuple(cells.values())])
