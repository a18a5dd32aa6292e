"""Arguments that several commands share, checks of their values by type, and loading a model by its name."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from lamzoo.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

#: Forms of a model name, for the help of every command.
FORMS = (
    "arch, arch.tag, timm/NAME, open_clip/NAME:TAG, hf/OWNER/NAME, hf-hub:REPO, or the folder of a saved model or a run"
)
Name = Annotated[str, typer.Argument(metavar="NAME", help=f"{FORMS}.")]
Checkpoint = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Safetensors file that replaces the pretrained weights.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Precision = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Precision of the autocast.")]
Json = Annotated[bool, typer.Option("--json", help="Print only JSON to stdout.")]
Merge = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE", help="Merge tokens until the model needs only this share of its GMACs, such as 0.63."
    ),
]
BatchSize = Annotated[int, typer.Option(help="Images per batch.")]
Trust = Annotated[
    bool, typer.Option("--trust", help="Trust a .pt2 program from elsewhere, which can run any code; remembered.")
]


MOST_PIXELS = 2**14  # side of an image; larger ones need more memory than there is


class CheckedCommand(TyperCommand):
    """A command that refuses values which no option takes, whatever the option.

    These are numbers that are not finite or have more than 64 bits, text that cannot name a file, and empty text, as of
    a shell variable without a value: as a path, it would be the current folder.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for before, one in zip(["", *args], args, strict=False):
            if not one:
                where = f"the value after {before}" if before else "the first argument"
                raise ConfigError(f"{where} is empty; give one, or leave it out")
            if one.startswith("--") and one.endswith("=") and one.count("=") == 1:
                raise ConfigError(f"{one[:-1]} is empty; give it a value, or leave it out")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        for parameter in self.params:
            value = ctx.params.get(parameter.name or "")
            for one in value if isinstance(value, (list, tuple)) else [value]:
                problem = _problem(one)
                if problem:
                    option = parameter.param_type_name == "option"
                    name = parameter.opts[0] if option else (parameter.name or "").upper()
                    from lamzoo.files import shortened

                    raise ConfigError(f"{name} is {shortened(one)}; it {problem}")
        return super().invoke(ctx)


def _problem(value: object) -> str:
    """Returns the rule that a value breaks, by its type; empty if it breaks none."""
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if isinstance(value, int) and abs(value) >= 2**63:
        return "must be below 2**63"
    if isinstance(value, (str, Path)) and "\0" in str(value):
        return "must not contain a NUL character"
    if isinstance(value, Path):
        try:
            os.lstat(value)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return "is too long for a path"
    return ""


def check_share(merge: float | None) -> None:
    """Raises a :class:`ConfigError` for a value of ``--merge`` that is no share."""
    if merge is not None and not 0 < merge <= 1:
        raise ConfigError(f"--merge is {merge:g}; it must be above 0 and at most 1, a share of the model's GMACs")


def check_masked(model: nn.Module, name: str) -> None:
    """Raises a :class:`ConfigError` if a model has no masks that could be shown."""
    from lamzoo.adapters.state import has_masks

    if not has_masks(model):
        raise ConfigError(f"{name} has no learnable masks; choose a model with masks: `lamzoo list 'lam_*'` lists some")


def load_model(
    name: str, checkpoint: Path | None, *, trust: bool | None = None, merge: float | None = None
) -> nn.Module:
    """Creates a model with its published weights or those of a checkpoint, or opens an exported program.

    Args:
        name: the model's name, or the file of the program.
        checkpoint: weights that replace the published ones.
        trust: whether to trust a program that was exported elsewhere; None refuses all exported programs.
        merge: share of its GMACs to merge the model's tokens to, in place of its own token reduction.
    """
    from lamzoo.registry.catalog import model_ref

    check_share(merge)
    ref = model_ref(name)
    if trust is not None and ref.kind == "program" and ref.path is not None:
        from lamzoo.export import load_exported

        if merge is not None:
            raise ConfigError(f"{name} is an exported program, whose tokens can't be merged; export it with --merge")
        if checkpoint is not None:
            raise ConfigError(f"{name} is an exported program and includes its weights; omit --checkpoint")
        return load_exported(ref.path, trust=trust)
    if trust:
        raise ConfigError(f"--trust applies to exported programs, and {name} is not one; leave it out")
    from lamzoo.registry.factory import create_for_images

    given: dict[str, Any] = {"pretrained": True} if checkpoint is None else {"checkpoint_path": checkpoint}
    model = create_for_images(name, **given)
    if merge is not None:
        from lamzoo.reduction.budget import merge_to_share

        merge_to_share(model, merge)
    return model
