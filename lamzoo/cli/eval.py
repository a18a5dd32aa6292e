"""The command ``lamzoo eval``: a model and a data set in, its scores out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from lamzoo.cli import _output as out
from lamzoo.cli._options import BatchSize, Checkpoint, Device, Json, Name, load_model
from lamzoo.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from lamzoo.data import LabelledImages, OnBadInput
    from lamzoo.data.images.trained import TrainedData
    from lamzoo.data.video.sampling import Slicing
    from lamzoo.evaluation import Precision

Data = TypeVar("Data")


def eval_command(
    name: Name,
    data: Annotated[str | None, typer.Option(metavar="SPEC", help=(
        "imagefolder:DIR, imagelist:DIR:FILE, npz:DIR, torchvision:NAME:ROOT, hfds:NAME, wds:SHARDS, or a folder; for "
        "retrieval msrvtt:DIR, msvd:DIR, videos:DIR, wds:SHARDS, grid:DIR or flickr8k:DIR; for moments "
        "qvhighlights:DIR, charades:DIR or grid:DIR; for captions mad:DIR, lsmdc:DIR, videos:DIR, grid:DIR or "
        "flickr8k:DIR; may be left out for local-dir:RUN, the folder of a training run."))] = None,
    task: Annotated[Literal["classification", "retrieval", "moments", "captions"] | None, typer.Option(
        help="What the model does [classification, or the run's].")] = None,
    split: Annotated[str | None, typer.Option(help=(
        "Which part of the data [test; all of data without splits; where a run held images out for validation, "
        "those]."))] = None,
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
    fps: Annotated[float | None, typer.Option(
        help="Retrieval: frames a second that are looked at [the model's]; 0 for all.")] = None,
    slicing: Annotated[Literal["head", "middle", "tail", "uniform"] | None, typer.Option(
        help="Retrieval: which frames of a video that has too many [the model's].")] = None,
    dual_softmax: Annotated[bool, typer.Option(
        "--dual-softmax", help="Retrieval: also score with dual softmax, which knows all queries.")] = False,
    submission: Annotated[Path | None, typer.Option(metavar="FILE", help=(
        "Also write the predictions here: of moments in QVHighlights' form (.jsonl), of captions as COCO's results "
        "(.json)."))] = None,
    beams: Annotated[int | None, typer.Option(min=1, help="Captions: of the beam search [1, greedy].")] = None,
    context: Annotated[int | None, typer.Option(
        min=0, help="Captions: how many earlier captions of the same video are read [0].")] = None,
    checkpoint: Checkpoint = None,
    json: Json = False,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the JSON here.")] = None,
) -> None:  # fmt: skip
    """Scores a model: accuracy; recall and rank for retrieval; QVHighlights' scores for moments; COCO's for captions.

    For moments, NAME may also be a submission, FILE.jsonl; for captions COCO's results, FILE.json.
    """
    for path in (output, submission):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"the folder of {path} does not exist; make it first")
    trained = _trained(name)
    if data is None:
        if trained is None:
            raise ConfigError(f"--data is missing, and {name} is not the folder of a training run; add --data SPEC")
        data = trained.source
    task = task or _task(trained)
    of_retrieval = {"--fps": fps, "--slicing": slicing, "--dual-softmax": dual_softmax or None}
    of_images = {"--class-map": class_map, "--real-labels": real_labels, "--limit": limit, "--state": state,
                 "--resume": resume or None}  # fmt: skip
    of_captions = {"--beams": beams, "--context": context}
    if task == "captions":
        _refuse(of_images | of_retrieval, "captions")
        record = _eval_captions(
            name, data, split, beams, context, batch_size, device, precision, workers, checkpoint, submission,
            hidden=json,
        )  # fmt: skip
        _write(record, output, json, _print_captions)
        return
    _refuse(of_captions, task)
    if task == "moments":
        _refuse(of_images | of_retrieval, "moments")
        record = _eval_moments(
            name, data, split, batch_size, device, precision, workers, checkpoint, submission, hidden=json
        )
        _write(record, output, json, _print_moments)
        return
    _refuse({"--submission": submission}, task)
    if task == "retrieval":
        _refuse(of_images, "retrieval")
        record = _eval_retrieval(
            name, data, split, fps, slicing, dual_softmax, on_bad_input, batch_size, device, precision, workers,
            checkpoint, hidden=json,
        )  # fmt: skip
        _write(record, output, json, _print_retrieval)
        return
    _refuse(of_retrieval, "classification")
    from lamzoo.data.images.trained import open_scored
    from lamzoo.evaluation import EvalProgress, check_batches, default_state_path, evaluate, resolve_device

    target = resolve_device(device)
    check_batches(batch_size, workers, precision)
    dataset = open_scored(data, split, trained)
    model = load_model(name, checkpoint)
    if class_map is not None:
        dataset = _relabelled(dataset, class_map, model)
    choices = (str(checkpoint), str(limit), str(class_map), str(real_labels), on_bad_input)
    with out.progress_bar(f"{name} on {data}", hidden=json, ends=True) as advance:

        def moved(progress: EvalProgress) -> None:
            top5 = "" if progress.top5 is None else f", top-5 {progress.top5:.2f} %"
            advance(progress.seen, progress.total, f"top-1 {progress.top1:.2f} %{top5}")

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
            state=state or default_state_path(name, data, dataset.split or "all", *choices),
            resume=resume,
            progress=moved,
        )
    record = {"model": name, "data": data, "split": dataset.split, "device": str(target), "precision": precision,
              "batch_size": batch_size, **dataclasses.asdict(result)}  # fmt: skip
    _write(record, output, json, _print)


def _trained(name: str) -> TrainedData | None:
    """Returns what a model was trained on, if its name is the folder of a run."""
    from lamzoo.data.images.trained import TrainedData
    from lamzoo.registry.catalog import model_ref

    folder = model_ref(name).path
    return TrainedData.read(folder) if folder is not None else None


def _task(trained: TrainedData | None) -> Literal["classification", "retrieval", "moments", "captions"]:
    task: Any = "classification" if trained is None else trained.task
    return task


def _open(create: Callable[[str, str], Data], data: str, split: str | None) -> Data:
    from lamzoo.data.splits import open_default

    return open_default(partial(create, data), "test") if split is None else create(data, split)


def _eval_retrieval(
    name: str,
    data: str,
    split: str | None,
    fps: float | None,
    slicing: Slicing | None,
    dual: bool,
    on_bad_input: OnBadInput,
    batch_size: int,
    device: str,
    precision: Precision,
    workers: int,
    checkpoint: Path | None,
    *,
    hidden: bool,
) -> dict[str, Any]:
    from lamzoo.data.retrieval import create_retrieval_dataset
    from lamzoo.data.video.sampling import adjusted
    from lamzoo.evaluation import check_batches, resolve_device
    from lamzoo.evaluation.retrieval.evaluate import evaluate_retrieval, frames_config

    target = resolve_device(device)
    check_batches(batch_size, workers, precision)
    dataset = _open(create_retrieval_dataset, data, split)
    model: Any = load_model(name, checkpoint)
    frames_config(model)
    sampling = adjusted(model.sampling, fps=fps, slicing=slicing)
    with out.progress_bar(f"{name} on {data}", hidden=hidden, ends=True) as advance:
        result = evaluate_retrieval(
            model,
            dataset,
            sampling,
            batch_size=batch_size,
            device=target,
            precision=precision,
            workers=workers,
            dual=dual,
            on_bad_input=on_bad_input,
            progress=lambda what, done, total: advance(done, total, what),
        )
    return {"task": "retrieval", "model": name, "data": data, "split": dataset.split, "device": str(target),
            "precision": precision, "batch_size": batch_size, "sampling": dataclasses.asdict(sampling),
            **dataclasses.asdict(result)}  # fmt: skip


def _eval_moments(
    name: str,
    data: str,
    split: str | None,
    batch_size: int,
    device: str,
    precision: Precision,
    workers: int,
    checkpoint: Path | None,
    submission: Path | None,
    *,
    hidden: bool,
) -> dict[str, Any]:
    from lamzoo.data.moments import create_moment_dataset
    from lamzoo.evaluation import check_batches, moment_metrics, resolve_device
    from lamzoo.evaluation.moments.evaluate import evaluate_moments
    from lamzoo.evaluation.moments.submissions import read_submission, write_submission

    if name.endswith((".jsonl", ".jsonl.gz")):
        _refuse({"--checkpoint": checkpoint, "--submission": submission}, "moments with a submission")
        dataset = _open(create_moment_dataset, data, split)
        metrics = moment_metrics(read_submission(name), dataset.annotations())
        return {"task": "moments", "submission": name, "data": data, "split": dataset.split, "queries": len(dataset),
                "metrics": metrics}  # fmt: skip
    target = resolve_device(device)
    check_batches(batch_size, workers, precision)
    dataset = _open(create_moment_dataset, data, split)
    model = load_model(name, checkpoint)
    with out.progress_bar(f"{name} on {data}", hidden=hidden, ends=True) as advance:
        result = evaluate_moments(
            model, dataset, batch_size=batch_size, device=target, precision=precision, workers=workers,
            progress=advance,
        )  # fmt: skip
    if submission is not None:
        write_submission(submission, result.predictions)
    return {"task": "moments", "model": name, "data": data, "split": dataset.split, "device": str(target),
            "precision": precision, "batch_size": batch_size, "queries": result.queries, "seconds": result.seconds,
            "metrics": result.metrics}  # fmt: skip


def _eval_captions(
    name: str,
    data: str,
    split: str | None,
    beams: int | None,
    context: int | None,
    batch_size: int,
    device: str,
    precision: Precision,
    workers: int,
    checkpoint: Path | None,
    submission: Path | None,
    *,
    hidden: bool,
) -> dict[str, Any]:
    from lamzoo.data.captions import create_caption_dataset
    from lamzoo.evaluation import check_batches, resolve_device
    from lamzoo.evaluation.captions.coco_results import read_captions, write_captions
    from lamzoo.evaluation.captions.evaluate import caption_scores, evaluate_captions, java_scores

    if name.endswith((".json", ".json.gz")):
        given = {"--beams": beams, "--context": context, "--checkpoint": checkpoint, "--submission": submission}
        _refuse(given, "captions with a file of them")
        dataset = _open(create_caption_dataset, data, split)
        captions = {str(key): caption for key, caption in read_captions(name).items()}
        metrics = caption_scores(dataset, captions) | java_scores(dataset, captions)
        return {"task": "captions", "captions": name, "data": data, "split": dataset.split, "clips": len(dataset),
                "metrics": metrics}  # fmt: skip
    target = resolve_device(device)
    check_batches(batch_size, workers, precision)
    dataset = _open(create_caption_dataset, data, split)
    model = load_model(name, checkpoint)
    from lamzoo.models.describer.generation import GenerationConfig

    generation = GenerationConfig(beams=beams or 1)
    with out.progress_bar(f"{name} on {data}", hidden=hidden, ends=True) as advance:
        result = evaluate_captions(
            model, dataset, generation=generation, context=context or 0, batch_size=batch_size, device=target,
            precision=precision, workers=workers, progress=advance,
        )  # fmt: skip
    if submission is not None:
        write_captions(submission, result.captions)
    metrics = result.metrics | java_scores(dataset, result.captions)
    return {"task": "captions", "model": name, "data": data, "split": dataset.split, "device": str(target),
            "precision": precision, "batch_size": batch_size, "beams": generation.beams, "context": context or 0,
            "clips": len(dataset), "seconds": result.seconds, "metrics": metrics}  # fmt: skip


def _refuse(options: dict[str, Any], task: str) -> None:
    given = [option for option, value in options.items() if value is not None]
    if given:
        raise ConfigError(f"{given[0]} means nothing for --task {task}; leave it out")


def _write(record: dict[str, Any], output: Path | None, json: bool, show: Callable[[dict[str, Any]], None]) -> None:
    if output is not None:
        out.write_json(output, record)
    if json:
        out.print_json(record)
    else:
        show(record)


def _print_retrieval(record: dict[str, Any]) -> None:
    scores = {record["split"] or "all": record["metrics"]}
    if record["dual"] is not None:
        scores["with dual softmax"] = record["dual"]
    title = f"{record['model']} on {record['data']}: {record['texts']} texts, {record['videos']} videos"
    out.print_retrieval(scores, title)
    if record["skipped"]:
        out.print_line(f"{record['skipped']} videos could not be read and were left out")


def _print_moments(record: dict[str, Any]) -> None:
    title = f"{record.get('model') or record['submission']} on {record['data']}: {record['queries']} queries"
    out.print_moments({record["split"]: record["metrics"]}, title)


def _print_captions(record: dict[str, Any]) -> None:
    title = f"{record.get('model') or record['captions']} on {record['data']}: {record['clips']} clips"
    out.print_captions({record["split"] or "all": record["metrics"]}, title)


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
