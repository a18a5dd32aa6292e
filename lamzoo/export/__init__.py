"""Export of models to torch.export programs and ONNX, verified against the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lamzoo.adapters.deploy import is_fused
from lamzoo.adapters.wrappers import is_sharded, unwrap
from lamzoo.data.images.decode import of_channels
from lamzoo.errors import ConfigError, ExportError
from lamzoo.evaluation.runtime import check_finite
from lamzoo.export.exported import FORMATS, ExportedModel, Format, first_line, load_exported, open_program
from lamzoo.export.program import trace, write_program
from lamzoo.export.trust import trust_program
from lamzoo.files import atomic_files
from lamzoo.lam.kernels import pinned
from lamzoo.lazy import submodules_of
from lamzoo.models.transformers_images import as_image_model
from lamzoo.profiling.inputs import default_input, evaluating
from lamzoo.reading import read_bytes, to_json
from lamzoo.reduction.stacks import reduction_of
from lamzoo.version import __version__

__all__ = ["ExportedFile", "ExportedModel", "Format", "export_model", "load_exported"]

if not TYPE_CHECKING:  # hidden from type checkers, which would accept any name
    __getattr__ = submodules_of(__name__)

TOLERANCE = 1e-4


@dataclass(frozen=True)
class ExportedFile:
    """An exported program and its deviation from the model.

    Attributes:
        path: the file.
        format: ``"torch"`` or ``"onnx"``.
        opset: ONNX opset; None for torch.
        precision: ``"float32"``, or ``"int8"`` if the weights of the linear layers are quantised.
        mib: size of the file in MiB.
        samples: number of images in the check.
        max_difference: largest absolute difference of a logit, over the batch and the first image alone.
        same_top1: share of the images with the same top-1 class as the model's.
    """

    path: Path
    format: Format
    opset: int | None
    precision: Literal["float32", "int8"]
    mib: float
    samples: int
    max_difference: float
    same_top1: float


def export_model(
    model: nn.Module,
    path: str | Path,
    *,
    format: Format | None = None,
    images: Tensor | None = None,
    int8: bool = False,
    tolerance: float = TOLERANCE,
) -> ExportedFile:
    """Exports a model, with or without masks and token reduction, as a program for any batch size.

    The program runs without lamzoo. It is verified before the file is created: a program that differs from the model
    leaves no file. The file contains the model's preprocessing, class names, masks, token reduction and whether it is
    fused as JSON under ``lamzoo``.

    Args:
        model: an image model with float32 weights on the CPU, optionally wrapped by ``torch.compile`` or data
            parallelism; exported in evaluation mode. Of an image model of Hugging Face transformers, the program
            returns the logits or, without a classifier, the pooled embedding.
        path: ``*.onnx``, or ``*.pt2`` for torch.
        format: derived from the suffix by default.
        images: ``(B, C, H, W)``, float32, preprocessed, for the check; random by default.
        int8: quantise the weights of the linear layers of an ONNX file, and their inputs at run time (onnxruntime's
            dynamic quantisation). The difference is reported but not limited.
        tolerance: largest allowed absolute difference of a logit.

    Returns:
        The exported file.

    Raises:
        ConfigError: the suffix does not match the format, a model of transformers takes more than images, int8 is
            requested for torch, the images have another shape, the model is sharded, or not in float32 on the CPU, or
            its outputs are not finite.
        UnsupportedHostError: the model is an exported program.
        ExportError: the model can't be exported, its program differs, or the file can't be written.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
    """
    path = Path(path)
    format = _format(path, format, int8)
    model = as_image_model(unwrap(model))
    images = _images(model, images)
    with evaluating(model), torch.no_grad():
        expected = model(images)
        if not isinstance(expected, Tensor):
            raise ExportError(
                f"{type(model).__name__} returns a {type(expected).__name__}; only models that return one tensor "
                "can be exported."
            )
        check_finite(expected)
        program = trace(model, images)
        with atomic_files(ExportError) as stage:
            staged = stage(path)
            opset = write_program(program, staged, format, _facts(model), int8)
            content = read_bytes(staged)
            got = _run(open_program(content, format, path), images)
            difference = float((got - torch.cat([expected, expected[:1]])).abs().max())
            if not (difference <= tolerance or (int8 and math.isfinite(difference))):
                raise ExportError(
                    f"The {format} program of {type(model).__name__} differs from the model by {difference:.2g} "
                    f"(tolerance {tolerance:g}); nothing was written to {path}."
                )
    if format == "torch":
        trust_program(content, path)
    same = got[:-1].argmax(dim=-1) == expected.argmax(dim=-1)
    return ExportedFile(
        path=path,
        format=format,
        opset=opset,
        precision="int8" if int8 else "float32",
        mib=len(content) / 2**20,
        samples=len(images),
        max_difference=difference,
        same_top1=float(same.float().mean()),
    )


def _format(path: Path, format: Format | None, int8: bool) -> Format:
    of_suffix = {suffix: name for name, suffix in FORMATS.items()}
    found = format or of_suffix.get(path.suffix)
    if found not in FORMATS:
        names = ", ".join(f"{name} (*{suffix})" for name, suffix in FORMATS.items())
        what = f"The format {format!r}" if format else f"The suffix of {path}"
        raise ConfigError(f"{what} is unknown; use one of {names}.")
    if path.suffix != FORMATS[found]:
        raise ConfigError(f"{path} must end in {FORMATS[found]}, as {found} programs do.")
    if int8 and found != "onnx":
        raise ConfigError("int8 is only available for ONNX; export to *.onnx, or leave it out.")
    return found


def _images(model: nn.Module, images: Tensor | None) -> Tensor:
    if is_sharded(model):
        raise ConfigError(
            f"This {type(model).__name__} is sharded by FSDP; save it with save_pretrained on every process and export "
            "the model that create_model loads from there."
        )
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise ConfigError(
                f"{name} is {parameter.dtype} on {parameter.device}; models are exported in float32 from the CPU: "
                "model.float().cpu()."
            )
        if parameter.is_inference():
            raise ConfigError(
                f"{name} was created under torch.inference_mode(), which torch.export doesn't take; create the model, "
                "or a copy.deepcopy of it, outside."
            )
    example = default_input(model, 2)
    if not isinstance(example, Tensor):
        raise ExportError(
            f"{type(model).__name__} takes {len(example)} inputs; only models that take one batch of images can be "
            "exported."
        )
    if images is None:
        return example
    if images.shape[1:] != example.shape[1:] or images.dtype != example.dtype or len(images) < 1:
        raise ConfigError(
            f"The images are {images.dtype} {tuple(images.shape)}; {type(model).__name__} takes {example.dtype} "
            f"(B, {', '.join(map(str, example.shape[1:]))})."
        )
    return images


def _run(program: ExportedModel, images: Tensor) -> Tensor:
    """Returns the logits of all images together, followed by those of the first image alone."""
    try:
        return torch.cat([program(images), program(images[:1])])
    except ExportError as error:
        reason = first_line(error.__cause__ or error)
        raise ExportError(f"The exported program cannot be run and was discarded: {reason}") from error


def _facts(model: nn.Module) -> str:
    """Returns the metadata of the file, as JSON."""
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    kept = (
        "architecture",
        "tag",
        "mean",
        "std",
        "interpolation",
        "crop_pct",
        "crop_mode",
        "label_names",
        "num_classes",
    )
    masks, reduction = getattr(model, "lam_config", None), reduction_of(model)
    pruned = reduction is not None and reduction.method == "prune"
    facts = {key: cfg[key] for key in kept if cfg.get(key) is not None}
    facts["input_size"] = tuple(default_input(model).shape[1:])  # type: ignore[union-attr]
    facts |= {key: of_channels(facts[key], facts["input_size"][0]) for key in ("mean", "std") if key in facts}
    facts["num_classes"] = getattr(model, "num_classes", 0)
    if len(facts.get("label_names", ())) != facts["num_classes"]:  # those of a head that was replaced
        facts.pop("label_names", None)
    return to_json(
        {
            "lamzoo": __version__,
            "torch": torch.__version__,
            "pretrained_cfg": facts,
            "lam_config": masks and masks.to_dict(),
            "prune_config": reduction.to_dict() if reduction is not None and pruned else None,
            "token_reduction": reduction.to_dict() if reduction is not None and not pruned else None,
            "fused": is_fused(model) and pinned() == "auto",  # under a pinned backend, no layer takes its fused form
        }
    )
