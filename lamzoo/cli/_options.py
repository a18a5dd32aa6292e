"""Arguments that several commands share, and the model that they name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lamzoo.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

Name = Annotated[str, typer.Argument(metavar="NAME", help="arch, arch.tag, timm/NAME, local-dir:DIR or hf-hub:REPO.")]
Checkpoint = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Safetensors to load in place of the pretrained weights.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to stdout.")]
BatchSize = Annotated[int, typer.Option(help="Images at a time.")]


def load_model(name: str, checkpoint: Path | None) -> nn.Module:
    """Creates a model with its published weights, or with those of a checkpoint; reads one that was exported."""
    from lamzoo.registry.factory import create_model

    if name.endswith((".onnx", ".pt2")):
        from lamzoo.export import load_exported

        if checkpoint is not None:
            raise ConfigError(f"{name} is an exported program and has its weights; leave --checkpoint out")
        return load_exported(name)
    if checkpoint is not None:
        return create_model(name, checkpoint_path=checkpoint)
    return create_model(name, pretrained=True)


def saved_source(name: str) -> Literal["local-dir", "hf-hub"] | None:
    """Returns where a saved model named with a prefix lies; None for a registered name."""
    if name.startswith("local-dir:"):
        return "local-dir"
    return "hf-hub" if name.startswith("hf-hub:") else None
