"""From a model to a file: torch.export's program, and ONNX made of it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lamzoo.errors import ExportError, MissingExtraError
from lamzoo.export.exported import FACTS, INPUT, OUTPUT, Format

OPSET = 20
BATCH = Dim("batch")


def trace(model: nn.Module, images: Tensor) -> ExportedProgram:
    """Exports a model for batches of any size.

    Args:
        model: in evaluation mode.
        images: ``(B, C, H, W)``, an example.

    Raises:
        ExportError: torch.export can't follow the model.
    """
    example = images if len(images) > 1 else images.repeat(2, 1, 1, 1)  # a size of 1 would be taken as a constant
    try:
        with _quietly():
            program = torch.export.export(model, (example,), dynamic_shapes=({0: BATCH},))
    except Exception as error:
        raise ExportError(f"{type(model).__name__} cannot be exported: {_first_line(error)}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # this machine's paths, and half of the file
    return program


def write_program(program: ExportedProgram, path: Path, format: Format, facts: str, int8: bool) -> int | None:
    """Writes a program to a file.

    Args:
        program: what :func:`trace` returned.
        path: where to.
        format: of the file.
        facts: JSON that goes into it.
        int8: quantise what is written.

    Returns:
        The opset of an ONNX file, None for torch.

    Raises:
        ExportError: the ONNX exporter has no translation for an operator.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
    """
    if format == "torch":
        with path.open("wb") as file:
            torch.export.save(program, file, extra_files={FACTS: facts})
        return None
    try:
        import onnxruntime  # noqa: F401 - the check needs it, and so it is asked for before anything is done
        from onnxscript import opset20
    except ImportError as error:
        raise MissingExtraError(
            f"ONNX files need {error.name}, which is not installed; pip install 'lamzoo[export]'."
        ) from error

    def stable_sort(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        # ONNX's TopK puts the lower index first among equals, as a stable sort does.
        size = opset20.Shape(self, start=dim, end=dim + 1 if dim != -1 else None)
        return opset20.TopK(self, size, axis=dim, largest=int(descending), sorted=1)

    try:
        with _quietly():
            converted = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: BATCH},),
                custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
            )
    except Exception as error:
        raise ExportError(f"The program cannot be written as ONNX: {_first_line(error.__cause__ or error)}") from error
    assert converted is not None
    converted.model.metadata_props[FACTS] = facts
    for node in converted.model.graph.all_nodes():
        node.metadata_props.clear()  # again the paths
    converted.save(str(path))
    if int8:
        _quantise(path)
    return OPSET


def _quantise(path: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(path).graph
    matrices = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    # Per channel, onnxruntime runs matrices alone; a mask network has a stack of them, one for each head.
    linear = [node.name for node in graph.node if node.op_type in ("Gemm", "MatMul") and node.input[1] in matrices]
    with _quietly():
        quantize_dynamic(path, path, weight_type=QuantType.QInt8, per_channel=True, nodes_to_quantize=linear)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keeps the exporters' progress and advice, which are for those who write them, out of our output."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
