"""``lamzoo export``: a model as a program for other runtimes, checked against the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lamzoo.cli import _output as out
from lamzoo.cli._options import Checkpoint, Json, Merge, Name, load_model
from lamzoo.errors import ConfigError, ExportError
from lamzoo.reduction.config import Rest, Score


def export(
    name: Name,
    output: Annotated[Path, typer.Option("--out", metavar="FILE", help="The program, *.onnx or *.pt2.")],
    format: Annotated[Literal["torch", "onnx"] | None, typer.Option(help="Format of the file [by suffix].")] = None,
    checkpoint: Checkpoint = None,
    images: Annotated[list[Path] | None, typer.Option(metavar="PATH", help=(
        "Image files or folders to check the program on, instead of random images; may be repeated."))] = None,
    merge: Merge = None,
    keep: Annotated[float | None, typer.Option(help="Prune tokens first, keeping this share.")] = None,
    at: Annotated[str | None, typer.Option(metavar="LAYERS", help=(
        "Layers that prune, such as 3,6,9 [at a quarter, half and three quarters of the depth]."))] = None,
    target_gmacs: Annotated[float | None, typer.Option(help="Prune tokens first, to this many GMACs.")] = None,
    score: Annotated[Score, typer.Option(help="Score that selects the tokens to keep.")] = "mask",
    rest: Annotated[Rest, typer.Option(help=(
        "Drop pruned tokens, merge them into one, or average each with the most similar kept token."))] = "drop",
    fused: Annotated[bool, typer.Option("--fuse", help="Export the fused form of additive masks.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Quantise the linear layers of an ONNX file.")] = False,
    repeats: Annotated[int, typer.Option(
        min=2, max=100_000, help="Timed passes of one image, alternating with the model.")] = 30,
    json: Json = False,
) -> None:  # fmt: skip
    """Exports a model to ONNX or a torch.export program.

    The program runs without lamzoo and accepts any batch size. It is discarded if its outputs differ from the model's
    by more than 1e-4.
    """
    from lamzoo.adapters import fuse
    from lamzoo.data import find_images
    from lamzoo.evaluation import preprocess
    from lamzoo.export import export_model, load_exported
    from lamzoo.files import check_target
    from lamzoo.profiling import profile
    from lamzoo.profiling.inputs import default_input
    from lamzoo.profiling.latency import compare_latency
    from lamzoo.reduction.budget import prune_tokens

    prunes = keep is not None or target_gmacs is not None
    how_many = {"--keep": keep is not None, "--target-gmacs": target_gmacs is not None}
    which = {"--at": at is not None, "--score": score != "mask", "--rest": rest != "drop"}
    of_pruning = [option for option, is_given in {**how_many, **which}.items() if is_given]
    if of_pruning and merge is not None:
        raise ConfigError(f"--merge and {of_pruning[0]}, a setting of pruning, exclude each other; leave one out")
    if of_pruning and not prunes:
        raise ConfigError(
            f"{of_pruning[0]} is a setting of pruning, which --keep or --target-gmacs enables; pass one of them"
        )
    if all(how_many.values()):
        raise ConfigError("--keep and --target-gmacs exclude each other; leave one out")
    layers = None if at is None else _layers(at)
    paths = find_images(images) if images else []
    check_target(output, "program", makes_folder=True, failure=ExportError)
    model = load_model(name, checkpoint, merge=merge)
    if prunes:
        prune_tokens(model, keep, layers, target_gmacs=target_gmacs, score=score, rest=rest)
    if fused:
        fuse(model)
    batch = preprocess(model, paths) if paths else None
    written = export_model(model, output, format=format, images=batch, int8=int8)
    one = default_input(model) if batch is None else batch[:1]
    times = compare_latency(load_exported(output), model, one, repeats=repeats)
    facts: dict[str, Any] = dataclasses.asdict(written) | {
        "path": out.path_text(output),
        "images": "given" if paths else "random",
        "gmacs": profile(model).gmacs,
        "latency_ms": times.model.median_ms,
        "model_latency_ms": times.baseline.median_ms,
        "ratio": times.ratio,
        "ratio_quartiles": times.ratio_quartiles,
        "device": times.device,
        "threads": times.threads,
    }
    if json:
        out.print_json(facts)
        return
    first, third = times.ratio_quartiles
    rows = [
        ("file", f"{facts['path']}, {written.mib:.1f} MiB"),
        ("format", f"onnx, opset {written.opset}" if written.opset else written.format),
        ("precision", written.precision),
        ("GMACs", f"{facts['gmacs']:.4f}"),
        ("checked on", f"{written.samples} {'images' if paths else 'random images'}"),
        ("largest difference of a logit", f"{written.max_difference:.2g}"),
        ("same likeliest class", f"{100 * written.same_top1:.1f} %"),
        ("one image", f"{times.model.median_ms:.2f} ms, the model {times.baseline.median_ms:.2f} ms"),
        ("ratio (quartiles)", f"{times.ratio:.2f} ({first:.2f}-{third:.2f})"),
        ("measured on", f"{times.device}, {times.threads} threads"),
    ]
    out.print_table(("", name), rows)


def _layers(at: str) -> tuple[int, ...]:
    try:
        return tuple(int(layer) for layer in at.split(","))
    except ValueError:
        raise ConfigError(f"--at is {at!r}; it must be a comma-separated list of layers, such as 3,6,9") from None
