"""``lamzoo predict``: the most probable classes of images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from lamzoo.cli import _output as out
from lamzoo.cli._options import BatchSize, Checkpoint, Device, Json, Name, Trust, load_model


def predict_command(
    name: Name,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files and folders.")],
    topk: Annotated[int, typer.Option(help="Number of classes per image.")] = 5,
    checkpoint: Checkpoint = None,
    device: Device = "auto",
    batch_size: BatchSize = 64,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Classifies images."""
    from lamzoo.data import find_images

    paths = find_images(images)
    from lamzoo.evaluation import check_batches, predict, resolve_device

    resolve_device(device)
    check_batches(batch_size)
    model = load_model(name, checkpoint, trust=trust)
    results = predict(model, paths, topk=topk, batch_size=batch_size, device=device)
    pairs = [(out.path_text(path), guesses) for path, guesses in zip(paths, results, strict=True)]
    if json:
        out.print_json([{"image": path, "predictions": [dataclasses.asdict(g) for g in gs]} for path, gs in pairs])
        return
    rows = [
        (path if rank == 0 else "", guess.label, 100 * guess.probability)
        for path, guesses in pairs
        for rank, guess in enumerate(guesses)
    ]
    out.print_table(("image", "class", "%"), rows)
