"""The command ``lamzoo eval``: scores a model on a data set."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lamzoo.cli import _output as out
from lamzoo.cli._options import (
    BatchSize,
    Checkpoint,
    Device,
    Json,
    Merge,
    Name,
    Precision,
    Trust,
    check_share,
    load_model,
)
from lamzoo.errors import ConfigError, LamzooError

if TYPE_CHECKING:
    from lamzoo.data.trained import TrainedData
    from lamzoo.tasks import Evaluation, Task

_logger = logging.getLogger(__name__)


def eval_command(
    name: Name,
    data: Annotated[str | None, typer.Option(metavar="SPEC", help=(
        "imagefolder:DIR, imagelist:DIR:FILE, npz:DIR, torchvision:NAME:ROOT, hfds:NAME, wds:SHARDS, or a folder; for "
        "retrieval msrvtt:DIR, msvd:DIR, videos:DIR, wds:SHARDS, grid:DIR or flickr8k:DIR; for moments "
        "qvhighlights:DIR, charades:DIR, tvsum:DIR or grid:DIR; for captions mad:DIR, lsmdc:DIR, videos:DIR, "
        "grid:DIR or flickr8k:DIR; optional for the folder of a training run."))] = None,
    task: Annotated[str | None, typer.Option(metavar="TASK", help=(
        "classification, retrieval, moments or captions [the model's]."))] = None,
    split: Annotated[str | None, typer.Option(help=(
        "Split of the data [test; everything without splits; for a run, the images it held out]."))] = None,
    class_map: Annotated[str | None, typer.Option(metavar="FILE", help=(
        "Mapping of classes to outputs, for data with some of the classes: a file, imagenet-1k, or model."))] = None,
    real_labels: Annotated[str | None, typer.Option(metavar="FILE", help=(
        "Also score against ImageNet's ReaL labels: real.json, or timm for timm's copy."))] = None,
    on_bad_input: Annotated[Literal["stop", "skip"] | None, typer.Option(help=(
        "Stop at unreadable images or videos, or leave them out with a warning [stop]."))] = None,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    precision: Precision = "float32",
    workers: Annotated[int, typer.Option(help="Worker processes that read inputs.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Score only this many images, spread over the data.")] = None,
    state: Annotated[Path | None, typer.Option(metavar="FILE", help="File for partial results.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted evaluation.")] = False,
    fps: Annotated[float | None, typer.Option(
        help="Retrieval: candidate frames per second [the model's]; 0 for all.")] = None,
    slicing: Annotated[Literal["head", "middle", "tail", "uniform"] | None, typer.Option(
        help="Retrieval: selection of frames from longer videos [the model's].")] = None,
    dual_softmax: Annotated[bool, typer.Option(
        "--dual-softmax", help="Retrieval: also score with dual softmax, which uses all queries.")] = False,
    rerank: Annotated[int | None, typer.Option(min=1, metavar="K", help=(
        "Retrieval with a tight head: embeddings select K candidates per query, and the head orders them [the head "
        "compares all pairs]."))] = None,
    submission: Annotated[Path | None, typer.Option(metavar="FILE", help=(
        "Also write the predictions: moments in QVHighlights' format (.jsonl), captions as COCO results "
        "(.json)."))] = None,
    beams: Annotated[int | None, typer.Option(min=1, help="Captions: beams of the beam search [1, greedy].")] = None,
    context: Annotated[int | None, typer.Option(
        min=0, help="Captions: number of earlier captions of the same video to condition on [0].")] = None,
    checkpoint: Checkpoint = None,
    merge: Merge = None,
    trust: Trust = False,
    json: Json = False,
    output: Annotated[Path | None, typer.Option(
        "--output", "--out", metavar="FILE", help="Also write the JSON to a file.")] = None,
) -> None:  # fmt: skip
    """Scores a model: accuracy; recall and rank for retrieval; QVHighlights' scores for moments; COCO's for captions.

    NAME may also be a file of predictions: a submission, FILE.jsonl, for moments; COCO results, FILE.json, for
    captions.
    """
    from lamzoo.files import check_target
    from lamzoo.registry.catalog import model_ref, trained_data_of
    from lamzoo.tasks import task_of_predictions

    check_share(merge)
    for path, what in ((output, "record"), (submission, "submission"), (state, "state")):
        if path is not None:
            check_target(path, what, makes_folder=path is state, failure=ConfigError)
    trained = trained_data_of(name)
    file = task_of_predictions(name) if model_ref(name).kind == "predictions" else None
    chosen = _task(name, task, trained, file)
    given: dict[str, Any] = {
        "class_map": class_map, "real_labels": real_labels, "on_bad_input": on_bad_input, "limit": limit,
        "state": state, "resume": resume or None, "fps": fps, "slicing": slicing, "dual_softmax": dual_softmax or None,
        "rerank": rerank, "beams": beams, "context": context, "submission": submission,
    }  # fmt: skip
    applicable = {*chosen.options, *(() if chosen.write_predictions is None else ("submission",))}
    _refuse({option: value for option, value in given.items() if option not in applicable}, f"the task {chosen.name}")
    options = {option: value for option, value in given.items() if value is not None and option != "submission"}
    data = data if data is not None else _trained_on(name, trained)
    if file is not None:
        of_models = {"checkpoint": checkpoint, "merge": merge, "submission": submission, "trust": trust or None}
        _refuse({**of_models, **options}, f"the predictions {name}")
        dataset = chosen.open_for_scoring(data, split)
        found: Evaluation = chosen.load("score_predictions")(name, dataset)
        facts: dict[str, Any] = {"task": chosen.name, "data": data, "split": dataset.split}
    else:
        found, facts = _score(
            name, chosen, data, split, trained, checkpoint, merge, trust, batch_size, device, precision, workers,
            options, hidden=json,
        )  # fmt: skip
        if submission is not None:
            chosen.load("write_predictions")(submission, found.predictions)
    record = {**facts, **found.record}
    if output is not None:
        out.write_json(output, record)
    if json:
        out.print_json(record)
    else:
        merged = "" if merge is None else f" merged to {100 * merge:g} % of its GMACs"
        _print(chosen, found, record["split"], f"{name}{merged} on {data}")


def _task(name: str, asked: str | None, trained: TrainedData | None, file: Task | None) -> Task:
    """Returns the requested task, or that of the run, the predictions, or the model.

    Raises:
        ConfigError: the predictions are of another task.
    """
    from lamzoo.registry.catalog import task_of
    from lamzoo.tasks import find_task

    if asked is not None:
        chosen = find_task(asked)
    elif trained is not None:
        chosen = find_task(trained.task)
    else:
        chosen = file if file is not None else task_of(name)
    if file is not None and file != chosen:
        raise ConfigError(
            f"{name} is a file of predictions of {file.about}; leave out --task, or say --task {file.name}"
        )
    return chosen


def _trained_on(name: str, trained: TrainedData | None) -> str:
    """Returns the data of a training run; raises a :class:`ConfigError` for any other model."""
    if trained is None:
        raise ConfigError(f"--data is missing, and {name} is not the folder of a training run; add --data SPEC")
    return trained.source


def _refuse(options: Mapping[str, Any], what: str) -> None:
    """Raises a :class:`ConfigError` that names the first option with a value."""
    given = next((option for option, value in options.items() if value is not None), None)
    if given is not None:
        raise ConfigError(f"--{given.replace('_', '-')} does not apply to {what}; leave it out")


def _print(task: Task, found: Evaluation, split: str | None, what: str) -> None:
    """Prints the table of scores, and the notes."""
    out.print_scores(task.score_table({split or "all": found.scores, **found.variants}), f"{what}: {found.samples}")
    for note in found.notes:
        out.print_line(note)


def _score(
    name: str,
    task: Task,
    data: str,
    split: str | None,
    trained: TrainedData | None,
    checkpoint: Path | None,
    merge: float | None,
    trust: bool,
    batch_size: int,
    device: str,
    precision: Any,
    workers: int,
    options: dict[str, Any],
    *,
    hidden: bool,
) -> tuple[Evaluation, dict[str, Any]]:
    """Scores a model; returns the scores, and facts about the measurement for ``--json``."""
    from lamzoo.evaluation import check_batches, default_state_path, resolve_device
    from lamzoo.files import check_target
    from lamzoo.tasks import EvalRequest

    target = resolve_device(device)
    check_batches(batch_size, workers, precision)
    dataset = task.open_for_scoring(data, split, trained)
    model = load_model(name, checkpoint, trust=trust, merge=merge)
    if "state" in task.options and "state" not in options:
        told = ("limit", "class_map", "real_labels")
        choices = (
            str(checkpoint),
            *([] if merge is None else [f"merge={merge}"]),
            *(str(options.get(key)) for key in told),
            options.get("on_bad_input", "stop"),
        )
        try:
            path = default_state_path(name, data, dataset.split or "all", *choices)
            check_target(path, "state", makes_folder=True)
            options = options | {"state": path}
        except LamzooError as error:
            if "resume" in options:
                raise
            _logger.warning("this evaluation can't be resumed if it is interrupted: %s", error)
    with out.progress_bar(f"{name} on {data}", hidden=hidden, ends=True) as advance:
        request = EvalRequest(batch_size, target, precision, workers, advance, options)
        found: Evaluation = task.load("evaluate")(model, dataset, request)
    facts = {"task": task.name, "model": name, "merge": merge, "data": data, "split": dataset.split,
             "device": str(target), "precision": precision, "batch_size": batch_size}  # fmt: skip
    return found, facts
